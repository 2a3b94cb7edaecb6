"""The operator's implementations side by side; no speed is asserted."""

import pytest
import torch

from vmamba.analysis.scans import ScanShape
from vmamba.bench import operator as bench
from vmamba.bench.timing import BenchError
from vmamba.errors import ModelError
from vmamba.ops import register_route, selective_scan_2d


def test_shapes_of_a_model() -> None:
    shapes = bench.shapes("vmamba_tiny", 224)
    assert [(s.height, s.channels, s.rank, s.n_state, s.times) for s in shapes] == [
        (56, 192, 6, 1, 2),
        (28, 384, 12, 1, 2),
        (14, 768, 24, 1, 5),
        (7, 1536, 48, 1, 2),
    ]
    with pytest.raises(BenchError, match="resnet18 has no selective scan"):
        bench.shapes("resnet18", 224)
    with pytest.raises(BenchError, match=r"inception_v3 does not take an input of \(3, 8, 8\): "):
        bench.shapes("inception_v3", 8)
    with pytest.raises(ModelError, match="unknown model"):
        bench.shapes("vmamba_huge", 224)


ROUTES = ("row", "column_reversed")
SHAPES = [
    pytest.param(ScanShape(3, 4, 8, 2, 3, ROUTES, times=5), id="two dimensions"),
    pytest.param(ScanShape(1, 4, 8, 2, 3, ROUTES, lines=3, times=5), id="lines"),
    pytest.param(ScanShape(3, 4, 8, 2, 0, ROUTES, times=5), id="delta given whole"),
]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_operator(shape: ScanShape, backward: bool) -> None:
    measurements = bench.bench_operator(shape, 2, backward=backward, rounds=1)
    assert "chunked" in [m.backend for m in measurements]
    totals = bench.model_totals(measurements)
    for m in measurements:
        assert totals[m.backend, backward] == pytest.approx(m.nanoseconds * 1e-9 * 3 * 4 * 8 * 2 * 5)


def _backwards(height: int, width: int) -> torch.Tensor:
    return torch.arange(height * width).flip(0)


def test_a_backend_that_does_not_serve_the_scan_is_left_out() -> None:
    found = {m.backend for m in bench.bench_operator(ScanShape(3, 4, 8, 65, 3, ROUTES), 1, rounds=1)}
    assert "chunked" in found
    assert "cpu" not in found


def test_along_a_route_of_ones_own() -> None:
    register_route("backwards", _backwards)
    found = {m.backend for m in bench.bench_operator(ScanShape(3, 4, 8, 2, 3, ("backwards",)), 1, rounds=1)}
    assert "chunked" in found


def test_a_backend_asked_for_that_does_not_serve_the_scan_is_an_error() -> None:
    shape = ScanShape(3, 4, 8, 65, 3, ROUTES)
    with pytest.raises(BenchError, match="backend: 'cpu' cannot"):
        bench.bench_operator(shape, 1, rounds=1, backend="cpu")
    assert "cpu" not in {m.backend for m in bench.bench_operator(shape, 1, rounds=1, backend="chunked")}


def test_an_implementation_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        bench,
        "_implementations",
        lambda shape, device, backend: {"wrong": lambda call: selective_scan_2d(**call) * 1.01},
    )
    with pytest.raises(BenchError, match="wrong differs from the reference by"):
        bench.bench_operator(ScanShape(3, 4, 8, 2, 3, ROUTES))


def test_mambapy_computes_the_same() -> None:
    pytest.importorskip("mambapy")
    call = bench.operands(ScanShape(3, 4, 8, 2, 3, ROUTES), 2)
    torch.testing.assert_close(bench.by_mambapy(call), selective_scan_2d(**call), rtol=1e-4, atol=1e-5)
