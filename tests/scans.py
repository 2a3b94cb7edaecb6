"""Operands of the scan for tests, and how far an engine may be from the truth."""

from typing import Any

import torch
from torch import Tensor

from vmamba.ops import NAMED_ROUTES, selective_scan_2d

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

    found: dict[str, Tensor | None] = {
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
        name: t if t is None else t.to(dtype).requires_grad_(requires_grad) for name, t in found.items()
    }
    return {**tensors, "routes": routes}


def given(call: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a call that are not None."""
    return {name: call[name] for name in TENSORS if call[name] is not None}


def cast(call: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The call with its tensors, as leaves, in another type."""
    found = {name: t.detach().to(dtype).requires_grad_(t.requires_grad) for name, t in given(call).items()}
    return {**call, **found}


def value_and_gradients(call: dict[str, Any], grad_y: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    """y and the gradient of every tensor."""
    y = selective_scan_2d(**call, **kwargs)
    tensors = given(call)
    gradients = torch.autograd.grad(y, list(tensors.values()), grad_y.to(y.dtype))
    return {"y": y.detach(), **dict(zip(tensors, gradients, strict=True))}


def assert_accurate(call: dict[str, Any], backend: str, **kwargs: Any) -> None:
    """Forward and gradients of a float32 (or half) call are as near to float64 as the contract asks.

    At most twice the reference's own error in the same types, plus 4 eps of the largest value.
    """
    grad_y = torch.randn(call["x"].shape, dtype=torch.float64).to(call["x"].dtype)
    true = value_and_gradients(cast(call, torch.float64), grad_y, backend="reference")
    own = value_and_gradients(call, grad_y, backend="reference", **kwargs)
    found = value_and_gradients(call, grad_y, backend=backend, **kwargs)
    for name, expected in true.items():
        largest = expected.abs().max().item() if expected.numel() else 0.0
        eps = torch.finfo(found[name].dtype).eps
        error = (found[name].double() - expected).abs().max().item() if expected.numel() else 0.0
        allowed = 2 * ((own[name].double() - expected).abs().max().item() if expected.numel() else 0.0)
        assert found[name].dtype == own[name].dtype
        assert found[name].shape == expected.shape
        assert error <= allowed + 4 * eps * largest, f"{name}: error {error:.3g}, reference {allowed / 2:.3g}"
