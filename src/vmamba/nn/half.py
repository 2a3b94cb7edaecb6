"""Calling a layer whose parameters are in half precision on an input in a wider type."""

import threading

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from vmamba import _torch_private

HALF = (torch.float16, torch.bfloat16)
_LOCK = threading.RLock()


def is_half(layer: nn.Module) -> bool:
    """Whether a parameter of the layer is in half precision."""
    return any(parameter.dtype in HALF for parameter in layer.parameters())


def call_in_type_of(y: Tensor, layer: nn.Module) -> Tensor:
    """layer(y) with the layer's half-precision parameters widened to y's type."""
    if (
        type(layer) is nn.LayerNorm
        and not _torch_private.has_global_hook()
        and not _torch_private.is_watched(vars(layer))
    ):
        weight, bias = (None if t is None else t.to(y.dtype) for t in (layer.weight, layer.bias))
        return F.layer_norm(y, layer.normalized_shape, weight, bias, layer.eps)
    widened = {name: p.to(y.dtype) for name, p in layer.named_parameters() if p.dtype in HALF}
    with _LOCK:  # functional_call swaps the layer's parameters during the call, for every thread
        return functional_call(layer, widened, (y,))
