"""Classify image files with ONNX Runtime; PyTorch is not needed.

pip install onnxruntime pillow
vmamba export onnx vmamba_pico_wide --out model.onnx --preprocess
python examples/serve_onnxruntime.py model.onnx photo.jpg …
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

file, *photos = sys.argv[1:]
session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
classes = json.loads(session.get_modelmeta().custom_metadata_map["vmamba.classes"])
for photo in photos:
    image = np.asarray(ImageOps.exif_transpose(Image.open(photo)).convert("RGB"))
    (probabilities,) = session.run(["probabilities"], {"images": image[None]})
    best = probabilities[0].argsort()[:-4:-1]
    print(f"{photo}: " + ", ".join(f"{classes[i]} {probabilities[0, i]:.1%}" for i in best))
