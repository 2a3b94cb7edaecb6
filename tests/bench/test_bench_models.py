"""Models side by side: what is compared and checked; no speed is asserted."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from vmamba.bench import models as bench
from vmamba.bench.models import Setting, bench_models
from vmamba.bench.timing import BenchError, Ratio
from vmamba.errors import ModelError
from vmamba.ops import use_backend


@pytest.mark.parametrize("train", [False, True])
def test_models(train: bool) -> None:
    setting = Setting(32, 2, train)
    measurements = bench_models(["vmamba_pico", "test_resnet"], setting, rounds=2)
    assert [m.model for m in measurements] == ["vmamba_pico", "test_resnet"]
    assert measurements[0].ratio == Ratio(1, 1, 1)
    for m in measurements:
        assert len(m.seconds) == 2
        assert min(m.seconds) <= 2 / m.images_per_second <= max(m.seconds)
        assert m.memory_format in ("contiguous", "channels_last")


def test_a_training_step_has_gradients_and_leaves_none() -> None:
    setting = Setting(32, 2, True)
    model = bench.create_for("vmamba_pico", setting)
    assert model.training
    nonzero = []
    model.stem.conv1.weight.register_hook(lambda grad: nonzero.append(grad.abs().sum() > 0))
    bench.step(model, torch.randn(2, 3, 32, 32), setting)()
    assert nonzero == [True]
    assert all(p.grad is None for p in model.parameters())


def test_the_check_keeps_the_mode() -> None:
    model = bench.create_for("vmamba_pico", Setting(32, 1, True))
    bench.check(model, "vmamba_pico", Setting(32, 1, True))
    assert all(m.training for m in model.modules())


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="unknown model 'vmamba_huge'"):
        bench_models(["vmamba_huge"], Setting(32, 1))
    with pytest.raises(BenchError, match="expected different names"):
        bench_models(["test_resnet", "test_resnet"], Setting(32, 1))
    with pytest.raises(BenchError, match=r"inception_v3 at 1 × 8²: "):
        bench_models(["inception_v3"], Setting(8, 1))
    with pytest.raises(BenchError, match="batch: expected at least 1, got 0"):
        bench_models(["test_resnet"], Setting(32, 0))
    real = bench.create_for

    def broken(name: str, setting: Setting) -> torch.nn.Module:
        model = real(name, setting)
        torch.nn.init.constant_(next(model.parameters()), torch.nan)
        return model

    monkeypatch.setattr(bench, "create_for", broken)
    with pytest.raises(BenchError, match=r"^vmamba_pico: the logits are not finite"):
        bench_models(["vmamba_pico"], Setting(32, 1))


@pytest.mark.parametrize("wrap", [lambda model: model, torch.nn.Sequential], ids=["bare", "wrapped"])
def test_a_backend_that_is_wrong_is_not_timed(wrap, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the class of the model that contains the scans."""
    setting = Setting(32, 1)
    model = wrap(bench.create_for("vmamba_pico", setting))
    bench.check(model, "model", setting)

    @contextmanager
    def wrong(name: str) -> Iterator[None]:
        torch.nn.init.constant_(list(model.parameters())[-1], 0.1)
        yield

    monkeypatch.setattr(bench, "use_backend", wrong)
    with pytest.raises(BenchError, match="model: the backends differ by"):
        bench.check(model, "model", setting)
    bench.check(bench.create_for("test_resnet", setting), "test_resnet", setting)


def test_backends_that_cannot_serve() -> None:
    with pytest.raises(BenchError, match=r"there is no 'nosuch'; expected one of .*'reference'"):
        bench_models(["vmamba_pico"], Setting(32, 1, backend="nosuch"))
    if not torch.cuda.is_available():
        with pytest.raises(BenchError, match="'triton' cannot "):
            bench_models(["vmamba_pico"], Setting(32, 1, backend="triton"))


def test_every_call_runs_on_the_backend_of_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    forced: list[str] = []
    calls: list[str] = []

    @contextmanager
    def force(name: str) -> Iterator[None]:
        forced.append(name)
        with use_backend(name):
            yield
        forced.pop()

    def noting(*arguments):
        run = step(*arguments)
        return lambda: (calls.append(forced[-1]), run())[1]

    step = bench.step
    monkeypatch.setattr(bench, "use_backend", force)
    monkeypatch.setattr(bench, "step", noting)
    bench_models(["vmamba_pico"], Setting(32, 1, backend="chunked"), rounds=1)
    assert calls.count("reference") == 1  # what the check compares with
    assert set(calls) == {"chunked", "reference"}
