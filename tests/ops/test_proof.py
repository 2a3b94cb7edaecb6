"""The proof of a backend on a device, and the verdict that is kept of it."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import stand_ins
from vmamba.ops import _registry, cpu, proof, verdicts
from vmamba.ops.triton import interpreted
from vmamba.ops.verdicts import Verdict

pytestmark = pytest.mark.skipif(
    isinstance(cpu._load(), str), reason="stand-ins are made of the compiled kernel"
)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and nothing known of before."""
    torch.use_deterministic_algorithms(False)  # with which `chunked` is slow
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(verdicts, "_KNOWN", {})
    stand_ins.calls.clear()
    monkeypatch.setattr(_registry, "_BACKENDS", {**_registry._BACKENDS, **stand_ins.BACKENDS})
    return verdicts.folder()


def check(name: str, **changes: Any) -> proof.Findings:
    return proof.check(name, CPU, stand_ins.CASES, stand_ins.TIMED, **changes)


def test_right_and_faster() -> None:
    findings = check("right")
    assert findings.failures == []
    assert findings.checked == 1
    assert len(findings.speedups) == 2
    assert all(ratio > 1 for ratio in findings.speedups.values())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrong", r"\(1, 9, 18, 40, 1, 3\) in float32: the gradient of C: error .*, reference .*, allowed"),
        ("fickle", "float32: other bits when run again: y$"),
        ("raising", "float32: NotImplementedError: the compiler gave up$"),
        ("slow", r"\(1, 14, 14, 32, 1, 6\) in float32: slower than 'chunked', forward .* ms against .* ms"),
    ],
)
def test_what_fails_is_named(name: str, message: str) -> None:
    findings = check(name)
    assert findings.lasting
    assert re.search(message, findings.failures[0]), findings.failures


def test_a_thorough_proof_goes_on_after_a_failure() -> None:
    assert check("wrong").speedups == {}
    findings = check("wrong", thorough=True)
    assert len(findings.speedups) == 2
    deviations = findings.cases[0]["deviations"]
    beyond = [name for name, d in deviations.items() if d["error"] > d["allowed"]]
    assert beyond == ["C"]


def test_a_device_that_is_full_says_nothing_of_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setitem(_registry._BACKENDS, "right", replace(stand_ins.RIGHT, forward=full))
    findings = check("right")
    assert not findings.lasting
    assert "tried to allocate" in findings.failures[0]


def test_a_device_that_cannot_be_opened() -> None:
    findings = proof.check("right", torch.device("xpu:7"), stand_ins.CASES, ())
    assert not findings.lasting
    assert findings.failures[0].startswith("a second process cannot use the device: ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n_state", [1, 16])
def test_the_compiled_kernel_passes_each_type(dtype: torch.dtype, n_state: int) -> None:
    case = proof.Case(1, 4, 5, 40, n_state, 6, dtype)
    assert proof.check("cpu", CPU, [case], ()).failures == []


def test_cases_hold_what_models_use() -> None:
    """Both state sizes in each type; an image of one tile, of several, and of one in forward alone."""
    from vmamba.ops.triton import backend as triton

    kinds = {
        (
            any(triton.segments(c.height, c.width, triton.WHOLE)),
            any(triton.segments(c.height, c.width, triton.WHOLE_BACKWARD)),
        )
        for c in proof.CASES
    }
    assert kinds == {(True, True), (False, True), (False, False)}
    types = (torch.float32, torch.bfloat16, torch.float16)
    assert {(c.n_state, c.dtype) for c in proof.CASES} == {(n, t) for n in (1, 16) for t in types}
    assert set(proof.CASES) <= {*proof.CASES_THOROUGH}


@pytest.mark.skipif(not interpreted(), reason="the kernels are interpreted: TRITON_INTERPRET=1")
@pytest.mark.parametrize(
    "index", [0, *(pytest.param(i, marks=pytest.mark.full) for i in range(1, len(proof.CASES)))]
)
def test_triton_is_right_in_the_interpreter(index: int) -> None:
    assert proof.check("triton", CPU, [proof.CASES[index]], ()).failures == []


# --- in another process


def prove(name: str, limit: float = 120) -> Verdict:
    return proof.prove(stand_ins.BACKENDS[name], CPU, limit=limit).verdict


