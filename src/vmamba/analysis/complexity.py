"""Parameters and multiply-adds, of any timm model.

GMACs count convolutions and matrix products once a multiply-add, layer norm 5 a value, average pooling 1, and
a selective scan as `vmamba.ops.flops.scan_macs` says, so that they are the figures of the paper's tables.
"""

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vmamba  # noqa: F401  (registers the variants)
from vmamba.errors import UserError
from vmamba.ops.flops import scan_macs


class ModelError(UserError, ValueError):
    """A model's name or an input size is unknown or does not fit."""


@dataclass(frozen=True)
class Complexity:
    """Counts of one forward pass.

    Attributes:
        parameters: Of the model.
        macs: Multiply-adds with a scan at 9·L·D·N a route, as the authors' tables count it.
        macs_for_loop: With a scan at 3.5·L·D·N a route.
    """

    parameters: int
    macs: float
    macs_for_loop: float


def create_on_meta(name: str, **kwargs: Any) -> Any:
    """A model (`nn.Module`) of timm's registry without memory for its weights.

    Raises:
        ModelError: There is none of that name.
    """
    if not timm.is_model(name):
        raise ModelError(f"unknown model {name!r}; `vmamba list` shows ours, timm.list_models() all")
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def parse_size(text: str) -> tuple[int, int]:
    """ "384" or "512x2048" (height x width) → (height, width).

    Raises:
        ModelError: It is of neither form.
    """
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ModelError(f"input size {text!r}: expected 384 or 512x2048 (height x width)")
    return int(parts[0]), int(parts[-1])


def count(model: nn.Module, input_size: tuple[int, ...]) -> Complexity:
    """Count one forward pass of a batch of one.

    Args:
        model: On any device; on the meta device nothing is computed.
        input_size: (channels, height, width).

    Raises:
        ModelError: The model does not take that size.
    """
    device = next(model.parameters()).device
    image = torch.empty(1, *input_size, device=device)
    training = model.training
    macs = []
    try:
        for counting in ("paper", "for-loop"):
            with (
                torch.no_grad(),
                FlopCounterMode(display=False, custom_mapping=_formulas(counting)) as counter,
            ):
                model.eval()(image)
            macs.append(counter.get_total_flops() / 2)  # the counter has two to a multiply-add
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ModelError(f"the model does not take an input of {tuple(input_size)}: {error}") from error
    finally:
        model.train(training)
    return Complexity(sum(p.numel() for p in model.parameters()), *macs)


def _formulas(counting: str) -> dict[Any, Any]:
    aten = torch.ops.aten
    return {
        aten.native_layer_norm: partial(_per_value, 5),
        aten.mean.dim: partial(_per_value, 1),
        aten._adaptive_avg_pool2d: partial(_per_value, 1),
        torch.ops.vmamba.selective_scan_2d: partial(_scan, counting),
    }


def _per_value(macs: int, shape: Any, *_: Any, **__: Any) -> int:
    return 2 * macs * prod(shape)


def _scan(
    counting: str,
    x: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any,
    bias: Any,
    weight: Any,
    *_: Any,
    **__: Any,
) -> int:
    rank = None if weight is None else weight[2]
    return int(2 * scan_macs(tuple(x), A[0], A[2], rank=rank, skip=D is not None, counting=counting))
