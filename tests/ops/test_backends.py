"""What every backend must do: the contract of `selective_scan_2d`."""

import zlib

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from scans import BACKENDS, FAST, assert_accurate, cast, given, operands, value_and_gradients
from vmamba.ops import chunked, cross_merge, cross_scan, selective_scan_2d
from vmamba.ops.routes import CROSS
from vmamba.ops.triton import interpreted

routes_drawn = st.one_of(
    st.sampled_from(["cross", "unidirectional", "bidirectional"]),
    st.lists(st.sampled_from(CROSS), min_size=1, max_size=5).map(tuple),
)


def closed_form(call: dict) -> torch.Tensor:
    """The recurrence written out (section 3, without division), by the materialised routes.

    y_i = Σ_{j≤i} Σ_n C_in B_jn exp(A_n (S_i - S_j)) δ_j x_j + D x_i, S the inclusive cumulated sum of δ.
    """
    routes = call["routes"]
    x, delta, B, C = (call[name] for name in ("x", "delta", "B", "C"))
    if call["delta_weight"] is not None:
        delta = torch.einsum("bhwkr,kdr->bhwkd", delta, call["delta_weight"])
    if call["delta_bias"] is not None:
        delta = delta + call["delta_bias"]
    n_routes = delta.shape[3]
    take = torch.arange(n_routes)

    def along(t: torch.Tensor) -> torch.Tensor:  # (b, h, w, k, ·) → (b, k, l, ·), each route its own
        return torch.stack([cross_scan(t[..., k, :], routes)[:, k] for k in take], 1)

    u, d, b, c = cross_scan(x, routes), torch.nn.functional.softplus(along(delta)), along(B), along(C)
    S = d.cumsum(2)
    gap = S[:, :, :, None] - S[:, :, None]  # (b, k, i, j, d)
    decay = torch.exp(gap[..., None] * call["A"][:, None, None])
    decay = decay * torch.ones(gap.shape[2:4], dtype=x.dtype).tril()[:, :, None, None]
    y = torch.einsum("bkin,bkjn,bkijdn,bkjd->bkid", c, b, decay, d * u)
    if call["D"] is not None:
        y = y + u * call["D"][:, None]
    return cross_merge(y, x.shape[1:3], routes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("routes", ["cross", "bidirectional", ("column_reversed", "row", "column")])
@pytest.mark.parametrize("rank", [None, 2])
def test_equals_the_closed_form(backend: str, routes, rank: int | None) -> None:
    call = operands(routes=routes, rank=rank)
    torch.testing.assert_close(
        selective_scan_2d(**call, backend=backend), closed_form(call), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("backend", FAST)
@drawn(
    batch=st.integers(0, 3),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    channels=st.integers(1, 9),
    n_state=st.sampled_from([1, 2, 3, 16]),
    rank=st.sampled_from([None, 1, 6]),
    routes=routes_drawn,
    skip=st.booleans(),
    bias=st.booleans(),
)
def test_float32_is_as_accurate_as_the_reference(backend: str, **shape) -> None:
    torch.manual_seed(zlib.crc32(repr(sorted(shape.items())).encode()))
    # Of few values, or of few sums over all positions (the gradient of D: one a channel), the error is luck.
    small = shape["height"] * shape["width"] * shape["channels"] < 100 or shape["channels"] < 4
    calls = [operands(**shape, dtype=torch.float32) for _ in range(16 if small else 1)]
    assert_accurate(*calls, backend=backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("out_dtype", [None, torch.float32])
def test_half_precision_in_and_out(backend: str, dtype: torch.dtype, out_dtype: torch.dtype | None) -> None:
    call = cast(operands(height=9, width=11, channels=8, n_state=4), dtype)
    assert selective_scan_2d(**call, backend=backend, out_dtype=out_dtype).dtype == (out_dtype or dtype)
    assert_accurate(call, backend=backend, out_dtype=out_dtype)


@pytest.mark.parametrize("backend", FAST)
def test_float64_equals_the_reference(backend: str) -> None:
    call = operands(height=13, width=17, channels=6, n_state=3)
    grad_y = torch.randn_like(call["x"])
    actual = value_and_gradients(call, grad_y, backend=backend)
    for name, expected in value_and_gradients(call, grad_y, backend="reference").items():
        largest = expected.abs().max().item()
        torch.testing.assert_close(actual[name], expected, rtol=1e-12, atol=1e-12 * largest)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rank", "delta_softplus"), [(2, True), (None, True), (None, False)])
def test_gradcheck(backend: str, rank: int | None, delta_softplus: bool) -> None:
    call = operands(batch=2, height=2, width=3, channels=2, n_state=2, rank=rank)
    if not delta_softplus:
        call["delta"] = call["delta"].detach().abs().requires_grad_()
    names, tensors = zip(*given(call).items(), strict=True)
    torch.autograd.gradcheck(
        lambda *values: selective_scan_2d(
            **{**call, **dict(zip(names, values, strict=True))},
            delta_softplus=delta_softplus,
            backend=backend,
        ),
        tensors,
        fast_mode=backend == "triton" and interpreted(),  # by one direction, where each call takes long
    )


def test_second_derivatives_of_the_reference() -> None:
    routes = ("row", "column_reversed")
    call = operands(batch=1, height=2, width=2, channels=1, n_state=2, rank=1, routes=routes)
    names, tensors = zip(*given(call).items(), strict=True)
    torch.autograd.gradgradcheck(
        lambda *values: selective_scan_2d(
            **{**call, **dict(zip(names, values, strict=True))}, backend="reference"
        ),
        tensors,
    )


@pytest.mark.parametrize("backend", FAST)
def test_second_derivatives_elsewhere_raise(backend: str) -> None:
    call = operands()
    (gradient,) = torch.autograd.grad(
        selective_scan_2d(**call, backend=backend).square().sum(), [call["x"]], create_graph=True
    )
    with pytest.raises(RuntimeError, match="second derivatives exist in the backend 'reference'"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@drawn(height=st.integers(1, 9), width=st.integers(1, 9), k=st.integers(0, 3), data=st.data())
def test_a_route_is_causal(backend: str, height: int, width: int, k: int, data) -> None:
    """What comes later on the route changes nothing before it."""
    call = operands(1, height, width, 2, routes=(CROSS[k],), requires_grad=False)
    t = data.draw(st.integers(0, height * width - 1))
    order = cross_scan(torch.arange(height * width).view(1, height, width, 1), call["routes"])[0, 0, :, 0]
    changed = {
        **call,
        "x": call["x"].flatten(1, 2).index_fill(1, order[t:], 3.0).unflatten(1, (height, width)),
    }
    before = selective_scan_2d(**call, backend=backend).flatten(1, 2)[:, order[:t]]
    after = selective_scan_2d(**changed, backend=backend).flatten(1, 2)[:, order[:t]]
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_in_x(backend: str) -> None:
    call = operands(requires_grad=False)
    other = torch.randn_like(call["x"])
    y = selective_scan_2d(**call, backend=backend) * 2 + selective_scan_2d(
        **{**call, "x": other}, backend=backend
    )
    torch.testing.assert_close(
        selective_scan_2d(**{**call, "x": 2 * call["x"] + other}, backend=backend), y, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_turning_the_image_turns_the_result(backend: str) -> None:
    """The four routes of "cross" go over into each other under a transpose and under a half turn."""
    call = operands(requires_grad=False)
    y = selective_scan_2d(**call, backend=backend)
    for swap, turn in (
        ([1, 0, 3, 2], lambda t: t.transpose(1, 2)),
        ([2, 3, 0, 1], lambda t: t.flip(1, 2)),
    ):
        turned = {name: call[name][swap] for name in ("A", "D", "delta_bias", "delta_weight")}
        turned |= {name: turn(call[name])[:, :, :, swap] for name in ("delta", "B", "C")}
        actual = selective_scan_2d(turn(call["x"]), **turned, routes="cross", backend=backend)
        torch.testing.assert_close(turn(actual), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("elements", [1, 2**8, 2**12, 2**30])
def test_the_chunk_changes_nothing(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    call = operands(batch=3, height=15, width=14, channels=4)
    grad_y = torch.randn_like(call["x"])
    expected = value_and_gradients(call, grad_y, backend="reference")
    monkeypatch.setattr(chunked, "CPU_CHUNK", elements)
    for name, actual in value_and_gradients(call, grad_y, backend="chunked").items():
        torch.testing.assert_close(actual, expected[name], rtol=1e-11, atol=1e-11)


def long_and_steep(side: int) -> dict:
    """So many steps, squared, with δA from 0 down to -1e4 a step."""
    call = operands(1, side, side, 2, n_state=2, rank=None, routes=("row",), bias=False, dtype=torch.float32)
    call["delta"] = (4 * torch.randn_like(call["delta"])).requires_grad_()
    call["A"] = (-torch.tensor([[[0.0, 1e-6], [1.0, 1e3]]])).requires_grad_()
    assert torch.nn.functional.softplus(call["delta"]).max() * 1e3 > 1e4
    return call


@pytest.mark.parametrize("backend", FAST)
def test_long_and_steep(backend: str) -> None:
    call = long_and_steep(64 if interpreted() else 128)
    y = selective_scan_2d(**call, backend=backend)
    with torch.no_grad():
        true = selective_scan_2d(**cast(call, torch.float64), backend="reference")
        reference = selective_scan_2d(**call, backend="reference")
    largest = true.abs().max()
    allowed = 2 * (reference - true).abs().max() + 4 * torch.finfo(torch.float32).eps * largest
    assert (y - true).abs().max() <= allowed
    y.square().sum().backward()
    assert all(t.grad.isfinite().all() for t in given(call).values())


@pytest.mark.slow
@pytest.mark.parametrize("backend", FAST)
def test_long_and_steep_gradients(backend: str) -> None:
    assert_accurate(long_and_steep(64 if interpreted() else 256), backend=backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", ["x", "delta", "B", "C"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_stay_where_the_reference_has_them(backend: str, name: str, value: float) -> None:
    call = operands(1, 9, 9, 3, n_state=2, rank=None, routes=("row", "column"), requires_grad=False)
    call[name][0, 4, 4, ..., 1] = value
    call["delta_bias"] = None
    actual = selective_scan_2d(**call, backend=backend)
    expected = selective_scan_2d(**call, backend="reference")
    assert torch.equal(actual.isfinite(), expected.isfinite())
    finite = expected.isfinite()
    torch.testing.assert_close(actual[finite], expected[finite], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", FAST)
def test_any_strides(backend: str) -> None:
    call = operands(height=6, width=7, requires_grad=False)
    expected = selective_scan_2d(**call, backend=backend)
    strided = dict(call)
    for name in ("x", "delta", "B", "C"):
        t = call[name]
        strided[name] = torch.stack((t, t), -1).transpose(1, 2).contiguous().transpose(1, 2)[..., 0]
    strided["A"] = call["A"].transpose(0, 2).contiguous().transpose(0, 2)
    strided["D"] = call["D"].t().contiguous().t()
    assert not any(strided[name].is_contiguous() for name in ("x", "delta", "B", "C", "A", "D"))
    torch.testing.assert_close(
        selective_scan_2d(**strided, backend=backend), expected, rtol=1e-13, atol=1e-13
    )
    expanded = {**call, "B": call["B"][:1, :1, :1].expand_as(call["B"])}
    torch.testing.assert_close(
        selective_scan_2d(**expanded, backend=backend),
        selective_scan_2d(**{**expanded, "B": expanded["B"].contiguous()}, backend=backend),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_types_may_differ(backend: str) -> None:
    call = cast(operands(), torch.float32)
    mixed = {
        **call,
        "x": call["x"].detach().bfloat16().requires_grad_(),
        "B": call["B"].detach().half().requires_grad_(),
    }
    y = selective_scan_2d(**mixed, backend=backend)
    assert y.dtype == torch.bfloat16
    widened = {**mixed, "x": mixed["x"].float(), "B": mixed["B"].float()}
    torch.testing.assert_close(
        y, selective_scan_2d(**widened, backend="reference").bfloat16(), rtol=1e-2, atol=1e-2
    )
    y.float().sum().backward()
    assert {name: t.grad.dtype for name, t in given(mixed).items()} == {
        name: t.dtype for name, t in given(mixed).items()
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(backend: str, dtype: torch.dtype) -> None:
    call = cast(operands(), torch.float32)
    grad_y = torch.randn_like(call["x"])
    expected = value_and_gradients(call, grad_y, backend=backend)
    with torch.autocast("cpu", dtype):
        actual = value_and_gradients(call, grad_y, backend=backend)
    for name in expected:
        assert torch.equal(actual[name], expected[name])


@pytest.mark.parametrize(("n_state", "size"), [(1, 48), (16, 48), (32, 56)])
def test_chunked_keeps_within_its_memory(n_state: int, size: int) -> None:
    """Beyond inputs and outputs, forward and backward: at most 4 float32 for each of (b, l, k, d)."""
    call = operands(1, size, size, 32, n_state, 2, dtype=torch.float32)
    torch.use_deterministic_algorithms(False)
    limit = 4 * 4 * size**2 * 4 * 32
    outputs = 4 * size**2 * 32
    gradients = sum(4 * t.numel() for t in given(call).values())
    selective_scan_2d(**call, backend="chunked").sum().backward()  # what is allocated once
    y = None
    for t in given(call).values():
        t.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as forward:
        y = selective_scan_2d(**call, backend="chunked")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as backward:
        y.backward(torch.ones_like(y))
    for run, result_bytes in ((forward, outputs), (backward, outputs + gradients)):
        held = peak = 0
        for event in run.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        assert 0 < peak - result_bytes <= limit


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 4), (1, 1, 1), (2, 1, 9), (2, 9, 1)])
def test_edge_shapes(backend: str, shape: tuple[int, int, int]) -> None:
    call = operands(*shape)
    y = selective_scan_2d(**call, backend=backend)
    assert y.shape == call["x"].shape
    y.sum().backward()
    assert all(t.grad.shape == t.shape and t.grad.isfinite().all() for t in given(call).values())
