"""The operator as PyTorch sees it, its validation, the choice of engine, and the 1D form."""

import warnings

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from scans import ENGINES, given, operands, value_and_gradients
from vmamba.ops import (
    BackendWarning,
    _registry,
    backends,
    chunked,
    flops,
    selective_scan,
    selective_scan_2d,
    use_backend,
)


def positional(call: dict, backend: str | None = None) -> tuple:
    names = ("x", "delta", "A", "B", "C", "D", "delta_bias", "delta_weight")
    return (*(call[name] for name in names), True, [0, 1, 2, 3], None, None, backend)


@pytest.mark.parametrize("backend", ENGINES)
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
            *(True, [0, 1, 2, 3], None, states.detach(), backend),
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
    ({"x": torch.zeros(2, 3, 5)}, ValueError, r"x: expected \(B, H, W, D\)"),
    ({"x": torch.zeros(2, 3, 5, 4, dtype=torch.int64)}, TypeError, "x: expected float16.*got torch.int64"),
    ({"delta": torch.zeros(2, 3, 5, 4, 7)}, ValueError, r"delta: expected \(B, H, W, K, R\)"),
    (
        {"A": torch.zeros(4, 5, 2)},
        ValueError,
        r"A: expected \(K, D, N\) = \(4, 4, 2\), got shape \(4, 5, 2\)",
    ),
    ({"A": torch.zeros(4, 2)}, ValueError, r"A: expected \(K, D, N\)"),
    ({"B": torch.zeros(2, 5, 3, 4, 2)}, ValueError, r"B: expected \(B, H, W, K, N\)"),
    ({"C": torch.zeros(2, 3, 5, 4, 3)}, ValueError, r"C: expected \(B, H, W, K, N\)"),
    ({"D": torch.zeros(4)}, ValueError, r"D: expected \(K, D\)"),
    ({"D": torch.zeros(4, 4, dtype=torch.complex64)}, TypeError, "D: expected float16"),
    ({"delta_bias": torch.zeros(4, 1)}, ValueError, r"delta_bias: expected \(K, D\)"),
    ({"delta_weight": torch.zeros(4, 4)}, ValueError, r"delta_weight: expected \(K, D, R\)"),
    ({"B": torch.zeros(2, 3, 5, 4, 2, device="meta")}, ValueError, "B: expected on cpu as x is, got meta"),
    ({"routes": "spiral"}, ValueError, "routes: unknown name 'spiral'"),
    ({"routes": ("row", "row")}, ValueError, "delta: expected.*there are K = 2 routes"),
    ({"out_dtype": torch.int8}, TypeError, "out_dtype: expected float16"),
    ({"backend": "cuda"}, ValueError, "backend: unknown engine 'cuda'; expected one of 'chunked'"),
    ({"x": torch.zeros(2, 0, 5, 4)}, ValueError, "H, W, D and N of at least 1|expected"),
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


def test_use_backend_holds_for_the_backward_too(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    engine = _registry._BACKENDS["reference"]
    recorded = _registry.Backend(
        "recorded",
        "",
        lambda *args: called.append("forward") or engine.forward(*args),
        lambda *args: called.append("backward") or engine.backward(*args),
    )
    monkeypatch.setitem(_registry._BACKENDS, "recorded", recorded)
    with use_backend("recorded"):
        y = selective_scan_2d(**operands())
    y.sum().backward()
    assert called == ["forward", "backward"]


def test_a_fast_engine_is_chosen_by_device_and_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    why: list[str | None] = [None]
    called = []
    engine = _registry._BACKENDS["reference"]
    fast = _registry.Backend(
        "fast",
        "",
        lambda *args: called.append(1) or engine.forward(*args),
        engine.backward,
        why_not_here=lambda: why[0],
        why_not=lambda device, n_state: "N is at most 2" if n_state > 2 else None,
        fast_on=("cpu",),
    )
    slow = {name: _registry._BACKENDS[name] for name in ("chunked", "reference")}
    monkeypatch.setattr(_registry, "_BACKENDS", {"fast": fast, **slow})
    call = operands(requires_grad=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        selective_scan_2d(**call)
    assert called == [1]
    with pytest.warns(BackendWarning, match="slower 'chunked', not on 'fast': N is at most 2"):
        selective_scan_2d(**operands(n_state=3))
    why[0] = "it is not built; install a wheel"
    with pytest.warns(BackendWarning, match="not built; install a wheel"):
        selective_scan_2d(**call)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # each reason is told once
        selective_scan_2d(**call)
    assert called == [1]
    with pytest.raises(RuntimeError, match="'fast' cannot serve this call: it is not built"):
        selective_scan_2d(**call, backend="fast")
    with pytest.raises(RuntimeError, match="'fast' cannot run here: it is not built"), use_backend("fast"):
        pass
    assert {status.name: status.reason for status in backends()}["fast"] == why[0]


def test_backends_lists_every_engine() -> None:
    found = {status.name: status for status in backends()}
    assert list(found) == ["chunked", "cpu", "reference", "triton"]
    assert found["chunked"].available
    assert found["reference"].available
    assert all(status.available == (status.reason is None) for status in found.values())
    with pytest.raises(ValueError, match="unknown engine 'magic'"), use_backend("magic"):
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


def by_hand(u, delta, A, B, C, D, z, delta_bias) -> tuple[torch.Tensor, torch.Tensor]:
    """Mamba's reference semantics, per channel: its group is channel // (channels of a group)."""
    delta = torch.nn.functional.softplus(delta + delta_bias[:, None])
    repeat = u.shape[1] // B.shape[1]
    B, C = B.repeat_interleave(repeat, 1), C.repeat_interleave(repeat, 1)  # (B, GD, N, L)
    h, ys = torch.zeros(*u.shape[:2], A.shape[1], dtype=u.dtype), []
    for t in range(u.shape[2]):
        h = torch.exp(delta[:, :, t, None] * A) * h + (delta * u)[:, :, t, None] * B[..., t]
        ys.append((h * C[..., t]).sum(-1) + D * u[:, :, t])
    return torch.stack(ys, -1) * torch.nn.functional.silu(z), h


@pytest.mark.parametrize("backend", ENGINES)
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


@pytest.mark.parametrize("backend", ENGINES)
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
    found = torch.autograd.grad(first.sum() + second.sum() + end.square().sum(), inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(2, 3)}, r"u: expected \(B, G·D, L\)"),
        ({"delta": torch.zeros(2, 3, 9)}, r"delta: expected"),
        ({"A": torch.zeros(3, 5)}, r"A: expected \(G·D, N\)"),
        ({"B": torch.zeros(2, 2, 2, 37)}, r"C: expected|divide"),
        ({"z": torch.zeros(2, 3, 1)}, r"z: expected"),
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
        chunked.softplus(z).double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-43
    )


def test_flop_formula() -> None:
    call = operands(2, 3, 5, 4, n_state=2, rank=3, requires_grad=False)
    with FlopCounterMode(display=False) as counter:
        selective_scan_2d(**call)
    values = 2 * 3 * 5 * 4 * 4  # B·L·K·D
    assert counter.get_total_flops() == values * (7 * 2 + 2 + 2 * 3)
    assert flops.scan_macs((2, 3, 5, 4), 4, 2, rank=3) == values * (9 * 2 + 1 + 3)
    with pytest.raises(ValueError, match="counting"):
        flops.scan_macs((2, 3, 5, 4), 4, 2, counting="guess")
