"""Derivatives and vmap of the operator in every way that PyTorch has: right or an error, never silent zeros.

The truth is the decomposition, plain PyTorch, which `test_the_decomposition` compares with the reference.
"""

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, functional
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from scans import BACKENDS, PYTORCH_2_7, TENSORS, operands
from vmamba.ops import chunked, decomposition, selective_scan, selective_scan_2d, use_backend
from vmamba.ops.operands import Operands

# PyTorch scripts its own formulas when forward mode is used first.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node"),  # linearize's own
]

ALL = tuple(range(len(TENSORS)))
IMAGES = (0, 0, None, 0, 0, None, None, None)
"""The operands that belong to an image, as vmap's in_dims."""


def scan(*tensors: Tensor) -> Tensor:
    return selective_scan_2d(**dict(zip(TENSORS, tensors, strict=True)))


def plain(*tensors: Tensor) -> Tensor:
    return decomposition.scan(Operands(*tensors, True, [0, 1, 2, 3]))[0]


def loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *tensors: function(*tensors).square().sum()


def only(function: Callable[..., Tensor], *places: int) -> Callable[..., Tensor]:
    """The function of some of the operands, the others fixed."""

    fixed = values()

    def of_some(*chosen: Tensor) -> Tensor:
        tensors = list(fixed)
        for place, t in zip(places, chosen, strict=True):
            tensors[place] = t
        return function(*tensors)

    return of_some