def test_proven_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is forced here, and plans that are measured, are not its concern."""
    monkeypatch.setenv("VMAMBA_ENGINE", "nosuch")
    verdict = prove("right")
    assert verdict.is_proven, verdict.reason
    assert verdict.checked == len(stand_ins.CASES)
    assert verdict.machine == verdicts.machine(stand_ins.RIGHT, CPU)
    assert stand_ins.calls == []


def test_a_kernel_that_hangs_is_killed() -> None:
    start = time.monotonic()
    verdict = prove("hanging", limit=3)
    assert verdict.reason == "the proof did not end within 3 s"
    assert verdict.lasting
    assert time.monotonic() - start < 60


def test_a_kernel_that_ends_its_process() -> None:
    verdict = prove("dying")
    assert verdict.lasting
    assert verdict.reason is not None
    assert verdict.reason.startswith("the process of the proof ended with status -6: ")


def test_no_process_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    verdict = prove("right")
    assert not verdict.lasting
    assert "no process could be started for the proof" in str(verdict.reason)


# --- verdicts


def verdict(name: str = "right", **changes: Any) -> Verdict:
    machine = verdicts.machine(stand_ins.BACKENDS[name], CPU)
    plain = Verdict(name, machine, None, 14, {"forward": 3.0}, 5.0, "2026-11-27T12:00:00+00:00")
    return replace(plain, **changes)


def forget() -> None:
    verdicts._KNOWN.clear()


def refuse() -> Verdict:
    raise AssertionError("proven again")


def found(prove: Any = refuse) -> Verdict:
    return verdicts.found(stand_ins.RIGHT, CPU, prove)


def test_a_verdict_is_kept(folder: Path) -> None:
    assert verdicts.kept(stand_ins.RIGHT, CPU) is None
    assert found(verdict) == verdict()
    forget()
    assert found() == verdict()
    assert verdicts.kept(stand_ins.BACKENDS["wrong"], CPU) is None


@pytest.mark.parametrize("changed", ["device", "driver", "torch", "triton", "vmamba"])
def test_it_is_of_a_device_and_versions(changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found(verdict)
    forget()
    before = verdicts.machine(stand_ins.RIGHT, CPU)
    assert changed in before
    monkeypatch.setattr(verdicts, "machine", lambda backend, device: {**before, changed: "another"})
    assert verdicts.kept(stand_ins.RIGHT, CPU) is None


def edit(**changes: Any) -> str:
    return json.dumps(asdict(verdict()) | changes)


@pytest.mark.parametrize(
    "content",
    [
        lambda: "",
        lambda: '{"backend": "ri',
        lambda: "[1]",
        lambda: "null",
        lambda: "\udcff",
        lambda: edit(reason=3),
        lambda: edit(speedups={"forward": "fast"}),
        lambda: edit(checked="all"),
        lambda: edit(backend="wrong"),
        lambda: edit(machine={}),
        lambda: edit(more=1),
    ],
)
def test_a_damaged_file_is_no_verdict(content: Any, folder: Path) -> None:
    found(verdict)
    forget()
    (path,) = folder.glob("*.json")
    path.write_bytes(content().encode(errors="surrogateescape"))
    assert verdicts.kept(stand_ins.RIGHT, CPU) is None
    assert found(verdict) == verdict()
    forget()
    assert found() == verdict()


def test_a_folder_that_cannot_be_written_to(folder: Path) -> None:
    """The process proves once, and keeps it to itself."""
    folder.parent.mkdir(parents=True)
    folder.write_text("no folder")
    assert found(verdict) == verdict()
    assert found() == verdict()
    forget()
    with pytest.raises(AssertionError, match="proven again"):
        found()


def test_what_does_not_last_is_not_written(folder: Path) -> None:
    busy = verdict(reason="the device is full", lasting=False)
    assert found(lambda: busy) == busy
    assert found() == busy
    forget()
    assert found(verdict) == verdict()


def test_a_process_that_never_ends_its_proof(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = verdicts.path_of(stand_ins.RIGHT, CPU).with_suffix(".lock")
    path.parent.mkdir(parents=True)
    hold = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); "
        "print('held', flush=True); time.sleep(100)"
    )
    monkeypatch.setattr(verdicts, "PATIENCE", 0.3)
    with subprocess.Popen([sys.executable, "-c", hold, str(path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert "another process has been checking it" in str(found().reason)
        other.kill()
    forget()
    assert found(verdict) == verdict()


@pytest.mark.skipif(os.name != "posix", reason="folders of other systems have no such mode")
def test_file_systems_without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(file: Any) -> bool:
        raise OSError(95, "not supported")

    monkeypatch.setattr(verdicts, "try_lock", unsupported)
    assert found(verdict) == verdict()
