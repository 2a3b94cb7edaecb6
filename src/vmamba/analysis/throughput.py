"""Throughput and memory of models side by side.

A machine's speed drifts, and others share it: absolute times say little. What is compared runs in turns, in
one process, and each round gives a ratio; the median of the ratios and their quartiles are the result.
"""

import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.errors import UserError
from vmamba.models import VMamba
from vmamba.models.factory import create_model
from vmamba.ops import use_backend

PEERS = ("swin_tiny_patch4_window7_224", "convnext_tiny", "deit_small_patch16_224", "resnet50")
_SHORTEST = 0.2
"""Seconds that one measurement lasts at least: what is faster is run several times."""


class BenchError(UserError, RuntimeError):
    """What was to be measured cannot run, or computes something wrong."""


@dataclass(frozen=True)
class Ratio:
    """Of the speeds of the first to this one's, round by round: median and quartiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Measurement:
    """One model at one setting.

    Attributes:
        model: Its name.
        size: Side of the images in pixels.
        batch: Images at once.
        images_per_second: By the median round.
        ratio: How many times as fast the first model is.
        seconds: Of one call, of each round.
        memory_format: "channels_last" or "contiguous", whichever was faster.
        peak_memory: Bytes that a call needs beyond what was there before it, in a process of its own; None
            if it was not asked for or the system does not tell.
    """

    model: str
    size: int
    batch: int
    images_per_second: float
    ratio: Ratio
    seconds: list[float]
    memory_format: str
    peak_memory: int | None


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int,
    synchronize: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each function, of each round; every round runs them all, forwards and backwards in turn.

    Args:
        functions: By name; each is called twice before.
        rounds: At least 1.
        synchronize: Waits until a device is done.
    """

    def measure(name: str, times: int) -> float:
        if times > 1:  # of short calls the first after another function's finds the caches full of its data
            functions[name]()
        synchronize()
        start = time.perf_counter()
        for _ in range(times):
            functions[name]()
        synchronize()
        return (time.perf_counter() - start) / times

    times = {}
    for name in functions:
        measure(name, 1)
        times[name] = max(1, math.ceil(_SHORTEST / measure(name, 1)))
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(rounds):
        for name in list(functions)[:: -1 if i % 2 else 1]:
            seconds[name].append(measure(name, times[name]))
    return seconds


def ratio(first: Sequence[float], other: Sequence[float]) -> Ratio:
    """How many times as fast `first` is, from the seconds of both in the same rounds."""
    found = sorted(b / a for a, b in zip(first, other, strict=True))
    if len(found) == 1:
        return Ratio(found[0], found[0], found[0])
    low, _, high = statistics.quantiles(found, n=4, method="inclusive")
    return Ratio(statistics.median(found), low, high)


@dataclass(frozen=True)
class Setting:
    """How models are run.

    Attributes:
        size: Side of the images in pixels.
        batch: Images at once.
        train: Forward and backward of a training step, instead of inference.
        autocast: None, "bf16" or "fp16".
        device: As PyTorch names it.
    """

    size: int
    batch: int
    train: bool = False
    autocast: str | None = None
    device: str = "cpu"


def create(name: str, setting: Setting) -> nn.Module:
    """A model of timm's for images of a size, in the mode of the setting.

    Raises:
        ModelError: There is none of that name, or it does not take that size.
    """
    model: nn.Module = create_model(name, image_size=(setting.size, setting.size))
    return model.to(setting.device).train(setting.train)


def step(model: nn.Module, images: Tensor, setting: Setting) -> Callable[[], Tensor]:
    """A call of the model as the setting says; it returns the logits."""
    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    labels = torch.arange(len(images), device=images.device)

    def run() -> Tensor:
        half = (
            nullcontext()
            if setting.autocast is None
            else torch.autocast(images.device.type, types[setting.autocast])
        )
        with nullcontext() if setting.train else torch.inference_mode():
            with half:
                logits = model(images)
            if setting.train:
                F.cross_entropy(logits.float(), labels).backward()
                for parameter in model.parameters():
                    parameter.grad = None
        return logits.detach()

    return run


def _images(setting: Setting) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (setting.batch, 3, setting.size, setting.size)
    return torch.randn(shape, generator=generator).to(setting.device)


