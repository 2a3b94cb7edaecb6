"""The backends on a GPU: `pytest -m gpu`."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from scans import cast, operands, value_and_gradients
from vmamba.nn import SS2D
from vmamba.ops import backends, prove_backend, selective_scan_2d, use_backend
from vmamba.ops.accuracy import deviations

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

SHAPES = [(2, 56, 56, 96, 1, 6), (2, 14, 14, 64, 1, 24), (3, 7, 7, 130, 1, 48), (1, 20, 33, 24, 16, 3)]
"""b, h, w, d, n, r: several tiles, one in forward, one in both, and channels that fill no block."""

TRUTH = "cpu" if backends()[0].available else "chunked"
"""In float64, on the CPU: the compiled kernel, but `chunked` in a plain checkout, which has none."""


@pytest.fixture(autouse=True)
def _any_algorithm() -> None:
    torch.use_deterministic_algorithms(False)  # cuBLAS refuses what a layer's products need


def on_gpu(call: dict) -> dict:
    return cast(call, device="cuda")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_accurate_as_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    exact = operands(*shape)
    true_call = cast(cast(exact, dtype), torch.float64)
    call = on_gpu(cast(exact, dtype))
    grad_y = torch.randn_like(true_call["x"]).to(dtype)
    true = value_and_gradients(true_call, grad_y.double(), backend=TRUTH)
    same_types = value_and_gradients(call, grad_y.cuda(), backend="reference")
    actual = value_and_gradients(call, grad_y.cuda(), backend="triton")
    for deviation in deviations([true], [same_types], [actual]):
        assert deviation.within, str(deviation)


def test_it_proves_itself() -> None:
    """As at first use: right, and faster than `chunked`. The verdict replaces the user's."""
    verdict = prove_backend("triton", "cuda").verdict
    assert verdict.is_proven, verdict.reason


def test_on_a_device_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    call = operands(2, 20, 33, 24, 1, 3, dtype=torch.float32)
    grad_y = torch.randn_like(call["x"])
    first, second = (
        value_and_gradients(cast(call, device=device), grad_y.to(device), backend="triton")
        for device in ("cuda:0", "cuda:1")
    )
    for name, expected in first.items():
        torch.testing.assert_close(second[name].cpu(), expected.cpu())


def test_the_same_bits_each_time() -> None:
    call = on_gpu(operands(4, 56, 56, 96, 1, 6, dtype=torch.float32))
    grad_y = torch.randn_like(call["x"])
    first = value_and_gradients(call, grad_y, backend="triton")
    for _ in range(10):
        again = value_and_gradients(call, grad_y, backend="triton")
        assert all(torch.equal(again[name], t) for name, t in first.items())


def test_measured_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values of the default plans to rounding, the same bits each time, nothing measured twice."""
    call = on_gpu(operands(4, 56, 56, 96, 1, 6, dtype=torch.float32))
    grad_y = torch.randn_like(call["x"])
    by_default = value_and_gradients(call, grad_y, backend="triton")
    path = tmp_path / "plans.json"
    monkeypatch.setenv("VMAMBA_TRITON_PLANS", str(path))
    first = value_and_gradients(call, grad_y, backend="triton")
    kept = path.read_text()
    again = value_and_gradients(call, grad_y, backend="triton")
    assert len(json.loads(kept)) == 4
    assert path.read_text() == kept
    for name, t in first.items():
        assert torch.equal(again[name], t)
        torch.testing.assert_close(t, by_default[name], rtol=1e-4, atol=1e-5 * t.abs().max().item())


@pytest.fixture
def layer() -> SS2D:
    return SS2D(32).cuda()


def step(layer: SS2D, x: torch.Tensor, call=None) -> list[torch.Tensor]:
    with use_backend("triton"):
        y = (call or layer)(x)
        return [y, *torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])]


def test_compiles_without_a_break(layer: SS2D) -> None:
    x = torch.randn(2, 20, 20, 32, device="cuda", requires_grad=True)
    torch.compiler.reset()
    for actual, expected in zip(
        step(layer, x, torch.compile(layer, fullgraph=True)), step(layer, x), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_under_checkpointing(layer: SS2D) -> None:
    x = torch.randn(2, 20, 20, 32, device="cuda", requires_grad=True)
    kept = step(layer, x, lambda x: checkpoint(layer, x, use_reentrant=False))
    for actual, expected in zip(kept, step(layer, x), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(layer: SS2D, dtype: torch.dtype) -> None:
    x = torch.randn(2, 20, 20, 32, device="cuda", requires_grad=True)
    with torch.autocast("cuda", dtype):
        actual = step(layer, x)
        with use_backend("chunked"):
            expected = layer(x)
    assert all(t.isfinite().all() for t in actual)
    torch.testing.assert_close(actual[0].float(), expected.float(), rtol=2e-2, atol=2e-2)


def test_captured_in_a_graph() -> None:
    call = on_gpu(operands(2, 20, 33, 24, 1, 3, dtype=torch.float32))
    grad_y = torch.randn_like(call["x"])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiled before it is captured
        for _ in range(2):
            value_and_gradients(call, grad_y, backend="triton")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = value_and_gradients(call, grad_y, backend="triton")
    with torch.no_grad():
        call["x"].normal_()
    graph.replay()
    for name, expected in value_and_gradients(call, grad_y, backend="triton").items():
        assert torch.equal(captured[name], expected), name


def test_offsets_beyond_32_bits() -> None:
    """The second image crosses 2³¹ elements; within an image the kernels count in 32 bits."""
    side, channels = 2**10, 2**11 - 64
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("it takes 55 GB")
    x = torch.randn(2, side, side, channels, device="cuda", dtype=torch.bfloat16)
    few = torch.randn(2, side, side, 1, 3, device="cuda")
    A, weight = -torch.ones(1, channels, 1, device="cuda"), torch.randn(1, channels, 1, device="cuda")

    def scan(images: slice) -> torch.Tensor:
        delta, B, C = few[images].split(1, -1)
        with torch.no_grad():
            return selective_scan_2d(
                x[images], delta, A, B, C, delta_weight=weight, routes=("row",), backend="triton"
            )

    assert torch.equal(scan(slice(0, 2))[1], scan(slice(1, 2))[0])