def values(seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    call = operands(2, 3, 2, 3, n_state=2, rank=2, requires_grad=False)
    return [call[name] for name in TENSORS]


def tangents() -> list[Tensor]:
    return [torch.randn_like(t) for t in values(1)]


def assert_same(actual: Any, expected: Any) -> None:
    actual, expected = tree_leaves(actual), tree_leaves(expected)
    assert any(t.abs().max() > 0 for t in expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_decomposition(backend: str) -> None:
    call = [t.requires_grad_() for t in values()]
    y, last_state = decomposition.scan(Operands(*call, True, [0, 1, 2, 3]))
    actual, last_found, _ = torch.ops.vmamba.selective_scan_2d(*call, True, [0, 1, 2, 3], None, None, backend)
    assert_same((actual, last_found), (y, last_state))
    weights = torch.randn_like(y), torch.randn_like(last_state)
    assert_same(
        torch.autograd.grad((actual, last_found), call, weights),
        torch.autograd.grad((y, last_state), call, weights),
    )


def per_sample(f: Callable[..., Tensor]) -> Any:
    tensors = [t if dim is None else t[:, None] for t, dim in zip(values(), IMAGES, strict=True)]
    return vmap(grad(loss(f), ALL), IMAGES)(*tensors)


def through_vmap(f: Callable[..., Tensor]) -> Any:
    """The gradient of a parameter that all samples share."""
    x, A = torch.stack([values()[0]] * 2), values()[2]
    of_x_and_A = only(f, 0, 2)
    return grad(lambda A: vmap(lambda x: of_x_and_A(x, A))(x).square().sum())(A)


def samples_with_backward(f: Callable[..., Tensor]) -> Any:
    tensors = [t.requires_grad_() for t in values()]
    several = torch.stack([tensors[0], 2 * tensors[0]], -1)
    y = vmap(lambda x: f(x, *tensors[1:]), -1, -1)(several)
    return torch.autograd.grad(y.square().sum(), tensors)


def grads_batched(f: Callable[..., Tensor], create_graph: bool = False) -> Any:
    tensors = [t.requires_grad_() for t in values()]
    y = f(*tensors)
    grads = torch.randn(3, *y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))
    return torch.autograd.grad(y, tensors, grads, is_grads_batched=True, create_graph=create_graph)


def forward_over_reverse(f: Callable[..., Tensor]) -> Any:
    with forward_ad.dual_level():
        x = forward_ad.make_dual(values()[0].requires_grad_(), tangents()[0])
        (gradient,) = torch.autograd.grad(loss(only(f, 0))(x), x)
        return tuple(forward_ad.unpack_dual(gradient))


def ensemble(f: Callable[..., Tensor]) -> Any:
    """Parameters batched, images shared."""
    in_dims = tuple(0 if dim is None else None for dim in IMAGES)
    tensors = [
        t if dim is None else torch.stack([t, t * 0.9]) for t, dim in zip(values(), in_dims, strict=True)
    ]
    return vmap(f, in_dims)(*tensors), vmap(grad(loss(f), ALL), in_dims)(*tensors)


def grad_of_jvp(f: Callable[..., Tensor]) -> Any:
    directions = tuple(tangents())
    return grad(lambda *t: jvp(f, t, directions)[1].square().sum(), ALL)(*values())


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor]], Any]] = {
    "jvp": lambda f: jvp(f, tuple(values()), tuple(tangents())),
    "linearize": lambda f: linearize(f, *values())[1](*tangents()),
    "grad": lambda f: grad(loss(f), ALL)(*values()),
    "vjp": lambda f: vjp(f, *values())[1](tangents()[0]),
    "jacrev": lambda f: jacrev(only(f, 0, 2), (0, 1))(values()[0], values()[2]),
    "jacfwd": lambda f: jacfwd(only(f, 2, 6), (0, 1))(values()[2], values()[6]),
    "hessian": lambda f: hessian(loss(only(f, 2, 6)), (0, 1))(values()[2], values()[6]),
    "grad of grad": lambda f: grad(loss(grad(loss(f), 2)), ALL)(*values()),
    "jvp of grad": lambda f: jvp(grad(loss(f), ALL), tuple(values()), tuple(tangents())),
    "grad of jvp": grad_of_jvp,
    "vmap of grad": per_sample,
    "grad of vmap": through_vmap,
    "backward of vmap": samples_with_backward,
    "vmap of vmap": lambda f: vmap(vmap(only(f, 0)))(torch.stack([torch.stack([values()[0]] * 2)] * 3)),
    "ensemble": ensemble,
    "is_grads_batched": grads_batched,
    "is_grads_batched, create_graph": lambda f: grads_batched(f, create_graph=True),
    "forward over reverse": forward_over_reverse,
    "functional.jacobian": lambda f: functional.jacobian(only(f, 2), values()[2]),
    "functional.jacobian, vectorized": lambda f: functional.jacobian(only(f, 2), values()[2], vectorize=True),
    "functional.jacobian, forward": lambda f: functional.jacobian(
        only(f, 2), values()[2], vectorize=True, strategy="forward-mode"
    ),
    "functional.hessian, forward": lambda f: functional.hessian(
        loss(only(f, 2)), values()[2], vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "functional.vjp": lambda f: functional.vjp(f, tuple(values()), tangents()[0]),
    "functionalize": lambda f: torch.func.functionalize(grad(loss(f), ALL))(*values()),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_is_as_in_plain_pytorch(name: str) -> None:
    assert_same(TRANSFORMS[name](scan), TRANSFORMS[name](plain))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["jvp", "vmap of grad", "backward of vmap", "is_grads_batched", "ensemble"])
def test_on_each_backend(name: str, backend: str) -> None:
    with use_backend(backend):
        actual = TRANSFORMS[name](scan)
    assert_same(actual, TRANSFORMS[name](plain))


def test_jvp_of_a_linear_function_is_the_function() -> None:
    x = values()[0]
    assert_same(jvp(only(scan, 0), (x,), (x,))[1], scan(*values()))


@pytest.mark.parametrize("place", ALL, ids=TENSORS)
@pytest.mark.parametrize("with_grad", [True, False])
def test_a_dual_tensor_of_any_operand(place: int, with_grad: bool) -> None:
    def tangent(f: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        tensors = values()
        with torch.set_grad_enabled(with_grad), forward_ad.dual_level():
            tensors[place] = forward_ad.make_dual(tensors[place], tangents()[place])
            primal, tangent = forward_ad.unpack_dual(f(*tensors))
            return primal.clone(), tangent.clone()

    assert_same(tangent(scan), tangent(plain))


@pytest.mark.parametrize("place", ALL, ids=TENSORS)
@pytest.mark.parametrize("last", [False, True])
def test_vmap_over_any_operand(place: int, last: bool) -> None:
    tensors = values()
    dim = tensors[place].ndim if last else 0
    variants = [tensors[place] * factor for factor in (1.0, 1.1, 0.9)]
    in_dims = tuple(dim if i == place else None for i in ALL)
    batched = [torch.stack(variants, dim) if i == place else t for i, t in enumerate(tensors)]
    expected = [scan(*(v if i == place else t for i, t in enumerate(tensors))) for v in variants]
    assert_same(vmap(scan, in_dims)(*batched), torch.stack(expected))


def test_vmap_over_images_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    forward = chunked.BACKEND.forward
    monkeypatch.setitem(
        chunked.BACKEND.__dict__, "forward", lambda call: calls.append(call.x.shape) or forward(call)
    )
    with use_backend("chunked"):
        vmap(only(scan, 0))(torch.stack([values()[0]] * 5))
    assert calls == [(10, 3, 2, 3)]


def test_in_one_dimension() -> None:
    """With groups, gate and last state, against central differences; and a gradient of each sample."""
    torch.manual_seed(0)
    shapes = [(2, 6, 9), (2, 6, 9), (6, 2), (2, 2, 2, 9), (2, 2, 2, 9), (6,), (2, 6, 9), (6,)]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    tensors[2] = -tensors[2].abs()
    direction = [torch.randn_like(t) for t in tensors]

    def f(*tensors: Tensor) -> Any:
        return selective_scan(*tensors, delta_softplus=True, return_last_state=True)

    step = 1e-6
    above, below = (f(*(t + s * d for t, d in zip(tensors, direction, strict=True))) for s in (step, -step))
    for tangent, up, down in zip(jvp(f, tuple(tensors), tuple(direction))[1], above, below, strict=True):
        torch.testing.assert_close(tangent, (up - down) / (2 * step), rtol=1e-6, atol=1e-7)

    in_dims = tuple(0 if t.ndim > 2 else None for t in tensors)

    def total(*tensors: Tensor) -> Tensor:
        y, last_state = f(*(t[None] if t.ndim in (2, 3) and t.shape[-1] == 9 else t for t in tensors))
        return y.square().sum() + last_state.square().sum()

    places = tuple(range(len(tensors)))
    actual = vmap(grad(total, places), in_dims)(*tensors)
    for i in range(2):
        samples = [t[i] if dim == 0 else t for t, dim in zip(tensors, in_dims, strict=True)]
        leaves = [t.clone().requires_grad_() for t in samples]
        assert_same([t[i] for t in actual], torch.autograd.grad(total(*leaves), leaves))


@pytest.mark.parametrize("kind", ["dual", "jvp"])
def test_a_gradient_that_left_its_scan_outside_raises(kind: str) -> None:
    """Its tangent would be lost."""
    x = values()[0].requires_grad_()
    y = only(scan, 0)(x)

    def gradient(grad_y: Tensor) -> Tensor:
        return torch.autograd.grad(y, x, grad_y, retain_graph=True)[0]

    def in_forward_mode(v: Tensor) -> Tensor:
        with forward_ad.dual_level():
            return gradient(forward_ad.make_dual(v, v))

    v = torch.ones_like(y)
    with pytest.raises(RuntimeError, match="run the scan inside of the transformed function"):
        jvp(gradient, (v,), (v,)) if kind == "jvp" else in_forward_mode(v)


@pytest.mark.parametrize(
    "second",
    [
        lambda f, t: functional.hessian(lambda A: f(t[0], t[1], A, *t[3:]).square().sum(), t[2]),
        lambda f, t: functional.hvp(loss(f), tuple(t), tuple(t)),
        lambda f, t: functional.jvp(f, tuple(t), tuple(t)),
    ],
)
def test_a_second_derivative_by_backward(second: Callable[..., Any]) -> None:
    """Right on the reference, an error elsewhere."""
    with use_backend("reference"):
        assert_same(second(scan, values()), second(plain, values()))
    with use_backend("chunked"), pytest.raises(RuntimeError, match="second derivatives exist in the backend"):
        second(scan, values())


@pytest.mark.parametrize("name", ["jvp", "grad"])
def test_a_transform_checks_the_call(name: str) -> None:
    def wrong(*tensors: Tensor) -> Tensor:
        return scan(*(t[:1] if i == 2 else t for i, t in enumerate(tensors)))

    with pytest.raises(ValueError, match="A: expected"):
        TRANSFORMS[name](wrong)
    with pytest.raises(ValueError, match="there is no 'nosuch'"):
        TRANSFORMS[name](lambda *t: selective_scan_2d(**dict(zip(TENSORS, t, strict=True)), backend="nosuch"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing_under_a_transform(dtype: torch.dtype) -> None:
    expected = TRANSFORMS["grad"](scan)
    with torch.autocast("cpu", dtype):
        actual = TRANSFORMS["grad"](scan)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("name", ["jvp", "vmap of grad"])
def test_compiles_without_a_break(name: str) -> None:
    torch.compiler.reset()
    tensors = values()
    if name == "jvp":
        f = lambda *t: jvp(scan, t, t)[1]  # noqa: E731
    else:
        tensors = [t if dim is None else t[:, None] for t, dim in zip(tensors, IMAGES, strict=True)]
        f = vmap(grad(loss(scan), ALL), IMAGES)
    # 2.7: Inductor gives wrong numbers here, and for a tangent of index_add alone.
    compiler = "aot_eager" if PYTORCH_2_7 else "inductor"
    assert_same(torch.compile(f, fullgraph=True, backend=compiler)(*tensors), f(*tensors))


class Scan(torch.nn.Module):
    """A call as a model makes it: the operator itself, by position."""

    routes: list[int]

    def __init__(self) -> None:
        super().__init__()
        self.routes = [0, 1, 2, 3]

    def forward(self, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, weight: Tensor) -> Tensor:
        y, _, _ = torch.ops.vmamba.selective_scan_2d(
            x, delta, A, B, C, None, None, weight, True, self.routes, None, None, None
        )
        return y


def test_torchscript_fx_and_checkpointing() -> None:
    tensors = [t.requires_grad_() for t in values()]
    inputs = [*tensors[:5], tensors[7]]
    module = Scan()
    expected = module(*inputs)
    gradients = torch.autograd.grad(expected.square().sum(), inputs)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(module), file)
    file.seek(0)
    scripted, traced = torch.jit.load(file), torch.fx.symbolic_trace(module)
    for other in (scripted, traced, partial(checkpoint, module, use_reentrant=False)):
        y = other(*inputs)
        assert torch.equal(y, expected)
        for a, b in zip(torch.autograd.grad(y.square().sum(), inputs), gradients, strict=True):
            assert torch.equal(a, b)
        # TorchScript has no tangents, and checkpoint has none in 2.7.
        has_tangents = other is traced or (other is not scripted and not PYTORCH_2_7)
        if has_tangents:
            actual, right = (jvp(f, tuple(inputs), tuple(inputs))[1] for f in (other, module))
            assert_same(actual, right)
    with forward_ad.dual_level():
        y = scripted(forward_ad.make_dual(inputs[0].detach(), inputs[0].detach()), *inputs[1:])
        assert_same(forward_ad.unpack_dual(y).tangent, expected)
