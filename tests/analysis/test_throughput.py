"""Timing side by side: what is compared, checked and written; no speed is asserted."""

import json

import pytest
import torch
from typer.testing import CliRunner

from vmamba.analysis import operator_throughput, throughput
from vmamba.analysis.throughput import BenchError, Setting, bench_models, interleaved, ratio
from vmamba.errors import ModelError
from vmamba.ops import selective_scan_2d
from vmamba_cli.__main__ import app


def test_every_round_runs_all_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "_SHORTEST", 0)
    calls: list[str] = []
    seconds = interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, 3)
    assert {name: len(own) for name, own in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert calls[-9:] == [*"abc", *"cba", *"abc"]


def test_ratios_are_of_the_same_round() -> None:
    found = ratio([1, 2, 4], [2, 8, 8])
    assert found.median == 2
    assert found.low == 2
    assert found.high == 3
    assert ratio([2.0], [1.0]) == throughput.Ratio(0.5, 0.5, 0.5)


@pytest.mark.parametrize("train", [False, True])
def test_models(train: bool) -> None:
    setting = Setting(32, 2, train)
    found = bench_models(["vmamba_pico", "resnet18"], setting, rounds=2)
    assert [m.model for m in found] == ["vmamba_pico", "resnet18"]
    assert found[0].ratio == throughput.Ratio(1, 1, 1)
    for m in found:
        assert len(m.seconds) == 2
        assert min(m.seconds) <= 2 / m.images_per_second <= max(m.seconds)
        assert m.memory_format in ("contiguous", "channels_last")


def test_a_training_step_has_gradients_and_leaves_none() -> None:
    setting = Setting(32, 2, True)
    model = throughput.create("vmamba_pico", setting)
    seen = []
    model.stem.conv1.weight.register_hook(lambda grad: seen.append(grad.abs().sum() > 0))
    throughput.step(model, torch.randn(2, 3, 32, 32), setting)()
    assert seen == [True]
    assert all(p.grad is None for p in model.parameters())


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="unknown model 'vmamba_huge'"):
        bench_models(["vmamba_huge"], Setting(32, 1))
    with pytest.raises(BenchError, match="expected different names"):
        bench_models(["resnet18", "resnet18"], Setting(32, 1))
    with pytest.raises(BenchError, match=r"inception_v3 at 1 × 8²: "):
        bench_models(["inception_v3"], Setting(8, 1))
    real = throughput.create

    def broken(name: str, setting: Setting) -> torch.nn.Module:
        model = real(name, setting)
        torch.nn.init.constant_(next(model.parameters()), torch.nan)
        return model

    monkeypatch.setattr(throughput, "create", broken)
    with pytest.raises(BenchError, match="logits are not finite"):
        bench_models(["vmamba_pico"], Setting(32, 1))


def test_shapes_of_a_model() -> None:
    found = operator_throughput.shapes("vmamba_tiny", 224)
    assert [(s.height, s.channels, s.rank, s.n_state, s.times) for s in found] == [
        (56, 192, 6, 1, 2),
        (28, 384, 12, 1, 2),
        (14, 768, 24, 1, 5),
        (7, 1536, 48, 1, 2),
    ]
    with pytest.raises(BenchError, match="no 2D selective scan"):
        operator_throughput.shapes("resnet18", 224)


SHAPE = operator_throughput.Shape(3, 4, 8, 2, 3, ("row", "column_reversed"), 5)


@pytest.mark.parametrize("backward", [False, True])
def test_operator(backward: bool) -> None:
    found = operator_throughput.bench_operator(SHAPE, 2, backward=backward, rounds=2)
    assert "chunked" in [m.engine for m in found]
    total = operator_throughput.model_totals(found)
    for m in found:
        assert total[m.engine, backward] == pytest.approx(m.nanoseconds * 1e-9 * 3 * 4 * 8 * 2 * 5)


def test_an_engine_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        operator_throughput,
        "_engines",
        lambda device: {"wrong": lambda call: selective_scan_2d(**call) * 1.01},
    )
    with pytest.raises(BenchError, match="wrong differs from the reference by"):
        operator_throughput.bench_operator(SHAPE)


def test_mambapy_computes_the_same() -> None:
    pytest.importorskip("mambapy")
    call = operator_throughput.operands(SHAPE, 2)
    torch.testing.assert_close(
        operator_throughput.by_mambapy(call), selective_scan_2d(**call), rtol=1e-4, atol=1e-5
    )


def test_the_command(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    common = ("--rounds", "1", "--out", str(tmp_path))
    models = ("vmamba_pico", "resnet18", "--input", "32", "--input", "64", "--batch", "1", "--threads", "2")
    result = CliRunner().invoke(app, ["bench", "models", *models, "--memory", *common])
    assert result.exit_code == 0, result.output
    assert "inference, 64², batch 1, cpu, 2 threads" in result.output
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["environment"]["threads"] == 2
    assert [(row["model"], row["size"]) for row in found["results"]] == [
        *(("vmamba_pico", 32), ("resnet18", 32), ("vmamba_pico", 64), ("resnet18", 64))
    ]
    assert all(row["peak_memory"] is None or row["peak_memory"] >= 0 for row in found["results"])
    assert (tmp_path / "throughput.png").read_bytes()[1:4] == b"PNG"
    result = CliRunner().invoke(
        app, ["bench", "ops", "vmamba_pico", "--input", "32", "--batch", "1", *common]
    )
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "results.json").read_text())["results"][0]["shape"]["n_state"] == 1
    for wrong in (["--autocast", "int8"], ["--device", "nowhere"]):
        result = CliRunner().invoke(app, ["bench", "models", "vmamba_pico", *wrong])
        assert result.exit_code == 2
        assert wrong[1] in result.output
