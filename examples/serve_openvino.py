"""Classify image files with OpenVINO; PyTorch is not needed.

pip install openvino pillow
vmamba export openvino vmamba_pico_wide --out model.xml --preprocess
python examples/serve_openvino.py model.xml photo.jpg …
"""

import json
import sys

import numpy as np
import openvino
from PIL import Image, ImageOps

file, *photos = sys.argv[1:]
core = openvino.Core()
model = core.read_model(file)
classes = json.loads(model.get_rt_info(["vmamba", "classes"]).astype(str))
compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
for photo in photos:
    image = np.asarray(ImageOps.exif_transpose(Image.open(photo)).convert("RGB"))
    probabilities = compiled([image[None]])["probabilities"]
    best = probabilities[0].argsort()[:-4:-1]
    print(f"{photo}: " + ", ".join(f"{classes[i]} {probabilities[0, i]:.1%}" for i in best))
