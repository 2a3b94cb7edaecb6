"""Throughput and memory of models side by side."""

import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.analysis.scans import record_scans
from vmamba.bench.timing import BenchError, Ratio, interleaved, ratio, synchronizer
from vmamba.files import save_figure
from vmamba.models.factory import create_model
from vmamba.nn import fused
from vmamba.nn.modes import evaluating
from vmamba.ops import use_backend
from vmamba.processes import end_with_parent

PEERS = ("swin_tiny_patch4_window7_224", "convnext_tiny", "deit_small_patch16_224", "resnet50")
"""Models that VMamba-T is compared with, by timm's names."""

TOLERANCE = 1e-4
"""Largest difference between two backends' logits, over the largest logit."""


class SubjectError(BenchError):
    """One of several subjects cannot be timed.

    Args:
        message: Why.
        subject: Which.
    """

    def __init__(self, message: str, subject: str) -> None:
        super().__init__(message)
        self.subject = subject


@dataclass(frozen=True)
class Setting:
    """The setting in which a model is timed.

    Attributes:
        size: Side of the images in pixels.
        batch: Images at once.
        train: Forward and backward of a training step, instead of inference.
        autocast: None, "bf16" or "fp16".
        device: As PyTorch names it.
        backend: Backend of the selective scan; None for the device's default.
        fused: Whether layers may be computed in fused form, see `vmamba.nn.fused`.
        args: Arguments of the model, as `vmamba.create_model` takes them.
    """

    size: int
    batch: int
    train: bool = False
    autocast: str | None = None
    device: str = "cpu"
    backend: str | None = None
    fused: bool = True
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    """One model at one setting.

    Attributes:
        model: The model's name.
        size: Side of the images in pixels.
        batch: Images at once.
        images_per_second: From the median round.
        ratio: Speed of the first model over this one's.
        seconds: Seconds of one call, in each round.
        memory_format: "channels_last" or "contiguous", whichever was faster.
        peak_memory: Bytes that a call needs beyond those in use before it, measured in a separate process;
            None if it was not requested or the system cannot measure it.
    """

    model: str
    size: int
    batch: int
    images_per_second: float
    ratio: Ratio
    seconds: list[float]
    memory_format: str
    peak_memory: int | None


def create_for(name: str, setting: Setting) -> nn.Module:
    """A model of timm's registry for images of the setting's size, in the setting's mode and on its device.

    Raises:
        ModelError: No model has that name.
    """
    model: nn.Module = create_model(name, image_size=(setting.size, setting.size), **setting.args)
    return model.to(setting.device).train(setting.train)


def step(model: nn.Module, images: Tensor, setting: Setting) -> Callable[[], Tensor]:
    """A function that calls the model as the setting says, and returns the logits."""
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


def images(setting: Setting) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (setting.batch, 3, setting.size, setting.size)
    return torch.randn(shape, generator=generator).to(setting.device)


def check(model: nn.Module, name: str, setting: Setting) -> None:
    """Raise, instead of timing a wrong result, if logits are not finite or two backends disagree.

    A model with selective scans is compared, in float32 and on one image, with itself on another backend.

    Args:
        model: From `create_for`; keeps its mode.
        name: For the message.
        setting: How the model is to be timed, inside an `as_set` block.

    Raises:
        BenchError: The model computes something wrong.
    """
    image = images(setting)[:1]
    with evaluating(model):
        run = step(model, image, replace(setting, batch=1, train=False, autocast=None))
        logits = run()
        if not logits.isfinite().all():
            raise BenchError(f"{name}: the logits are not finite")
        if not record_scans(model, image):
            return
        with use_backend("reference" if setting.backend == "chunked" else "chunked"):
            expected = run()
    error = ((logits - expected).abs().max() / expected.abs().max()).item()
    if error > TOLERANCE:
        raise BenchError(f"{name}: the backends differ by {error:.1e} of the largest logit")


@contextmanager
def on_backend(name: str | None) -> Iterator[None]:
    """Run every scan inside the `with` block on a backend; None leaves the choice to each call.

    Raises:
        BenchError: No backend has that name, or it cannot run on this machine; the message says why.
    """
    with ExitStack() as stack:
        if name is not None:
            try:
                stack.enter_context(use_backend(name))
            except (ValueError, RuntimeError) as error:
                raise BenchError(str(error)) from error
        yield


@contextmanager
def as_set(setting: Setting) -> Iterator[None]:
    """Run every scan and layer inside the `with` block as a setting says.

    Raises:
        BenchError: As `on_backend`.
    """
    with on_backend(setting.backend), fused(setting.fused):
        yield


