"""Parameters and multiply-adds, of any timm model.

One multiply-add of a convolution or matrix product counts 1, layer norm 5 for each value, average pooling 1,
and a selective scan as `vmamba.ops.flops.scan_macs` says: the counting of the paper's tables.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from vmamba.errors import ModelError
from vmamba.nn.modes import evaluating
from vmamba.ops.flops import COUNTINGS, scan_macs


@dataclass(frozen=True)
class Complexity:
    """Counts of one forward pass.

    Attributes:
        parameters: Parameters of the model.
        macs: Multiply-adds, with 9·l·d·n for each route of a scan, as in the authors' tables.
        macs_for_loop: The same with 3.5·l·d·n for each route of a scan.
    """

    parameters: int
    macs: float
    macs_for_loop: float


def parse_size(text: str) -> tuple[int, int]:
    """Read (height, width) from "384" or "512x2048" (height x width).

    Raises:
        ModelError: The text has neither form.
    """
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise ModelError(f"input size {text!r}: expected 384 or 512x2048 (height x width)")
    return int(sides[0]), int(sides[-1])


def count(model: nn.Module, input_size: tuple[int, ...]) -> Complexity:
    """Count one forward pass of a batch of one, on the meta device: nothing is computed.

    Args:
        model: On any device.
        input_size: (channels, height, width).

    Raises:
        ModelError: The model does not take that size.
    """
    excess: list[float] = []  # per scan: MACs by the paper's counting minus MACs by the for-loop counting

    def scan(*shapes: Any, **_: Any) -> int:
        x, _delta, A, _B, _C, D, _bias, weight, *_rest = shapes
        rank = None if weight is None else weight[2]
        paper, for_loop = (
            scan_macs(tuple(x), A[0], A[2], rank=rank, skip=D is not None, counting=counting)
            for counting in COUNTINGS
        )
        excess.append(paper - for_loop)
        return int(2 * paper)

    formulas = {**_FORMULAS, torch.ops.vmamba.selective_scan_2d: scan}
    weights = {name: t.detach().to("meta") for name, t in [*model.named_parameters(), *model.named_buffers()]}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        _evaluate(model, partial(functional_call, model, weights), input_size)
    macs = counter.get_total_flops() / 2  # PyTorch counts a multiply-add as 2
    return Complexity(sum(p.numel() for p in model.parameters()), macs, macs - sum(excess))


def feature_shapes(model: Any, input_size: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The shapes (c, h, w) of a timm model's feature maps, by the name of the module that computes them.

    Args:
        model: From `create_on_meta`.
        input_size: (channels, height, width).

    Raises:
        ModelError: The model does not take that size.
    """
    maps = _evaluate(model, partial(model.forward_intermediates, intermediates_only=True), input_size)
    names = [info["module"] for info in model.feature_info]
    return {name: tuple(feature.shape[1:]) for name, feature in zip(names, maps, strict=True)}


def _evaluate(model: nn.Module, call: Callable[[Tensor], Any], input_size: tuple[int, ...]) -> Any:
    """The result of a call with one image on the meta device, with the model in evaluation mode."""
    try:
        image = torch.empty(1, *input_size, device="meta", dtype=next(model.parameters()).dtype)
        with evaluating(model), torch.no_grad():
            return call(image)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ModelError(f"the model does not take an input of {tuple(input_size)}: {error}") from error


def _per_value(macs: int, shape: Any, *_: Any, **__: Any) -> int:
    return 2 * macs * prod(shape)


_FORMULAS: dict[Any, Any] = {
    torch.ops.aten.native_layer_norm: partial(_per_value, 5),
    torch.ops.aten.mean.dim: partial(_per_value, 1),
    torch.ops.aten._adaptive_avg_pool2d: partial(_per_value, 1),
    torch.ops.aten.avg_pool2d: partial(_per_value, 1),
}
