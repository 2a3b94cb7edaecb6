"""Plans of the Triton backend that are measured and kept in a file."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from scans import operands, value_and_gradients
from vmamba.ops.triton import backend as triton
from vmamba.ops.triton import plans as triton_plans
from vmamba.ops.triton.plans import Plan, PlanFile

DEFAULT = Plan(programs=4, tiles=1, groups=1, blocks=2, height=8, width=16, channels=16, warps=8)
OTHER = replace(DEFAULT, blocks=4, channels=8)
PLANS = (DEFAULT, OTHER)


def slower_by_default(plan: Plan) -> float:
    return 2.0 if plan == DEFAULT else 1.0


def unmeasured(plan: Plan) -> float:
    raise AssertionError(f"{plan} is measured")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "plans.json"


def test_the_fastest_is_kept(path: Path) -> None:
    plans = PlanFile(path)
    assert plans.fastest("call", PLANS, slower_by_default) == OTHER
    assert plans.fastest("call", PLANS, unmeasured) == OTHER
    assert PlanFile(path).fastest("call", PLANS, unmeasured) == OTHER
    assert [each.name for each in path.parent.iterdir()] == ["plans.json"]


def test_of_equals_the_default(path: Path) -> None:
    assert PlanFile(path).fastest("call", PLANS, lambda plan: 1.0) == DEFAULT
    assert PlanFile(path).fastest("that runs nowhere", PLANS, lambda plan: float("inf")) == DEFAULT


def test_nothing_is_measured_at_the_wrong_time(path: Path) -> None:
    plans = PlanFile(path)
    assert plans.fastest("call", PLANS, unmeasured, measure=False) == DEFAULT
    assert not path.exists()
    assert plans.fastest("call", PLANS, slower_by_default) == OTHER
    assert plans.fastest("call", PLANS, unmeasured, measure=False) == OTHER


def test_a_plan_that_is_no_candidate_any_more(path: Path) -> None:
    PlanFile(path).fastest("call", [replace(DEFAULT, tiles=4)], slower_by_default)
    assert PlanFile(path).fastest("call", PLANS, slower_by_default) == OTHER


def test_processes_share_a_file(path: Path) -> None:
    one, other = PlanFile(path), PlanFile(path)
    one.fastest("of one", PLANS, slower_by_default)
    other.fastest("of the other", PLANS, slower_by_default)
    assert json.loads(path.read_text()).keys() == {"of one", "of the other"}


@pytest.mark.parametrize("content", [b'{"call": {"blo', b"[1]", b"\xff", b'{"call": 3}'])
def test_a_damaged_file(path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    assert PlanFile(path).fastest("call", PLANS, slower_by_default) == OTHER
    assert PlanFile(path).fastest("call", PLANS, unmeasured) == OTHER
    if b"3" not in content:
        assert f"VMAMBA_TRITON_PLANS={path}: not readable, plans are measured anew" in caplog.text


def test_a_file_that_cannot_be_written(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.parent.write_text("no folder")
    plans = PlanFile(path)
    assert plans.fastest("call", PLANS, slower_by_default) == OTHER
    assert f"VMAMBA_TRITON_PLANS={path}: not writable, plans are not kept" in caplog.text
    assert plans.fastest("call", PLANS, unmeasured) == OTHER


def test_a_plan_beyond_the_gpu_is_never_the_fastest() -> None:
    errors = pytest.importorskip("triton.runtime.errors")

    def run() -> None:
        raise errors.OutOfResources(300_000, 232_448, "shared memory")

    assert triton_plans._milliseconds(run, torch.device("cpu")) == float("inf")


@pytest.mark.skipif(not triton.interpreted(), reason="the kernels are interpreted: TRITON_INTERPRET=1")
def test_calls_by_measured_plans(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Summaries, output and gradient of several tiles, each measured once; the results are right."""
    monkeypatch.setattr(triton, "SETTINGS", dict.fromkeys(triton.SETTINGS, ((2**14, 8, 8), (1, 8, 8))))
    monkeypatch.setenv(triton_plans.VARIABLE, str(path))
    monkeypatch.setattr(triton_plans, "_file", lambda path: PlanFile(Path(path)))
    runs = []

    def milliseconds(run: Any, device: torch.device) -> float:
        run()
        runs.append(run)
        return -float(len(runs))  # the last is the fastest

    monkeypatch.setattr(triton_plans, "_milliseconds", milliseconds)
    caplog.set_level(logging.INFO)
    call = operands(1, 9, 12, 20, n_state=1, rank=2)
    grad_y = torch.randn_like(call["x"])
    expected = value_and_gradients(call, grad_y, backend="reference")
    first, second = (value_and_gradients(call, grad_y, backend="triton") for _ in range(2))
    known = json.loads(path.read_text())
    assert len(runs) == 2 * len(known)
    kernels = {name.split(": ")[1].split(" of ")[0] for name in known}
    assert kernels == {"output", "summary", "adjoint summary", "gradient"}
    assert {plan["channels"] for plan in known.values()} == {8}
    for name, actual in first.items():
        assert torch.equal(actual, second[name])
        largest = expected[name].abs().max().item()
        torch.testing.assert_close(actual, expected[name], rtol=1e-12, atol=1e-12 * largest)