def bench_models(
    names: Sequence[str],
    setting: Setting,
    rounds: int = 10,
    memory: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> list[Measurement]:
    """Time models in turns, each in the memory format that is faster for it.

    Args:
        names: Models of timm's registry; ratios are relative to the first.
        setting: The setting for all of them.
        rounds: At least 1.
        memory: Also measure the peak memory of each.
        log: Called with a line of text at the start of each measurement.

    Raises:
        BenchError: An argument is out of range, the backend is unknown or cannot run here, or a model cannot
            run at this setting or computes something wrong.
        ModelError: A model is unknown.
    """
    if not names or len(set(names)) < len(names):
        raise BenchError(f"models: expected different names, got {', '.join(names) or 'none'}")
    return bench_settings({name: (name, setting) for name in names}, rounds, memory, log)


def bench_settings(
    subjects: Mapping[str, tuple[str, Setting]],
    rounds: int = 10,
    memory: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> list[Measurement]:
    """Time models in turns, each in a setting of its own and in the memory format that is faster for it.

    Args:
        subjects: What is measured → the model's name in timm's registry, and its setting, all on one device;
            ratios of speed, in images, are relative to the first.
        rounds: At least 1.
        memory: Also measure the peak memory of each.
        log: Called with a line of text at the start of each measurement.

    Returns:
        A measurement of each, in order; `model` is the subject's name.

    Raises:
        SubjectError: A model cannot run at its setting, or computes something wrong.
        BenchError: As `bench_models`, for another reason.
        ModelError: A model is unknown.
    """
    for _, setting in subjects.values():
        for name, value in {"rounds": rounds, "batch": setting.batch, "size": setting.size}.items():
            if value < 1:
                raise BenchError(f"{name}: expected at least 1, got {value}")
    (device,) = {setting.device for _, setting in subjects.values()}
    synchronize = synchronizer(device)
    calls, formats = {}, {}
    for subject, (name, setting) in subjects.items():
        log(f"checking {subject}")
        with as_set(setting):
            model = create_for(name, setting)
            try:
                check(model, subject, setting)
                call, formats[subject] = _in_faster_format(model, setting, synchronize)
            except BenchError as error:
                raise SubjectError(str(error), subject) from error
            except (RuntimeError, AssertionError, ValueError) as error:
                message = f"{subject} at {setting.batch} × {setting.size}²: {error}"
                raise SubjectError(message, subject) from error
        calls[subject] = _called_as_set(call, setting)
    log(f"timing {rounds} rounds")
    seconds = interleaved(calls, rounds, synchronize)
    first, *_ = subjects
    measurements = []
    for subject, (name, setting) in subjects.items():
        per_image = {each: [s / subjects[each][1].batch for s in seconds[each]] for each in (first, subject)}
        measurements.append(
            Measurement(
                subject,
                setting.size,
                setting.batch,
                setting.batch / statistics.median(seconds[subject]),
                ratio(per_image[first], per_image[subject]),
                seconds[subject],
                formats[subject],
                peak_memory(name, setting, formats[subject]) if memory else None,
            )
        )
    return measurements


def _called_as_set(call: Callable[[], Tensor], setting: Setting) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with as_set(setting):
            return call()

    return run


def _formatted(model: nn.Module, setting: Setting, memory_format: str) -> Callable[[], Tensor]:
    layout = torch.channels_last if memory_format == "channels_last" else torch.contiguous_format
    return step(model.to(memory_format=layout), images(setting).contiguous(memory_format=layout), setting)


def _in_faster_format(
    model: nn.Module, setting: Setting, synchronize: Callable[[], None]
) -> tuple[Callable[[], Tensor], str]:
    def seconds(memory_format: str) -> float:
        call = _formatted(model, setting, memory_format)
        return min(interleaved({"": call}, 2, synchronize)[""])

    faster = min(("contiguous", "channels_last"), key=seconds)
    return _formatted(model, setting, faster), faster


def peak_memory(name: str, setting: Setting, memory_format: str) -> int | None:
    """Bytes that one call needs beyond those in use before it: activations, and gradients in training.

    Args:
        name: The model.
        setting: The setting of the call.
        memory_format: "channels_last" or "contiguous".

    Returns:
        None where it cannot be measured: on devices other than CUDA and CPUs under Linux.
    """
    if setting.device.startswith("cuda"):
        with as_set(setting):
            call = _formatted(create_for(name, setting), setting, memory_format)
            torch.cuda.synchronize(setting.device)
            torch.cuda.reset_peak_memory_stats(setting.device)
            before = torch.cuda.memory_allocated(setting.device)
            call()
            torch.cuda.synchronize(setting.device)
            return torch.cuda.max_memory_allocated(setting.device) - before
    if setting.device != "cpu" or not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, end_with_parent) as pool:
        return pool.apply(_peak_memory_here, (name, setting, memory_format, torch.get_num_threads()))


def _peak_memory_here(name: str, setting: Setting, memory_format: str, threads: int) -> int:
    torch.set_num_threads(threads)

    def kibibytes(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))

    with as_set(setting):
        call = _formatted(create_for(name, setting), setting, memory_format)
        # Call another model first: loading the libraries must not count.
        small = replace(setting, size=32, batch=1, args={})
        _formatted(create_for("vmamba_pico", small), small, "contiguous")()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        before = kibibytes("VmRSS")
        call()
        return 1024 * (kibibytes("VmHWM") - before)


def to_rows(measurements: Sequence[Measurement], setting: Setting) -> list[dict[str, Any]]:
    """Measurements with their setting, as JSON holds them."""
    return [{**asdict(setting), **asdict(measurement)} for measurement in measurements]


def draw(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Write throughput as a PNG: over size or batch where several were measured, else as bars.

    Args:
        rows: From `to_rows`.
        path: Of the picture.
    """
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
            points = sorted((row[axis], row["images_per_second"]) for row in rows if row["model"] == model)
            axes.plot(*zip(*points, strict=True), marker="o", label=model)
        axes.set(xlabel={"size": "side of the image, pixels", "batch": "batch size"}[axis], ylabel="images/s")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    save_figure(figure, path, dpi=120)
