"""When a backend is right: the criterion of the tests and of the proof on a user's device.

Forward and every gradient may be off by at most twice the error of `reference` in the same types, plus 4 eps
of the largest value. The truth is `reference` in float64.

Sizes: b batch, h height, w width, d channels, k routes, n state size, r rank of delta.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vmamba.ops.routes import NAMED_ROUTES
from vmamba.ops.selective_scan import selective_scan_2d

TENSORS = ("x", "delta", "A", "B", "C", "D", "delta_bias", "delta_weight")
"""The tensors among the arguments of `selective_scan_2d`."""

Results = dict[str, Tensor]
"""y and the gradients, by name."""


@dataclass(frozen=True)
class Deviation:
    """How far a value, or a gradient, is from the truth.

    Attributes:
        name: "y", or the operand whose gradient it is.
        error: The largest error.
        reference: The largest error of `reference` in the same types.
        allowed: The largest error that is allowed.
    """

    name: str
    error: float
    reference: float
    allowed: float

    @property
    def within(self) -> bool:
        return self.error <= self.allowed  # never for NaN

    def __str__(self) -> str:
        what = "y" if self.name == "y" else f"the gradient of {self.name}"
        return f"{what}: error {self.error:.3g}, reference {self.reference:.3g}, allowed {self.allowed:.3g}"


def operands(
    batch: int = 2,
    height: int = 3,
    width: int = 5,
    channels: int = 4,
    n_state: int = 2,
    rank: int | None = 3,
    routes: str | tuple[str, ...] = "cross",
    *,
    skip: bool = True,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    requires_grad: bool = True,
) -> dict[str, Any]:
    """Keyword arguments of `selective_scan_2d` on the CPU, drawn as a model would have them.

    Args:
        batch: b.
        height: h.
        width: w.
        channels: d.
        n_state: n.
        rank: r; None for a delta of every channel.
        routes: As the operator takes them, by name.
        skip: Whether there is a D.
        bias: Whether there is a delta_bias.
        dtype: Of every tensor.
        requires_grad: Of every tensor.
    """
    n_routes = len(NAMED_ROUTES[routes] if isinstance(routes, str) else routes)
    image = (batch, height, width, n_routes)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, dtype=torch.float64) * scale

    drawn: dict[str, Tensor | None] = {
        "x": normal(batch, height, width, channels),
        "delta": normal(*image, channels if rank is None else rank),
        "A": -torch.rand(n_routes, channels, n_state, dtype=torch.float64) - 0.1,
        "B": normal(*image, n_state),
        "C": normal(*image, n_state),
        "D": normal(n_routes, channels) if skip else None,
        "delta_bias": normal(n_routes, channels) - 2 if bias else None,
        "delta_weight": None if rank is None else normal(n_routes, channels, rank, scale=rank**-0.5),
    }
    tensors = {
        name: t if t is None else t.to(dtype).requires_grad_(requires_grad) for name, t in drawn.items()
    }
    return {**tensors, "routes": routes}


def given(call: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a call that are not None."""
    return {name: call[name] for name in TENSORS if call[name] is not None}


def cast(
    call: dict[str, Any], dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> dict[str, Any]:
    """The call with its tensors, as leaves, in another type or on another device."""
    tensors = {
        name: t.detach().to(device=device, dtype=dtype).requires_grad_(t.requires_grad)
        for name, t in given(call).items()
    }
    return {**call, **tensors}


def value_and_gradients(call: dict[str, Any], grad_y: Tensor, **kwargs: Any) -> Results:
    """y and the gradient of every tensor.

    Args:
        call: Keyword arguments of `selective_scan_2d`.
        grad_y: The gradient of y, (b, h, w, d), cast to y's type.
        **kwargs: More of its arguments, such as `backend`.
    """
    y = selective_scan_2d(**call, **kwargs)
    tensors = given(call)
    gradients = torch.autograd.grad(y, list(tensors.values()), grad_y.to(y.dtype))
    return {"y": y.detach(), **dict(zip(tensors, gradients, strict=True))}


def deviations(
    true: Sequence[Results], reference: Sequence[Results], computed: Sequence[Results]
) -> list[Deviation]:
    """Judge results, on whatever device, by name; several calls of one shape are judged together.

    Args:
        true: By `reference` in float64.
        reference: By `reference` in the types of the call.
        computed: By the backend in question. A result of another type or shape than the reference's has an
            infinite error.
    """

    def worst(results: Sequence[Results], name: str) -> float:
        errors = [(r[name].double().cpu() - t[name].cpu()).abs() for r, t in zip(results, true, strict=True)]
        return torch.stack(errors).max().item()

    judged = []
    for name, first in computed[0].items():
        expected = reference[0][name]
        if (first.dtype, first.shape) != (expected.dtype, expected.shape):
            judged.append(Deviation(name, float("inf"), 0.0, 0.0))
        elif first.numel():
            largest = max(t[name].abs().max().item() for t in true)
            own = worst(reference, name)
            allowed = 2 * own + 4 * torch.finfo(first.dtype).eps * largest
            judged.append(Deviation(name, worst(computed, name), own, allowed))
    return judged


def judge(*calls: dict[str, Any], backend: str, **kwargs: Any) -> list[Deviation]:
    """Deviations of a backend on float32 (or half) calls of one shape, which are judged together.

    The error of a small call is luck: give several.

    Args:
        *calls: From `operands`.
        backend: Its name.
        **kwargs: More arguments of `selective_scan_2d`.
    """
    true, reference, computed = [], [], []
    for call in calls:
        grad_y = torch.randn(call["x"].shape, dtype=torch.float64).to(call["x"])
        true.append(value_and_gradients(cast(call, torch.float64), grad_y, backend="reference"))
        reference.append(value_and_gradients(call, grad_y, backend="reference", **kwargs))
        computed.append(value_and_gradients(call, grad_y, backend=backend, **kwargs))
    return deviations(true, reference, computed)
