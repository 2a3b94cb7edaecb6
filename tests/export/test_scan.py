"""The scan in ONNX operations, in each runtime, against the reference in float64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from later import Later, importorskip_later
from vmamba.ops import selective_scan_2d
from vmamba.ops.routes import GIVEN, route_codes

ir = importorskip_later("onnx_ir", "export")
importorskip_later("onnxscript", "export")
scan = Later("vmamba.export.scan")
check = Later("vmamba.export.check")

RUNTIMES = ("onnxruntime", "openvino")


def operands(b: int, h: int, w: int, d: int, n: int, k: int) -> dict[str, Tensor]:
    """Float32 operands of the operator with delta of rank 3."""
    g = torch.Generator().manual_seed(b + h + w + n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    return {
        "x": normal(b, h, w, d),
        "delta": normal(b, h, w, k, 3),
        "A": -torch.exp(0.3 * normal(k, d, n)),
        "B": normal(b, h, w, k, n),
        "C": normal(b, h, w, k, n),
        "D": normal(k, d),
        "delta_bias": normal(k, d) - 3,
        "delta_weight": normal(k, d, 3),
    }


def written(given: dict[str, Tensor], codes: tuple[int, ...], spelling: Any) -> Any:
    """A model of nothing but the scan, whose sizes are all open."""
    dtypes = {torch.int64: ir.DataType.INT64, torch.float32: ir.DataType.FLOAT}
    form = scan.ScanForm(
        codes,
        given["A"].shape[2],
        tuple((name, dtypes[t.dtype]) for name, t in given.items()),
        True,
        given["x"].shape[1] == 1,
        given["x"].shape[3],
        spelling,
    )
    inputs = [
        ir.Value(name=name, type=ir.TensorType(dtypes[t.dtype]), shape=ir.Shape([None] * t.ndim))
        for name, t in given.items()
    ]
    nodes, y, last_state = scan.write_scan(form, inputs, "scan")
    for name, value in (("y", y), ("last_state", last_state)):
        value.name, value.type = name, ir.TensorType(ir.DataType.FLOAT)
        value.shape = ir.Shape([None] * 4)
    graph = ir.Graph(inputs, [y, last_state], nodes=nodes, opset_imports={"": 18}, name="main")
    return ir.Model(graph, ir_version=9)


@pytest.fixture(params=RUNTIMES)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Any, dict[str, Tensor]], list[Any]]:
    """Runs a model on operands by name."""
    runtime = pytest.importorskip(request.param)

    def call(model: Any, given: dict[str, Tensor]) -> list[Any]:
        file = tmp_path / "scan.onnx"
        ir.save(model, file)
        values = {name: t.numpy() for name, t in given.items()}
        if request.param == "onnxruntime":
            session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
            return list(session.run(None, values))
        return list(
            check.openvino_core()
            .compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(values)
            .values()
        )

    return call


SIZES = {
    "cross": (2, 5, 7),
    "unidirectional": (1, 4, 3),
    "bidirectional": (3, 3, 4),
    ("row", "row_reversed"): (4, 1, 6),
    ("column_reversed",): (1, 6, 1),
}


def assert_is_the_reference(run: Any, routes: Any, size: Any, n: int, spelling: str) -> None:
    codes = tuple(route_codes(routes))
    given = operands(*size, 8, n, len(codes))
    expected = selective_scan_2d(**{name: t.double() for name, t in given.items()}, routes=routes)
    y, _ = run(written(given, codes, spelling), given)
    assert np.abs(y - expected.numpy()).max() <= 3e-6 * expected.abs().max()


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("routes", SIZES, ids=str)
def test_is_the_reference(run: Any, routes: Any, n: int, request: pytest.FixtureRequest) -> None:
    """In the spelling of the runtime."""
    assert_is_the_reference(run, routes, SIZES[routes], n, request.node.callspec.params["run"])


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("spelling", RUNTIMES)
def test_either_spelling_is_right(run: Any, spelling: str, n: int) -> None:
    assert_is_the_reference(run, "cross", (1, 1, 1), n, spelling)
    assert_is_the_reference(run, "cross", (2, 3, 2), n, spelling)


@pytest.mark.parametrize("n", [1, 3])
def test_a_permutation_and_states(run: Any, n: int) -> None:
    given = operands(2, 3, 4, 8, n, 2)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    given["initial_state"] = torch.randn(2, 2, 8, n, generator=torch.Generator().manual_seed(1))
    codes = (*route_codes(("column",)), GIVEN)
    wide = {name: t.double() for name, t in given.items()}
    y, last_state, _ = torch.ops.vmamba.selective_scan_2d(
        *(wide[name] for name in list(given)[:8]),
        True,
        list(codes),
        wide["initial_state"],
        None,
        "reference",
        order[None],
    )
    given["orders"] = order[None]
    model = written(given, codes, "onnxruntime")
    for value, expected in zip(run(model, given), (y, last_state), strict=True):
        assert np.abs(value - expected.numpy()).max() <= 3e-6 * expected.abs().max()