def check(model: nn.Module, name: str, setting: Setting) -> None:
    """Refuse to time what is wrong: values that are not finite, or engines that do not agree.

    Raises:
        BenchError: That is so.
    """
    model.eval()
    image = _images(setting)[:1]
    run = step(model, image, Setting(setting.size, 1, False, None, setting.device))
    logits = run()
    if not logits.isfinite().all():
        raise BenchError(f"{name}: the logits are not finite")
    if isinstance(model, VMamba):
        with use_backend("chunked"):
            expected = run()
        error = ((logits - expected).abs().max() / expected.abs().max()).item()
        if error > 1e-4:
            raise BenchError(f"{name}: the engines differ by {error:.1e} of the largest logit")
    model.train(setting.train)


def bench_models(
    names: Sequence[str],
    setting: Setting,
    rounds: int = 10,
    memory: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> list[Measurement]:
    """Run models in turns; each in the memory format that suits it.

    Args:
        names: Of timm's registry; ratios are to the first.
        setting: Of all of them.
        rounds: At least 1.
        memory: Measure the peak memory of each too.
        log: Is told what is going on.

    Raises:
        BenchError: A model is unknown, cannot run at this setting, or computes something wrong.
    """
    if rounds < 1:
        raise BenchError(f"rounds: expected at least 1, got {rounds}")
    if not names or len(set(names)) < len(names):
        raise BenchError(f"models: expected different names, got {', '.join(names) or 'none'}")
    synchronize = torch.cuda.synchronize if setting.device.startswith("cuda") else lambda: None
    calls, formats = {}, {}
    for name in names:
        log(f"checking {name}")
        model = create(name, setting)
        try:
            check(model, name, setting)
            calls[name], formats[name] = _in_best_format(model, setting, synchronize)
        except RuntimeError as error:
            raise BenchError(f"{name} at {setting.batch} × {setting.size}²: {error}") from error
    log(f"timing {rounds} rounds")
    seconds = interleaved(calls, rounds, synchronize)
    peaks = {name: peak_memory(name, setting, formats[name]) if memory else None for name in names}
    return [
        Measurement(
            name,
            setting.size,
            setting.batch,
            setting.batch / statistics.median(seconds[name]),
            ratio(seconds[names[0]], seconds[name]),
            seconds[name],
            formats[name],
            peaks[name],
        )
        for name in names
    ]


def _formatted(model: nn.Module, setting: Setting, memory_format: str) -> Callable[[], Tensor]:
    layout = torch.channels_last if memory_format == "channels_last" else torch.contiguous_format
    return step(model.to(memory_format=layout), _images(setting).contiguous(memory_format=layout), setting)


def _in_best_format(
    model: nn.Module, setting: Setting, synchronize: Callable[[], None]
) -> tuple[Callable[[], Tensor], str]:
    def seconds(memory_format: str) -> float:
        call = _formatted(model, setting, memory_format)
        return min(interleaved({"": call}, 2, synchronize)[""])

    best = min(("contiguous", "channels_last"), key=seconds)
    return _formatted(model, setting, best), best


def peak_memory(name: str, setting: Setting, memory_format: str) -> int | None:
    """Bytes that one call needs beyond what was there before it: weights' gradients and activations."""
    if setting.device.startswith("cuda"):
        call = _formatted(create(name, setting), setting, memory_format)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_memory_here, (name, setting, memory_format, torch.get_num_threads()))


def _peak_memory_here(name: str, setting: Setting, memory_format: str, threads: int) -> int:
    torch.set_num_threads(threads)
    call = _formatted(create(name, setting), setting, memory_format)

    def kibibytes(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))

    small = Setting(32, 1, setting.train)
    _formatted(create("vmamba_pico", small), small, "contiguous")()  # loads what is loaded once
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from here
    before = kibibytes("VmRSS")
    call()
    return 1024 * (kibibytes("VmHWM") - before)


def to_rows(measurements: Sequence[Measurement], setting: Setting) -> list[dict[str, Any]]:
    """As JSON holds them."""
    return [{**asdict(setting), **asdict(measurement)} for measurement in measurements]


def draw(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Write throughput as a PNG: against size or batch where several were measured, else as bars."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in rows))
    axis = next((a for a in ("size", "batch") if len({row[a] for row in rows}) > 1), None)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    if axis is None:
        axes.barh(models[::-1], [row["images_per_second"] for row in rows][::-1])
        axes.set_xlabel("images/s")
    else:
        for model in models:
            own = sorted((row[axis], row["images_per_second"]) for row in rows if row["model"] == model)
            axes.plot(*zip(*own, strict=True), marker="o", label=model)
        axes.set(xlabel={"size": "side of the image, pixels", "batch": "batch size"}[axis], ylabel="images/s")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
