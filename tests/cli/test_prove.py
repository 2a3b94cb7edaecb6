"""`vmamba prove`, and what `vmamba info` says of a proof."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import stand_ins
from vmamba.ops import _registry, cpu, proof, verdict_on, verdicts
from vmamba_cli import info
from vmamba_cli.__main__ import app

pytestmark = pytest.mark.skipif(
    isinstance(cpu._load(), str), reason="stand-ins are made of the compiled kernel"
)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.fixture(autouse=True)
def _simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof runs in this process; the device is the CPU."""
    torch.use_deterministic_algorithms(False)  # with which `chunked` is slow
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(verdicts, "_KNOWN", {})
    monkeypatch.setattr(_registry, "_BACKENDS", {**_registry._BACKENDS, **stand_ins.BACKENDS})

    def here(backend, device, thorough: bool, limit: float, calls) -> tuple[proof.Findings, str]:
        found = proof.check(backend.name, device, stand_ins.CASES, stand_ins.TIMED, thorough)
        return found, "the end of the log"

    monkeypatch.setattr(proof, "_in_another_process", here)


def test_a_report_of_what_is_wrong(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    done = call("prove", "--backend", "wrong", "--device", "cpu", "--all", "--out", str(out))
    assert done.exit_code == 1
    assert "wrong on " in done.stdout
    assert "not used: (b, h, w, d, n, r) = (1, 9, 18, 40, 1, 3) in float32: the gradient of C" in done.stdout
    report = json.loads(out.read_text())
    assert report["environment"]["torch"] == torch.__version__
    assert report["verdict"]["machine"]["torch"] == torch.__version__
    assert report["log"] == "the end of the log"
    assert report["cases"][0]["deviations"]["C"]["error"] > report["cases"][0]["deviations"]["C"]["allowed"]
    kept = verdict_on("wrong", "cpu")
    assert kept is not None
    assert not kept.is_proven


def test_a_new_verdict_replaces_the_old() -> None:
    machine = verdicts.machine(stand_ins.RIGHT, torch.device("cpu"))
    old = verdicts.Verdict("right", machine, "it was slow", 1, {}, 1.0, "")
    verdicts.keep(stand_ins.RIGHT, torch.device("cpu"), old)
    assert verdict_on("right", "cpu") == old
    done = call("prove", "--backend", "right", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "right and faster (1 calls checked in" in done.stdout
    assert "times as fast as 'chunked': forward and backward of" in done.stdout
    verdicts._KNOWN.clear()
    kept = verdict_on("right", "cpu")
    assert kept is not None
    assert kept.is_proven


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--backend", "warp"), "there is no 'warp'"),
        (("--backend", "cpu", "--device", "xpu:9"), "device: xpu:9 cannot be used: "),
        (("--backend", "cpu", "--device", "meta"), "'cpu' cannot serve meta"),
        (("--out", "/no/such/folder/report.json"), "expected a file in a folder that exists"),
    ],
)
def test_errors_are_one_message(arguments: tuple[str, ...], message: str) -> None:
    done = call("prove", *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stdout == ""


def test_info_says_what_a_gpu_would_do() -> None:
    facts = json.loads(call("info", "--json").stdout)
    if not torch.cuda.is_available() and not torch.xpu.is_available():
        assert "the first eager call checks 'triton'" in facts["proof on a GPU"]["no GPU here"]


def test_info_of_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = replace(stand_ins.RIGHT, name="triton")
    monkeypatch.setitem(_registry._BACKENDS, "triton", triton)
    assert info._proof("cpu") == (
        "not yet: the first eager call on it, or `vmamba prove --device cpu`, checks 'triton'"
    )
    machine = verdicts.machine(triton, torch.device("cpu"))
    bad = verdicts.Verdict("triton", machine, "y: error 1", 3, {}, 7.0, "2026-11-27")
    verdicts.keep(triton, torch.device("cpu"), bad)
    assert info._proof("cpu") == (
        f"triton on {machine['device']}: not used: y: error 1 (3 calls checked in 7 s, 2026-11-27)"
    )
