"""The base of our layers: a call runs the layer's fused form where the difference cannot be observed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vmamba.nn.fused.entry import fused_form

MISSHAPEN = (RuntimeError, ValueError, IndexError)
"""What PyTorch and Python raise of a tensor of the wrong shape, among other reasons."""


class Layer(nn.Module):
    """An `nn.Module` whose `forward` reads like the paper, and which may have a fused form for a CPU.

    The forms are in `vmamba.nn.fused`. Scripting, tracing, compilation and export see `forward` alone.

    A call that fails for the shape of its input raises a `ValueError` that says how to turn it. The shape is
    looked at only after a failure: a check before it would be recorded by tracers.

    Attributes:
        in_channels: Channels that the input must have; None where its shape is not explained.
        images: Whether the input is (b, c, h, w), as images are, and not (b, h, w, c).
    """

    in_channels: int | None = None
    images = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a constant for compilers, which never see the rest
            return super().__call__(*args, **kwargs)
        try:
            form = fused_form(self, args[0]) if len(args) == 1 and not kwargs else None
            return super().__call__(*args, **kwargs) if form is None else form.forward(args[0])
        except MISSHAPEN as error:
            self.explain_shape(error, *args, **kwargs)
            raise

    def explain_shape(self, error: Exception, *args: Any, **kwargs: Any) -> None:
        """After a call with these arguments failed: raise an error that explains it, if the shape is wrong.

        Raises:
            ValueError: The input is of another shape than the layer takes.
        """
        x = args[0] if args else kwargs.get("x")
        if self.in_channels is None or not isinstance(x, Tensor):
            return
        problem = _shape_problem(tuple(x.shape), self.in_channels, self.images)
        if problem:
            raise ValueError(f"{type(self).__name__}: {problem}") from error


def _shape_problem(shape: Sequence[int], channels: int, images: bool) -> str:
    """What is wrong with an input's shape and how to turn it; empty if nothing is."""
    axis = 1 if images else 3
    if len(shape) == 4 and shape[axis] == channels:
        return ""
    expected = f"(b, {channels}, h, w)" if images else f"(b, h, w, {channels})"
    return f"expected {expected}, got {tuple(shape)}{_turn(shape, channels, images)}"


def _turn(shape: Sequence[int], channels: int, images: bool) -> str:
    other_axis = 3 if images else 1
    if len(shape) == 4 and shape[other_axis] == channels:
        return f"; x.permute({'0, 3, 1, 2' if images else '0, 2, 3, 1'}) puts the channels in their place"
    if len(shape) == 3 and shape[other_axis - 1] == channels and shape[0 if images else 2] != channels:
        order = "2, 0, 1" if images else "1, 2, 0"
        return f"; for one image x.permute({order}).unsqueeze(0)"
    if len(shape) == 3 and shape[0 if images else 2] == channels:
        sequence = "" if images else f", for sequences (b, h·w, {channels}) x.unflatten(1, (h, w))"
        return f"; for one image x.unsqueeze(0){sequence}"
    if len(shape) == 4 and images:
        return "; for images of other channels create the model with in_chans=…"
    return ""
