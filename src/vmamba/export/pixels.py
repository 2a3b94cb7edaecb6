"""Preprocessing inside the graph: images of uint8 as they come from a decoder → a model's input.

Sizes: b images, h w height and width of the images, c channels.

The graph resizes as Pillow does, which timm's transforms call: a filter as wide as the reduction, along the
rows, rounded to whole numbers, then along the columns. Each is a product with a matrix of filter values.
It is not ONNX's `Resize`: OpenVINO ignores its `antialias` and gives other pixels.
"""

import json
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
import torch
from PIL import Image
from torch import Tensor, nn

from vmamba.data.preprocessing import Preprocessing
from vmamba.errors import ModelError
from vmamba.export.nodes import Nodes

PIXELS = "pixels"
"""The name of the preprocessed images in a graph."""

library = torch.library.Library("vmamba_export", "DEF")
library.define("pixels(Tensor images, str settings) -> Tensor")


class WithPreprocessing(nn.Module):
    """Preprocessing, a classifier and softmax: images (b, h, w, c) of uint8 → probabilities (b, k).

    Args:
        model: From pixels (b, c, h, w) to logits (b, k).
        preprocessing: Of the model.

    Raises:
        ModelError: It can't be put into a graph.
    """

    def __init__(self, model: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        _refuse(preprocessing)
        self.model = model
        self.settings = json.dumps(preprocessing.to_dict())

    def forward(self, images: Tensor) -> Tensor:
        pixels = torch.ops.vmamba_export.pixels(images, self.settings)
        logits: Tensor = self.model(pixels)
        return logits.softmax(1)


def _refuse(preprocessing: Preprocessing) -> None:
    problems = {
        f"{preprocessing.channels} channels": preprocessing.channels != 3,
        f"interpolation {preprocessing.interpolation!r}": preprocessing.interpolation not in _FILTERS,
        f"crop_mode {preprocessing.crop_mode!r}": preprocessing.crop_mode not in ("center", "squash"),
        f"crop_mode 'center' at {preprocessing.size}": preprocessing.crop_mode == "center"
        and preprocessing.size[0] != preprocessing.size[1],
        f"crop_pct {preprocessing.crop_pct}": preprocessing.crop_pct > 1,
        "images of floats": preprocessing.decoding.to_tensor,
    }
    if wrong := [name for name, is_wrong in problems.items() if is_wrong]:
        raise ModelError(
            f"preprocessing: a graph can't hold {', '.join(wrong)}; it takes images of 8-bit RGB, bilinear "
            "or bicubic, a square centre crop or crop_mode 'squash'; export without preprocessing"
        )


def _pixels(images: Tensor, settings: str) -> Tensor:
    """The library's own preprocessing, image by image."""
    transform = Preprocessing.from_dict(json.loads(settings)).transform()
    return torch.stack([transform(Image.fromarray(image.numpy())) for image in images.cpu()])


def _pixels_fake(images: Tensor, settings: str) -> Tensor:
    preprocessing = Preprocessing.from_dict(json.loads(settings))
    return images.new_empty((images.shape[0], 3, *preprocessing.size), dtype=torch.float32)


library.impl("pixels", _pixels, "CompositeExplicitAutograd")
torch.library.register_fake("vmamba_export::pixels", _pixels_fake, lib=library)


def write_pixels(images: ir.Value, settings: str) -> tuple[Sequence[ir.Node], ir.Value]:
    """The nodes, and the pixels (b, c, h, w)."""
    op, preprocessing = Nodes(), Preprocessing.from_dict(json.loads(settings))
    float32 = ir.DataType.FLOAT
    shape = op.Shape(images)
    sizes = [op.Gather(shape, op.number(axis), axis=0) for axis in (1, 2)]
    scales = [int(side / preprocessing.crop_pct) for side in preprocessing.size]
    if preprocessing.crop_mode == "squash":
        resized = [op.number(scale) for scale in scales]
    else:  # the shorter side to the scale, the longer in proportion, rounded down
        shorter = op.Min(*sizes)
        resized = [op.Div(op.Mul(op.number(scales[0]), size), shorter) for size in sizes]
    rows, columns = (
        _matrix(op, size, new, crop, _FILTERS[preprocessing.interpolation])
        for size, new, crop in zip(sizes, resized, preprocessing.size, strict=True)
    )
    x = op.Cast(op.Transpose(images, perm=[0, 3, 1, 2]), to=float32)
    x = _rounded(op, op.MatMul(x, op.Transpose(columns, perm=[1, 0])))
    x = op.Div(_rounded(op, op.MatMul(rows, x)), op.constant(255.0, float32))
    mean, std = (
        op.Constant(value=ir.tensor(np.array(values, np.float32)[:, None, None]))
        for values in (preprocessing.mean, preprocessing.std)
    )
    pixels = op.Div(op.Sub(x, mean), std)
    return op.tape.nodes, pixels


def _rounded(op: Nodes, values: ir.Value) -> ir.Value:
    """To whole numbers from 0 to 255, halves up as Pillow does."""
    bounds = [op.constant(bound, ir.DataType.FLOAT) for bound in (0.0, 255.0)]
    return op.Clip(op.Floor(op.Add(values, op.constant(0.5, ir.DataType.FLOAT))), *bounds)


def _matrix(
    op: Nodes, size: ir.Value, new: ir.Value, crop: int, written: Callable[[Nodes, ir.Value], ir.Value]
) -> ir.Value:
    """Filter and crop along one side as a matrix (crop, size).

    Args:
        op: Where its nodes go.
        size: The image's side.
        new: The side to which it is resized.
        crop: The side that is left of that, from the middle.
        written: Writes the filter.
    """
    one, two = op.number(1), op.number(2)
    margin = op.Sub(new, op.number(crop))
    # round(margin / 2) as Python rounds, halves to even.
    half = op.Div(margin, two)
    first = op.Add(half, op.Mul(op.Mod(margin, two), op.Mod(half, two)))
    outputs = op.Add(op.constant(tuple(range(crop)), ir.DataType.INT64), first)
    inputs = op.Range(op.number(0), size, one)
    # The distance of an input's centre from an output's, in units of the filter: exact until the division.
    there = op.Mul(op.Add(op.Mul(inputs, two), one), new)
    here = op.Mul(op.Add(op.Mul(outputs, two), one), size)
    distance = op.Cast(op.Sub(op.unsqueeze(there, 0), op.unsqueeze(here, 1)), to=ir.DataType.FLOAT)
    unit = op.Cast(op.Mul(op.Max(size, new), two), to=ir.DataType.FLOAT)
    weights = written(op, op.Abs(op.Div(distance, unit)))
    return op.Div(weights, op.ReduceSum(weights, op.vector(1), keepdims=1))


def _bilinear(op: Nodes, distance: ir.Value) -> ir.Value:
    return op.Relu(op.Sub(op.constant(1.0, ir.DataType.FLOAT), distance))


def _bicubic(op: Nodes, distance: ir.Value) -> ir.Value:
    """Keys' filter with a = -0.5: 1.5d³ - 2.5d² + 1 up to 1, then -0.5d³ + 2.5d² - 4d + 2 up to 2."""

    def polynomial(*coefficients: float) -> ir.Value:
        value = op.constant(coefficients[0], ir.DataType.FLOAT)
        for coefficient in coefficients[1:]:
            value = op.Add(op.Mul(value, distance), op.constant(coefficient, ir.DataType.FLOAT))
        return value

    one, two, zero = (op.constant(value, ir.DataType.FLOAT) for value in (1.0, 2.0, 0.0))
    far = op.Where(op.Less(distance, two), polynomial(-0.5, 2.5, -4.0, 2.0), zero)
    return op.Where(op.Less(distance, one), polynomial(1.5, -2.5, 0.0, 1.0), far)


_FILTERS: dict[str, Callable[[Nodes, ir.Value], ir.Value]] = {"bilinear": _bilinear, "bicubic": _bicubic}
