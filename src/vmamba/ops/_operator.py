"""`vmamba::selective_scan_2d` as a PyTorch operator: schema, kernels, fake kernels, derivatives, vmap.

Modules call the operator and not a Python function, so that TorchScript, FX and torch.compile see one node.
Validation and the choice of backend happen inside. It has no autocast rule: mixed types are legal, and the
backends compute in the state's type whatever autocast says.

Under `torch.func.grad`, `vjp`, `jvp` and the transforms built on them, and for tensors with a forward-mode
tangent, the operator runs as `vmamba.ops.decomposition`: plain PyTorch, differentiable in every mode and any
number of times.

Sizes: b batch, h height, w width, d channels, k routes, n state size.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from vmamba._torch_private import FunctionalTensor, call_below_autograd, is_exporting, is_transformed
from vmamba.ops import decomposition, reference
from vmamba.ops._registry import no_proof, resolve
from vmamba.ops.backend import Gradients
from vmamba.ops.operands import Operands
from vmamba.ops.routes import check_orders

_OPERANDS = """Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias,
    Tensor? delta_weight, bool delta_softplus, int[] routes, Tensor? initial_state"""

library = torch.library.Library("vmamba", "DEF")
library.define(
    f"selective_scan_2d({_OPERANDS}, ScalarType? out_dtype, str? backend, Tensor? orders=None)"
    " -> (Tensor y, Tensor last_state, Tensor states)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    f"selective_scan_2d_backward(Tensor grad_y, Tensor? grad_last_state, {_OPERANDS}, Tensor states,"
    " str? backend, Tensor? orders=None)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_SCAN = torch.ops.vmamba.selective_scan_2d.default
_SCAN_BACKWARD = torch.ops.vmamba.selective_scan_2d_backward.default


# The schemas above are the one place that lists the arguments. PyTorch hands them over by position, without
# `orders` where it is None.
def _unpack(arguments: tuple[Any, ...]) -> tuple[Operands, torch.dtype | None, str | None]:
    """The call, `out_dtype` and `backend` of `selective_scan_2d`'s arguments."""
    return Operands(*arguments[:11], *arguments[13:]), arguments[11], arguments[12]


def _unpack_backward(
    arguments: tuple[Any, ...],
) -> tuple[Tensor, Tensor | None, Operands, Tensor, str | None]:
    """grad_y, grad_last_state, the call, states and `backend` of `selective_scan_2d_backward`'s arguments."""
    call = Operands(*arguments[2:13], *arguments[15:])
    return arguments[0], arguments[1], call, arguments[13], arguments[14]


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    # Entering the context costs more than all else around the kernel: only where it changes something.
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """y (b, h, w, d) in `out_dtype` (None: the state's type), last state (b, k, d, n), saved states."""
    call, out_dtype, backend = _unpack(arguments)
    call.validate(out_dtype)
    if call.orders is not None:
        check_orders(call.orders)
    with _without_autocast(call.device.type):
        y, last_state, states = resolve(backend, call).forward(call)
    return y.to(out_dtype or call.state_dtype), last_state, states


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call, out_dtype, backend = _unpack(arguments)
    call.validate(out_dtype)
    x, dtype = call.x, call.state_dtype
    b, _, _, d = x.shape
    n_saved = resolve(backend, call, may_prove=False).n_saved(call)
    return (
        x.new_empty(x.shape, dtype=out_dtype or dtype),
        x.new_empty((b, call.n_routes, d, call.n_state), dtype=dtype),
        x.new_empty((b, call.n_routes, n_saved, call.n_state, d), dtype=dtype),
    )


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    grad_y, grad_last_state, call, states, backend = _unpack_backward(arguments)
    with _without_autocast(call.device.type):
        gradients = resolve(backend, call).backward(grad_y, grad_last_state, call, states)
    return tuple(
        _no_gradient(call.x)
        if gradient is None or operand is None
        else gradient.to(operand.dtype).contiguous()
        for gradient, operand in zip(gradients, call.tensors, strict=True)
    )


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    call = _unpack_backward(arguments)[2]
    return tuple(_no_gradient(call.x) if t is None else t.new_empty(t.shape) for t in call.tensors)


def _no_gradient(x: Tensor) -> Tensor:
    """An empty tensor for the gradient of an omitted operand: an operator's outputs can't be None."""
    return x.new_empty(0)


def _needs_gradient(arguments: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in arguments)


