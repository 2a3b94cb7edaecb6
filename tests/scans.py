"""Operands of the scan for tests, and how far a backend may be from the truth."""

from typing import Any

import pytest
import torch
from torch import Tensor

from vmamba.ops import NAMED_ROUTES, backends, selective_scan_2d

BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}"))
    for name, reason in ((status.name, status.reason) for status in backends())
]
"""Every backend that can run here."""
FAST = [backend for backend in BACKENDS if backend.values != ("reference",)]

PYTORCH_2_7 = torch.__version__.startswith("2.7.")
"""The lowest version that is served; what docs/guides/deploy.md says of it."""

TENSORS = ("x", "delta", "A", "B", "C", "D", "delta_bias", "delta_weight")


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
    """Keyword arguments of `selective_scan_2d`, drawn as a model would have them."""
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


def cast(call: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The call with its tensors, as leaves, in another type."""
    tensors = {name: t.detach().to(dtype).requires_grad_(t.requires_grad) for name, t in given(call).items()}
    return {**call, **tensors}


def value_and_gradients(call: dict[str, Any], grad_y: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    """y and the gradient of every tensor."""
    y = selective_scan_2d(**call, **kwargs)
    tensors = given(call)
    gradients = torch.autograd.grad(y, list(tensors.values()), grad_y.to(y.dtype))
    return {"y": y.detach(), **dict(zip(tensors, gradients, strict=True))}


def assert_accurate(*calls: dict[str, Any], backend: str, **kwargs: Any) -> None:
    """Forward and gradients of float32 (or half) calls are as near to float64 as the contract asks.

    At most twice the reference's own error in the same types, plus 4 eps of the largest value. The
    error of a small call is luck: give several calls of the same shape, they are judged together.
    """
    true, reference, computed = [], [], []
    for call in calls:
        grad_y = torch.randn(call["x"].shape, dtype=torch.float64).to(call["x"].dtype)
        true.append(value_and_gradients(cast(call, torch.float64), grad_y, backend="reference"))
        reference.append(value_and_gradients(call, grad_y, backend="reference", **kwargs))
        computed.append(value_and_gradients(call, grad_y, backend=backend, **kwargs))

    for name, first in computed[0].items():

        def worst(results: list[dict[str, Tensor]], name: str = name) -> float:
            errors = [(r[name].double() - t[name]).abs() for r, t in zip(results, true, strict=True)]
            return torch.stack(errors).max().item()

        assert first.dtype == reference[0][name].dtype
        assert first.shape == true[0][name].shape
        if first.numel() == 0:
            continue
        largest = max(t[name].abs().max().item() for t in true)
        allowed = 2 * worst(reference) + 4 * torch.finfo(first.dtype).eps * largest
        assert worst(computed) <= allowed, (
            f"{name}: error {worst(computed):.3g}, reference {worst(reference):.3g}"
        )
