"""The operator as PyTorch sees it, its validation, the choice of a backend, and the 1D form."""

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from scans import BACKENDS, given, operands, value_and_gradients
from vmamba.errors import UserError
from vmamba.ops import (
    BackendError,
    BackendWarning,
    UnknownBackendError,
    _registry,
    backends,
    default_backend,
    flops,
    reference,
    register_route,
    selective_scan,
    selective_scan_2d,
    use_backend,
)
from vmamba.ops.backend import Backend
from vmamba.ops.operands import Operands


def positional(call: dict, backend: str | None = None) -> tuple:
    names = ("x", "delta", "A", "B", "C", "D", "delta_bias", "delta_weight")
    return (*(call[name] for name in names), True, [0, 1, 2, 3], None, None, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
def test_opcheck(backend: str, rank: int | None) -> None:
    torch.use_deterministic_algorithms(False)  # what the check compares includes memory never written
    call = operands(batch=2, height=3, width=2, rank=rank, skip=rank is None)
    torch.library.opcheck(torch.ops.vmamba.selective_scan_2d.default, positional(call, backend))
    y, last, states = torch.ops.vmamba.selective_scan_2d(*positional(call, backend))
    torch.library.opcheck(
        torch.ops.vmamba.selective_scan_2d_backward.default,
        (
            torch.randn_like(y),
            torch.randn_like(last),
            *(t if t is None else t.detach() for t in positional(call)[:8]),
            True,
            [0, 1, 2, 3],
            None,
            states.detach(),
            backend,
        ),
    )


def test_compiles_without_a_break() -> None:
    call = operands(height=5, width=7, dtype=torch.float32)
    grad_y = torch.randn_like(call["x"])
    expected = value_and_gradients(call, grad_y)
    torch.compiler.reset()
    y = torch.compile(lambda **kw: selective_scan_2d(**kw), fullgraph=True)(**call)
    gradients = torch.autograd.grad(y, list(given(call).values()), grad_y)
    torch.testing.assert_close(y, expected["y"])
    for name, gradient in zip(given(call), gradients, strict=True):
        torch.testing.assert_close(gradient, expected[name])


CASES = [
    ({"x": torch.zeros(2, 3, 5)}, ValueError, r"x: expected \(b, h, w, d\)"),
    ({"x": torch.zeros(2, 3, 5, 4, dtype=torch.int64)}, TypeError, "x: expected float16.*got torch.int64"),
    ({"delta": torch.zeros(2, 3, 5, 4, 7)}, ValueError, r"delta: expected \(b, h, w, k, r\)"),
    (
        {"A": torch.zeros(4, 5, 2)},
        ValueError,
        r"A: expected \(k, d, n\) = \(4, 4, 2\), got shape \(4, 5, 2\)",
    ),
    ({"A": torch.zeros(4, 2)}, ValueError, r"A: expected \(k, d, n\)"),
    ({"B": torch.zeros(2, 5, 3, 4, 2)}, ValueError, r"B: expected \(b, h, w, k, n\)"),
    ({"C": torch.zeros(2, 3, 5, 4, 3)}, ValueError, r"C: expected \(b, h, w, k, n\)"),
    ({"D": torch.zeros(4)}, ValueError, r"D: expected \(k, d\)"),
    ({"D": torch.zeros(4, 4, dtype=torch.complex64)}, TypeError, "D: expected float16"),
    ({"delta_bias": torch.zeros(4, 1)}, ValueError, r"delta_bias: expected \(k, d\)"),
    ({"delta_weight": torch.zeros(4, 4)}, ValueError, r"delta_weight: expected \(k, d, r\)"),
    ({"B": torch.zeros(2, 3, 5, 4, 2, device="meta")}, ValueError, "B: expected on cpu as x is, got meta"),
    ({"routes": "spiral"}, ValueError, "routes: unknown name 'spiral'"),
    ({"routes": ("row", "row")}, ValueError, "delta: expected.*there are k = 2 routes"),
    ({"out_dtype": torch.int8}, TypeError, "out_dtype: expected float16"),
    ({"backend": "cuda"}, ValueError, "backend: there is no 'cuda'; expected one of 'cpu', 'triton'"),
    ({"x": torch.zeros(2, 0, 5, 4)}, ValueError, "h, w, d and n of at least 1|expected"),
]


@pytest.mark.parametrize(("change", "error", "message"), CASES)
def test_bad_calls_name_the_argument(change: dict, error: type[Exception], message: str) -> None:
    call = operands(dtype=torch.float32, requires_grad=False)
    with pytest.raises(error, match=message):
        selective_scan_2d(**{**call, **change})
    if "backend" not in change and "routes" not in change:
        on_meta = {
            name: t.to("meta") if isinstance(t, torch.Tensor) else t for name, t in {**call, **change}.items()
        }
        if "got meta" not in message:
            with pytest.raises(error, match=message):
                selective_scan_2d(**on_meta)


def replaced(name: str, called: list[str], **changes: Any) -> Backend:
    """The reference under another name, which notes what is called of it."""

    def noted(function: Any, what: str) -> Any:
        return lambda *args: called.append(what) or function(*args)

    return Backend(
        name,
        "",
        noted(reference.forward, "forward"),
        noted(reference.backward, "backward"),
        **changes,
    )


def test_use_backend_holds_for_the_backward_too(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setitem(_registry._BACKENDS, "recorded", replaced("recorded", called))
    with use_backend("recorded"):
        y = selective_scan_2d(**operands())
    y.sum().backward()
    assert called == ["forward", "backward"]


def test_a_preferred_backend_is_chosen_and_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    why: list[str | None] = [None]
    called: list[str] = []
    fast = replaced(
        "fast",
        called,
        why_not_here=lambda: why[0],
        why_not=lambda call: "n is at most 2" if call.n_state > 2 else None,
        preferred_on=("cpu",),
    )
    slow = {name: _registry._BACKENDS[name] for name in ("chunked", "reference")}
    monkeypatch.setattr(_registry, "_BACKENDS", {"fast": fast, **slow})
    call = operands(requires_grad=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        selective_scan_2d(**call)
    assert called == ["forward"]
    assert default_backend("cpu") == "fast"
    assert default_backend("cpu", n_state=3) == "chunked"
    with pytest.warns(BackendWarning, match="slower 'chunked', not on 'fast': n is at most 2"):
        selective_scan_2d(**operands(n_state=3))
    why[0] = "it is not built; install a wheel"
    with pytest.warns(BackendWarning, match="not built; install a wheel"):
        selective_scan_2d(**call)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # each reason is told once
        selective_scan_2d(**call)
    assert called == ["forward"]
    with pytest.raises(RuntimeError, match="'fast' cannot serve this call: it is not built"):
        selective_scan_2d(**call, backend="fast")
    with pytest.raises(RuntimeError, match="'fast' cannot run here: it is not built"), use_backend("fast"):
        pass
    assert {status.name: status.reason for status in backends()}["fast"] == why[0]
    assert default_backend("cpu") == "chunked"


def test_why_not_sees_the_whole_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes, types and routes, for tensors without data too."""
    seen: list[Operands] = []
    watching = replaced("watching", [], why_not=lambda call: seen.append(call), preferred_on=("cpu", "meta"))
    monkeypatch.setattr(
        _registry, "_BACKENDS", {"watching": watching, "chunked": _registry._BACKENDS["chunked"]}
    )
    call = operands(2, 3, 5, 4, 2, 3, ("row", "column"), dtype=torch.float32, requires_grad=False)
    on_meta = {name: t.to("meta") if isinstance(t, torch.Tensor) else t for name, t in call.items()}
    for each in (call, on_meta):
        seen.clear()
        selective_scan_2d(**each)
        assert seen[0].x.shape == (2, 3, 5, 4)
        assert (seen[0].n_routes, seen[0].n_state, seen[0].rank) == (2, 2, 3)
        assert (seen[0].routes, seen[0].state_dtype) == ([0, 1], torch.float32)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize(
    "routes", [("row", torch.arange(14, -1, -1)), ("row", "snake of the operator's test")]
)
def test_a_kernel_says_which_routes_it_serves(backend: str, routes: Any) -> None:
    """`triton` those of "cross", and raises for others; `cpu` any."""
    if routes[1] == "snake of the operator's test":
        register_route(routes[1], snake)
    status = {status.name: status for status in backends()}
    if not status[backend].available:
        pytest.skip(str(status[backend].reason))
    call = operands(routes=("row", "row"), requires_grad=False) | {"routes": routes}
    if backend == "cpu":
        expected = selective_scan_2d(**call, backend="reference")
        torch.testing.assert_close(selective_scan_2d(**call), expected)
        return
    with pytest.raises(BackendError, match="'triton' cannot serve this call: it reads along the routes"):
        selective_scan_2d(**call, backend=backend)


@pytest.mark.skipif(not backends()[0].available, reason=f"cpu: {backends()[0].reason}")
def test_a_call_that_the_kernel_cannot_serve() -> None:
    """Unnamed `chunked` serves it, with the one warning."""
    call = operands(n_state=65, requires_grad=False)
    _registry._WARNED.clear()
    with pytest.warns(BackendWarning, match="slower 'chunked', not on 'cpu': it takes a state size"):
        y = selective_scan_2d(**call)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once
        selective_scan_2d(**call)
    torch.testing.assert_close(y, selective_scan_2d(**call, backend="reference"))


def snake(height: int, width: int) -> list[int]:
    """Rows in turns from left to right and from right to left."""
    rows = torch.arange(height * width).view(height, width)
    rows[1::2] = rows[1::2].flip(1)
    return rows.flatten().tolist()


def test_backend_errors_are_the_users() -> None:
    """So that the command prints one line of them."""
    with pytest.raises(UnknownBackendError, match="there is no 'nosuch'; expected one of") as raised:
        selective_scan_2d(**operands(), backend="nosuch")
    assert isinstance(raised.value, UserError)
    assert isinstance(raised.value, ValueError)
    unavailable = [status for status in backends() if not status.available]
    for status in unavailable:
        message = f"'{status.name}' cannot run here"
        with pytest.raises(BackendError, match=message) as refused, use_backend(status.name):
            pass
        assert isinstance(refused.value, UserError)
        assert isinstance(refused.value, RuntimeError)


def test_backends_lists_all() -> None:
    actual = {status.name: status for status in backends()}
    assert list(actual)[:4] == ["cpu", "triton", "chunked", "reference"]
    assert actual["chunked"].available
    assert actual["reference"].available
    assert all(status.available == (status.reason is None) for status in actual.values())
    with pytest.raises(ValueError, match="there is no 'magic'"), use_backend("magic"):
        pass


def sequence(length: int = 37, groups: int = 1, channels: int = 3, n_state: int = 2) -> dict:
    width = groups * channels
    return {
        "u": torch.randn(2, width, length, dtype=torch.float64, requires_grad=True),
        "delta": torch.randn(2, width, length, dtype=torch.float64, requires_grad=True),
        "A": -torch.rand(width, n_state, dtype=torch.float64),
        "B": torch.randn(2, groups, n_state, length, dtype=torch.float64),
        "C": torch.randn(2, groups, n_state, length, dtype=torch.float64),
        "D": torch.randn(width, dtype=torch.float64),
        "z": torch.randn(2, width, length, dtype=torch.float64),
        "delta_bias": torch.randn(width, dtype=torch.float64),
    }


def by_hand(u, delta, A, B, C, D, z, delta_bias, h=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Mamba's reference semantics, per channel: its group is channel // (channels of a group)."""
    delta = torch.nn.functional.softplus(delta + delta_bias[:, None])
    B, C = (t.repeat_interleave(u.shape[1] // t.shape[1], 1) for t in (B, C))  # (b, g·d, n, l)
    h, ys = torch.zeros(*u.shape[:2], A.shape[1], dtype=u.dtype) if h is None else h, []
    for t in range(u.shape[2]):
        h = torch.exp(delta[:, :, t, None] * A) * h + (delta * u)[:, :, t, None] * B[..., t]
        ys.append((h * C[..., t]).sum(-1) + D * u[:, :, t])
    return torch.stack(ys, -1) * torch.nn.functional.silu(z), h


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [1, 3])
def test_1d_has_mambas_meaning(backend: str, groups: int) -> None:
    call = sequence(groups=groups)
    y, last = selective_scan(**call, delta_softplus=True, return_last_state=True, backend=backend)
    expected, h = by_hand(**call)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, h, rtol=1e-12, atol=1e-12)
    if groups == 1:
        flat = {**call, "B": call["B"][:, 0], "C": call["C"][:, 0]}
        torch.testing.assert_close(selective_scan(**flat, delta_softplus=True, backend=backend), y)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("constant", ["B", "C", "BC"])
@pytest.mark.parametrize("groups", [1, 3])
def test_1d_takes_a_constant_B_or_C_as_mamba_does(  # noqa: N802
    backend: str, constant: str, groups: int
) -> None:
    """(g·d, n): the same at every position, for each channel its own; with a carried state and gradients."""
    call = sequence(length=11, groups=groups)
    state = torch.randn(2, 3 * groups, 2, dtype=torch.float64, requires_grad=True)
    given = {name: torch.randn(3 * groups, 2, dtype=torch.float64, requires_grad=True) for name in constant}
    varying = {**call, **{name: t[None, ..., None].expand(2, -1, -1, 11) for name, t in given.items()}}
    y, last_state = selective_scan(
        **{**call, **given},
        delta_softplus=True,
        return_last_state=True,
        initial_state=state,
        backend=backend,
    )
    expected, h = by_hand(**varying, h=state)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last_state, h, rtol=1e-12, atol=1e-12)
    inputs = [call["u"], call["delta"], state, *given.values()]
    computed = torch.autograd.grad(y.square().sum() + last_state.sum(), inputs)
    for a, b in zip(computed, torch.autograd.grad(expected.square().sum() + h.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_1d_constant_in_half_precision() -> None:
    """The factor of each channel is not rounded to half precision on its way."""
    call = {name: t.detach().half() for name, t in sequence(length=11).items()}
    call["B"] = torch.rand(3, 2)
    y = selective_scan(**call, delta_softplus=True)
    wide = {name: t.double() for name, t in call.items()}
    expected = selective_scan(**wide, delta_softplus=True)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.double(), expected, rtol=2**-10, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@drawn(cut=st.integers(1, 200), groups=st.integers(1, 2))
def test_a_split_sequence_with_carried_state_is_the_whole(backend: str, cut: int, groups: int) -> None:
    torch.manual_seed(cut)
    call = sequence(length=201, groups=groups)
    parts = [
        {name: t[..., piece] if t.ndim > 2 else t for name, t in call.items()}
        for piece in (slice(0, cut), slice(cut, None))
    ]
    options = {"delta_softplus": True, "return_last_state": True, "backend": backend}
    whole, last = selective_scan(**call, **options)
    first, carried = selective_scan(**parts[0], **options)
    second, end = selective_scan(**parts[1], **options, initial_state=carried)
    torch.testing.assert_close(torch.cat((first, second), -1), whole, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(end, last, rtol=1e-11, atol=1e-11)
    inputs = [call["u"], call["delta"]]
    expected = torch.autograd.grad(whole.sum() + last.square().sum(), inputs)
    actual = torch.autograd.grad(first.sum() + second.sum() + end.square().sum(), inputs)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(2, 3)}, r"u: expected \(b, g·d, l\)"),
        ({"delta": torch.zeros(2, 3, 9)}, r"delta: expected"),
        ({"A": torch.zeros(3, 5)}, r"A: expected \(g·d, n\)"),
        ({"B": torch.zeros(2, 2, 2, 37)}, r"C: expected|divide"),
        ({"z": torch.zeros(2, 3, 1)}, r"z: expected"),
        ({"B": torch.zeros(3, 5)}, r"B: expected \(g·d, n\) = \(3, 2\)"),
        ({"C": torch.zeros(2, 2)}, r"C: expected \(g·d, n\) = \(3, 2\)"),
        ({"C": torch.zeros(2)}, r"C: expected .* or constant \(g·d, n\)"),
    ],
)
def test_1d_bad_calls(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**sequence(), **change})


@pytest.mark.parametrize("value", [-200.0, -30.0, -1.0, 0.0, 5.0, 39.9, 40.1, 100.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softplus_to_the_last_digits(value: float, dtype: torch.dtype) -> None:
    z = torch.tensor(value, dtype=dtype)
    expected = torch.nn.functional.softplus(torch.tensor(value, dtype=torch.float64), threshold=700)
    torch.testing.assert_close(
        reference.softplus(z).double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-43
    )


def test_flop_formula() -> None:
    call = operands(2, 3, 5, 4, n_state=2, rank=3, requires_grad=False)
    with FlopCounterMode(display=False) as counter:
        selective_scan_2d(**call)
    values = 2 * 3 * 5 * 4 * 4  # b·l·k·d
    assert counter.get_total_flops() == values * (7 * 2 + 2 + 2 * 3)
    assert flops.scan_macs((2, 3, 5, 4), 4, 2, rank=3) == values * (9 * 2 + 1 + 3)
    with pytest.raises(ValueError, match="counting"):
        flops.scan_macs((2, 3, 5, 4), 4, 2, counting="guess")