def _autograd(keys: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The operator's kernel for the Autograd dispatch key."""
    if is_transformed(arguments):
        return _decomposed(*_unpack(arguments))
    if isinstance(arguments[0], FunctionalTensor):
        arguments = _with_backend(arguments)
    if _needs_gradient(arguments):
        return _Scan.apply(keys, *arguments)
    return call_below_autograd(_SCAN, keys, arguments)


def _with_backend(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with the backend that serves the call, for a graph that is being compiled.

    So forward, backward and the number of saved states are one backend's, whatever is forced or proven when
    the graph runs.
    """
    call, out_dtype, backend = _unpack(arguments)
    if is_exporting():
        return arguments
    call.validate(out_dtype)
    return (*arguments[:12], resolve(backend, call, may_prove=False).name, *arguments[13:])


def _decomposed(
    call: Operands, out_dtype: torch.dtype | None, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator as plain PyTorch; a backend that cannot serve the call raises here too."""
    if backend is not None:
        resolve(backend, call, may_prove=False)
    if call.orders is not None:
        check_orders(call.orders)
    y, last_state = decomposition.scan(call, out_dtype)
    b, k, d, n = last_state.shape
    return y, last_state, last_state.new_empty((b, k, 0, n, d))


class _Scan(torch.autograd.Function):
    """The operator with its gradient, outside of transforms."""

    @staticmethod
    def forward(ctx: Any, keys: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        call, _, backend = _unpack(arguments)
        y, last_state, states = call_below_autograd(_SCAN, keys, arguments)
        ctx.mark_non_differentiable(states)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*call.tensors, call.orders, states)
        ctx.settings = call.delta_softplus, call.routes
        # Not the argument: backward may run outside of the `use_backend` block, or in another thread.
        ctx.backend = resolve(backend, call).name
        ctx.n_arguments = len(arguments)
        return y, last_state, states

    @staticmethod
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_last_state: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *operands, initial_state, orders, states = ctx.saved_tensors
        call = Operands(*operands, *ctx.settings, initial_state, orders)  # type: ignore[call-arg]
        if grad_y is None:
            grad_y = call.x.new_zeros(call.x.shape, dtype=states.dtype)
        if ctx.backend == "reference" and torch.is_grad_enabled():
            gradients = _differentiable_gradients(grad_y, grad_last_state, call)
        else:
            gradients = _SCAN_BACKWARD(
                grad_y, grad_last_state, *operands, *ctx.settings, initial_state, states, ctx.backend, orders
            )
        *of_operands, of_initial = (
            None if operand is None else gradient
            for gradient, operand in zip(gradients, call.tensors, strict=True)
        )
        after = (None,) * (ctx.n_arguments - 11)  # out_dtype, backend, orders
        return (None, *of_operands, None, None, of_initial, *after)


def _differentiable_gradients(grad_y: Tensor, grad_last_state: Tensor | None, call: Operands) -> Gradients:
    """The gradients by autograd through the reference, so that they can be differentiated in turn."""
    y, last_state, _ = reference.forward(call)
    places = [i for i, t in enumerate(call.tensors) if t is not None and t.requires_grad]
    outputs, grad_outputs = [y], [grad_y.to(y.dtype)]
    if grad_last_state is not None:
        outputs, grad_outputs = [y, last_state], [*grad_outputs, grad_last_state]
    inputs = [t for t in call.tensors if t is not None and t.requires_grad]
    computed = torch.autograd.grad(outputs, inputs, grad_outputs, create_graph=True, allow_unused=True)
    gradients: list[Tensor | None] = [None] * len(call.tensors)
    for place, gradient in zip(places, computed, strict=True):
        gradients[place] = gradient
    return tuple(gradients)  # type: ignore[return-value]


def _autograd_of_backward(keys: Any, *arguments: Any) -> tuple[Tensor, ...]:
    """The backward operator's kernel for the Autograd key: its derivative raises instead of being dropped."""
    if is_transformed(arguments):
        raise RuntimeError(
            "selective_scan_2d: its gradient is differentiated by torch.func or by forward mode, but the "
            "scan itself ran outside of that transform; run the scan inside of the transformed function"
        )
    if _needs_gradient(arguments):
        return _Gradient.apply(keys, *arguments)
    return call_below_autograd(_SCAN_BACKWARD, keys, arguments)


class _Gradient(torch.autograd.Function):
    """The gradient, whose own derivative raises."""

    @staticmethod
    def forward(ctx: Any, keys: Any, *arguments: Any) -> tuple[Tensor, ...]:
        return call_below_autograd(_SCAN_BACKWARD, keys, arguments)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        raise RuntimeError(
            "selective_scan_2d: second derivatives exist in the backend 'reference' and under torch.func; "
            "run the forward with backend='reference' or inside vmamba.ops.use_backend('reference'), or "
            "use torch.func.grad, jvp or hessian"
        )


def _vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    """`torch.vmap`: folds the mapped dimension into the images if no parameter has it, else loops over it."""
    per_image = (0, 1, 3, 4, 10)  # x, delta, B, C, initial_state
    if any(isinstance(dim, int) for place, dim in enumerate(in_dims) if place not in per_image):
        return _one_by_one(_SCAN, info.batch_size, in_dims, arguments)
    folded = list(arguments)
    for place in per_image:
        t, dim = arguments[place], in_dims[place]
        if t is not None:
            t = t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            folded[place] = t.flatten(0, 1)
    images = (info.batch_size, folded[0].shape[0] // info.batch_size)
    with no_proof():
        return tuple(t.unflatten(0, images) for t in _SCAN(*folded)), (0, 0, 0)


def _vmap_of_backward(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    """Loops: gradients of parameters sum over images, so folding would add up the mapped elements."""
    return _one_by_one(_SCAN_BACKWARD, info.batch_size, in_dims, arguments)


def _one_by_one(
    operator: Any, size: int, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    def of(i: int) -> list[Any]:
        pairs = zip(arguments, in_dims, strict=True)
        return [a.select(dim, i) if isinstance(dim, int) else a for a, dim in pairs]

    with no_proof():
        outputs = [operator(*of(i)) for i in range(size)]
    stacked = tuple(torch.stack(each) for each in zip(*outputs, strict=True))
    return stacked, (0,) * len(stacked)


library.impl("selective_scan_2d", _forward, "CompositeExplicitAutograd")
library.impl("selective_scan_2d_backward", _backward, "CompositeExplicitAutograd")
library.impl("selective_scan_2d", _autograd, "Autograd", with_keyset=True)
library.impl("selective_scan_2d_backward", _autograd_of_backward, "Autograd", with_keyset=True)
torch.library.register_fake("vmamba::selective_scan_2d", _forward_fake, lib=library)
torch.library.register_fake("vmamba::selective_scan_2d_backward", _backward_fake, lib=library)
torch.library.register_vmap("vmamba::selective_scan_2d", _vmap, lib=library)
torch.library.register_vmap("vmamba::selective_scan_2d_backward", _vmap_of_backward, lib=library)
