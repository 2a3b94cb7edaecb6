"""`vmamba::selective_scan_2d` as a PyTorch operator, with its backward, fake kernels and autograd.

The operator and not a Python function is what modules call, so that TorchScript, FX and torch.compile see one
node. Validation and the choice of engine happen inside. It has no autocast rule: mixed types are legal, and
the engines compute in the state's type whatever autocast says.
"""

from typing import Any

import torch
from torch import Tensor

from vmamba.ops import reference
from vmamba.ops._registry import Gradients, resolve
from vmamba.ops._validate import state_dtype, validate

_OPERANDS = """Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias,
    Tensor? delta_weight, bool delta_softplus, int[] routes, Tensor? initial_state"""

library = torch.library.Library("vmamba", "DEF")
library.define(
    f"selective_scan_2d({_OPERANDS}, ScalarType? out_dtype, str? backend)"
    " -> (Tensor y, Tensor last, Tensor states)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    f"selective_scan_2d_backward(Tensor grad_y, Tensor? grad_last, {_OPERANDS}, Tensor states, str? backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _forward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_weight: Tensor | None,
    delta_softplus: bool,
    routes: list[int],
    initial_state: Tensor | None,
    out_dtype: torch.dtype | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, H, W, D) in `out_dtype` (None: the state's type), last state (B, K, D, N), saved states."""
    validate(x, delta, A, B, C, D, delta_bias, delta_weight, routes, initial_state, out_dtype)
    engine = resolve(backend, x.device, A.shape[2])
    with torch.autocast(x.device.type, enabled=False):
        y, last, states = engine.forward(
            x, delta, A, B, C, D, delta_bias, delta_weight, delta_softplus, routes, initial_state
        )
    return y.to(out_dtype or state_dtype(x)), last, states


def _forward_fake(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_weight: Tensor | None,
    delta_softplus: bool,
    routes: list[int],
    initial_state: Tensor | None,
    out_dtype: torch.dtype | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    validate(x, delta, A, B, C, D, delta_bias, delta_weight, routes, initial_state, out_dtype)
    batch, height, width, channels = x.shape
    n_routes, n_state, dtype = len(routes), A.shape[2], state_dtype(x)
    saved = resolve(backend, x.device, n_state).saved_states(height, width, n_state)
    return (
        x.new_empty(x.shape, dtype=out_dtype or dtype),
        x.new_empty((batch, n_routes, channels, n_state), dtype=dtype),
        x.new_empty((batch, n_routes, saved, n_state, channels), dtype=dtype),
    )


def _backward(
    grad_y: Tensor,
    grad_last: Tensor | None,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_weight: Tensor | None,
    delta_softplus: bool,
    routes: list[int],
    initial_state: Tensor | None,
    states: Tensor,
    backend: str | None,
) -> tuple[Tensor, ...]:
    engine = resolve(backend, x.device, A.shape[2])
    operands = (x, delta, A, B, C, D, delta_bias, delta_weight)
    with torch.autocast(x.device.type, enabled=False):
        gradients = engine.backward(
            grad_y, grad_last, *operands, delta_softplus, routes, initial_state, states
        )
    return tuple(
        _no_gradient(x) if gradient is None or operand is None else gradient.to(operand.dtype).contiguous()
        for gradient, operand in zip(gradients, (*operands, initial_state), strict=True)
    )


def _backward_fake(
    grad_y: Tensor,
    grad_last: Tensor | None,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_weight: Tensor | None,
    delta_softplus: bool,
    routes: list[int],
    initial_state: Tensor | None,
    states: Tensor,
    backend: str | None,
) -> tuple[Tensor, ...]:
    operands = (x, delta, A, B, C, D, delta_bias, delta_weight, initial_state)
    return tuple(_no_gradient(x) if t is None else t.new_empty(t.shape) for t in operands)


def _no_gradient(x: Tensor) -> Tensor:
    """Stands for the gradient of an operand that was not given: an operator's outputs can't be None."""
    return x.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *operands, ctx.delta_softplus, ctx.routes, initial_state, _, backend = inputs
    _, _, states = output
    ctx.mark_non_differentiable(states)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*operands, initial_state, states)
    # Not the argument: backward may run outside of the `use_backend` block, or in another thread.
    ctx.backend = resolve(backend, operands[0].device, operands[2].shape[2]).name


def _autograd_backward(
    ctx: Any, grad_y: Tensor | None, grad_last: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    *operands, initial_state, states = ctx.saved_tensors
    x = operands[0]
    if grad_y is None:
        grad_y = x.new_zeros(x.shape, dtype=states.dtype)
    if ctx.backend == "reference" and torch.is_grad_enabled():
        gradients = _differentiable_backward(
            grad_y, grad_last, (*operands, initial_state), ctx.delta_softplus, ctx.routes
        )
    else:
        gradients = torch.ops.vmamba.selective_scan_2d_backward(
            grad_y, grad_last, *operands, ctx.delta_softplus, ctx.routes, initial_state, states, ctx.backend
        )
    *grad_operands, grad_initial = (
        gradient if operand is not None else None
        for gradient, operand in zip(gradients, (*operands, initial_state), strict=True)
    )
    return (*grad_operands, None, None, grad_initial, None, None)


def _differentiable_backward(
    grad_y: Tensor,
    grad_last: Tensor | None,
    operands: tuple[Tensor | None, ...],
    delta_softplus: bool,
    routes: list[int],
) -> Gradients:
    """The gradients by autograd through the reference, so that they can be differentiated in turn."""
    *first, initial_state = operands
    y, last, _ = reference.scan(*first, delta_softplus, routes, initial_state)  # type: ignore[call-arg, arg-type]
    wanted = {
        i: operand for i, operand in enumerate(operands) if operand is not None and operand.requires_grad
    }
    outputs, grads = [y], [grad_y.to(y.dtype)]
    if grad_last is not None:
        outputs, grads = [y, last], [*grads, grad_last]
    found = torch.autograd.grad(outputs, list(wanted.values()), grads, create_graph=True, allow_unused=True)
    gradients: list[Tensor | None] = [None] * len(operands)
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    return tuple(gradients)  # type: ignore[return-value]


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Nothing is kept: there is no second derivative here."""


def _second_derivative(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    raise RuntimeError(
        "selective_scan_2d: second derivatives exist in the engine 'reference' alone; "
        "run the forward with backend='reference' or inside vmamba.ops.use_backend('reference')"
    )


library.impl("selective_scan_2d", _forward, "CompositeExplicitAutograd")
library.impl("selective_scan_2d_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("vmamba::selective_scan_2d", _forward_fake, lib=library)
torch.library.register_fake("vmamba::selective_scan_2d_backward", _backward_fake, lib=library)
torch.library.register_autograd(
    "vmamba::selective_scan_2d", _autograd_backward, setup_context=_setup_context, lib=library
)
torch.library.register_autograd(
    "vmamba::selective_scan_2d_backward", _second_derivative, setup_context=_setup_second, lib=library
)
