"""What the code blocks of the docs name: a folder with small stand-ins for a reader's files.

    image.jpg, photo.jpg, photos/        colour noise
    IMAGES/{train,val}/<colour>/         a dataset of three classes
    runs/imagefolder                     a real run of `vmamba_pico`, one epoch on 32 pixels
    vssm_tiny.pth                        the authors' checkpoint of VMamba-T: their names, random weights
    {mask_rcnn,upernet}_vssm_tiny.pth    a detector and a segmenter on it, with narrow heads
    clip.mp4                             three frames
    recipes, benchmarks, examples        those of the repository

`pretrained=True` loads the same random weights: they lie in the cache of `torch.hub`, under the name of the
authors' file, so that nothing is downloaded and no function is replaced.
"""

import os
from fractions import Fraction
from pathlib import Path

import timm
import torch
from PIL import Image

from docs.blocks import ROOT
from images import make_folder
from vmamba.data.video import writing_video
from vmamba.heads import Features, mask_rcnn, mmdet_names, upernet
from vmamba.heads.upernet import mmseg_names
from vmamba.models.official import authors_names
from vmamba_cli.__main__ import app


def prepare(place: Path) -> None:
    """Make the folder."""
    from typer.testing import CliRunner

    data = make_folder(place / "IMAGES")
    images = sorted((data / "val").rglob("*.png"))
    (place / "photos").mkdir()
    for number, path in enumerate(images[::6]):
        Image.open(path).resize((80, 64)).save(place / "photos" / f"{number}.jpg")
    for name in ("image.jpg", "photo.jpg"):
        Image.open(images[0]).resize((320, 240)).save(place / name)
    for name in ("recipes", "benchmarks", "examples"):
        (place / name).symlink_to(ROOT / name)

    weights = authors_names(timm.create_model("vmamba_tiny").state_dict())
    torch.save({"model": weights}, place / "vssm_tiny.pth")
    cache = place / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    url = timm.get_pretrained_cfg("vmamba_tiny").url
    os.link(place / "vssm_tiny.pth", cache / url.rsplit("/", 1)[1])

    _write_dense(place)
    settings = ["model.name=vmamba_pico", "model.weights=null", "data.image_size=32", "train.batch_size=4"]
    settings += ["schedule.epochs=1", "schedule.warmup_epochs=0", "train.workers=0", f"data.root={data}"]
    arguments = [
        "train",
        str(ROOT / "recipes" / "imagefolder.yaml"),
        "--out",
        str(place / "runs" / "imagefolder"),
    ]
    result = CliRunner().invoke(app, [*arguments, *settings])
    assert result.exit_code == 0, result.output


def _write_dense(place: Path) -> None:
    """A detector, a segmenter and a video."""
    backbone = Features.create("vmamba_tiny")
    detector = mask_rcnn(backbone, 81, channels=8, hidden=8)
    torch.save({"state_dict": mmdet_names(detector.state_dict())}, place / "mask_rcnn_vssm_tiny.pth")
    segmenter = upernet(backbone, 150, channels=8, aux_channels=8)
    torch.save({"state_dict": mmseg_names(segmenter.state_dict())}, place / "upernet_vssm_tiny.pth")
    with writing_video(place / "clip.mp4", (160, 120), Fraction(25), Fraction(1, 12800)) as write:
        for number in range(3):
            write(Image.new("RGB", (160, 120), (80 * number, 90, 120)), number / 25)
