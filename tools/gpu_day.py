"""The first hour on a GPU: what is right, how fast it is, and where the time goes.

    python tools/gpu_day.py --out DIR [STAGE …] [--wheels FOLDER] [--toy]

Each stage runs in a process of its own, for at most eight minutes, and leaves its log and results in DIR as
it goes, whatever the others do. A plain checkout will do; pure-Python wheels that the machine lacks (timm,
pytest, hypothesis) are put on the path from a folder. `--toy` runs every stage at toy sizes with the kernels
interpreted on the CPU (TRITON_INTERPRET=1): a test of this file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PATHS = [str(ROOT / folder) for folder in ("src", "tests", "tools", "benchmarks")]

LIMIT = 480.0
"""Seconds of a stage."""

MARGIN = 45.0
"""Seconds before the limit in which nothing new is begun."""


@dataclass(frozen=True)
class Scale:
    """What is measured, at its size."""

    device: str = "cuda"
    batch: int = 128
    size: int = 224
    rounds: int = 5
    models: tuple[str, ...] = ("vmamba_tiny_s1l8", "vmamba_tiny")
    larger: tuple[str, ...] = ("vmamba_small", "vmamba_base")
    peers: tuple[str, ...] = (
        "swin_tiny_patch4_window7_224",
        "convnext_tiny",
        "deit_small_patch16_224",
        "resnet50",
    )
    high: tuple[tuple[int, int], ...] = ((512, 32), (768, 16), (1024, 8))
    """Sides of large images, and how many at once."""
    copied: int = 2**30
    """Bytes of the copy by which the bandwidth is measured."""
    tests: tuple[str, ...] = ("-m", "gpu", "tests/ops/test_gpu.py")
    interpreted: bool = False


TOY = Scale(
    device="cpu",
    batch=2,
    size=16,
    rounds=1,
    models=("gpu_day_toy",),
    larger=(),
    peers=("test_resnet",),
    high=((20, 2),),
    copied=2**20,
    tests=("tests/ops/test_triton.py::test_neighbours_in_memory_are_packed_without_a_copy",),
    interpreted=True,
)


@dataclass
class Day:
    """A stage's place, size and time.

    Attributes:
        out: The folder of results.
        stage: Its name.
        scale: What is measured.
        end: When nothing new is begun, by `time.monotonic`.
        rows: The results so far.
    """

    out: Path
    stage: str
    scale: Scale
    end: float
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.end

    def add(self, line: str, **row: Any) -> None:
        """Print a line, and write all rows so far."""
        from vmamba.environment import environment
        from vmamba.files import write_atomically

        print(line, flush=True)
        self.rows.append(row)
        text = json.dumps({"environment": environment(), "results": self.rows}, indent=1)
        write_atomically(self.out / f"{self.stage}.json", text + "\n")

    def attempt(self, name: str, work: Callable[[], None]) -> bool:
        """Do a part of the stage unless its time is over; what it raises is a result too."""
        if self.is_over:
            self.add(f"{name}: left out, the time is over", name=name, error="the time is over")
            return False
        try:
            work()
        except Exception as error:  # whatever a model, a compiler or a driver raises is a result
            first = (str(error).splitlines() or [type(error).__name__])[0]
            self.add(f"{name}: FAILED: {first}", name=name, error=str(error))
            return False
        return True


def environment(day: Day) -> None:
    """Card, driver, versions, and the bandwidth of a copy."""
    import torch

    from vmamba.ops import verdicts
    from vmamba.ops._registry import get_backend

    device = torch.device(day.scale.device)
    backend = get_backend("triton")
    machine = verdicts.machine(backend, torch.empty(0, device=device).device)
    facts: dict[str, Any] = {}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts = {
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": [properties.major, properties.minor],
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        }
    day.add(f"{machine}", machine=machine, **facts)
    rate = bandwidth(day.scale)
    day.add(f"a copy moves {rate / 1e9:,.0f} GB/s, read and written", bytes_per_second=rate)


def bandwidth(scale: Scale) -> float:
    """Bytes a second of a copy, read and written."""
    import torch

    from vmamba.bench.timing import interleaved, synchronizer

    source = torch.zeros(scale.copied, dtype=torch.uint8, device=scale.device)
    target = torch.empty_like(source)
    seconds = interleaved({"copy": lambda: target.copy_(source)}, 3, synchronizer(scale.device))
    return 2 * scale.copied / min(seconds["copy"])


def proof(day: Day) -> None:
    """The proof at first use, then the thorough one."""
    import torch

    from vmamba.ops._registry import get_backend
    from vmamba.ops.proof import Case, prove
    from vmamba.ops.verdicts import keep

    device = torch.empty(0, device=day.scale.device).device
    triton, limit = get_backend("triton"), LIMIT / 2 - MARGIN
    small = ((Case(1, 3, 3, 8, 1, 2),), ()) if day.scale.interpreted else None
    for thorough in (False,) if day.scale.interpreted else (False, True):
        found = prove(triton, device, thorough=thorough, limit=limit, calls=small)
        if not (thorough or day.scale.interpreted):
            keep(triton, device, found.verdict)
        verdict = found.verdict.reason or f"right and faster: {found.verdict.speedups}"
        name = "thorough" if thorough else "at first use"
        line = f"{name}: {found.verdict.checked} calls in {found.verdict.seconds:.0f} s; {verdict}"
        day.add(line, name=name, **asdict(found))


def tests(day: Day) -> None:
    """`pytest -m gpu`."""
    plugins = ["-W", "ignore::pytest.PytestConfigWarning", "-o", "addopts=-ra", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", *plugins, *day.scale.tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT - MARGIN)
    print(done.stdout, done.stderr)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    day.add(last, name=" ".join(day.scale.tests), status=done.returncode, output=done.stdout[-20000:])
    if done.returncode:
        raise SystemExit(1)


def parity(day: Day) -> None:
    """Both micro models beside the authors' numbers, computed on the device by `triton`."""
    import parity as tool
    import torch

    from vmamba.ops import use_backend

    torch.backends.cudnn.allow_tf32 = False
    names, most = (("v2_micro",), 5) if day.scale.interpreted else (("v2_micro", "vanilla_micro"), None)
    right = []
    for name in names:
        file = tool.read(ROOT / "tests" / "data" / f"{name}.safetensors", day.scale.device)
        with use_backend("triton"):
            differences = list(islice(tool.check_vmamba(file), most))
        right.append(all(each.within for each in differences))
        rows = [{**asdict(each), "within": each.within} for each in differences]
        day.add("\n".join([name, *map(str, differences)]), name=name, differences=rows)
    if not all(right):
        raise SystemExit(1)


def operator(day: Day) -> None:
    """The scan of each stage beside its floor, `chunked`, and other packages where they can be imported."""
    from triton_traffic import floors

    from vmamba.bench.operator import shapes

    rate = bandwidth(day.scale)
    for shape in shapes(day.scale.models[-1], day.scale.size):
        for backward in (False, True):
            floor = sum(floors(shape, day.scale.batch, None)[: 1 + backward]) / rate
            name = f"{shape.height}x{shape.width}x{shape.channels}" + (" with backward" if backward else "")

            day.attempt(name, partial(_bench_scan, day, shape, backward, floor, name))


def _bench_scan(day: Day, shape: Any, backward: bool, floor: float, name: str) -> None:
    from vmamba.bench.operator import bench_operator, values_of

    batch, rounds, device = day.scale.batch, day.scale.rounds, day.scale.device
    for m in bench_operator(shape, batch, backward=backward, device=device, rounds=rounds):
        seconds = m.nanoseconds * 1e-9 * values_of(shape) * batch
        line = f"{name}: {m.backend} {1e3 * seconds:.3f} ms, {seconds / floor:.2f} x its floor"
        day.add(line, name=name, floor_seconds=floor, seconds=seconds, **asdict(m))


def _settings(scale: Scale) -> list[tuple[str, bool, str | None, bool]]:
    """Name, training, autocast, TF32: in the order of worth."""
    kinds = (("bf16", "bf16", True), ("TF32", None, True), ("float32", None, False))
    return [
        (f"{name}, {'training' if train else 'inference'}", train, autocast, tf32)
        for train in (False, True)
        for name, autocast, tf32 in kinds
    ]


def _bench(day: Day, names: Sequence[str], label: str, tf32: bool, setting: Any) -> None:
    """Time models in turns; the first is what the others are compared with."""
    import torch

    from vmamba.bench.models import bench_models, to_rows

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32

    def measure() -> None:
        measured = bench_models(names, setting, day.scale.rounds)
        for m, row in zip(measured, to_rows(measured, setting), strict=True):
            speed = f"{m.images_per_second:,.1f} images/s; {names[0]} is {m.ratio.median:.2f} x"
            day.add(f"{label}: {m.model} {speed}", name=label, tf32=tf32, **row)

    day.attempt(label, measure)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def models(day: Day) -> None:
    """VMamba-T beside its peers, then S and B: inference and training, in bf16, TF32 and float32."""
    from vmamba.bench.models import Setting

    scale = day.scale
    for group in ((*scale.models, *scale.peers), scale.larger):
        for label, train, autocast, tf32 in _settings(scale) if group else ():
            setting = Setting(scale.size, scale.batch, train, autocast, scale.device, "triton")
            _bench(day, group, f"{scale.size}², {label}", tf32, setting)


def high_resolution(day: Day) -> None:
    """VMamba-T beside its peers on large images, in bf16."""
    from vmamba.bench.models import Setting

    scale = day.scale
    for size, batch in scale.high:
        for train in (False, True):
            setting = Setting(size, batch, train, "bf16", scale.device, "triton")
            label = f"{size}², bf16, {'training' if train else 'inference'}"
            _bench(day, (*scale.models, *scale.peers), label, True, setting)


def memory(day: Day) -> None:
    """The peak memory of a call of each model, beyond what it holds before."""
    from vmamba.bench.models import Setting, peak_memory

    scale = day.scale
    backend = "chunked" if scale.interpreted else "triton"  # on a CPU yet another process measures it
    for train in (True, False):
        setting = Setting(scale.size, scale.batch, train, "bf16", scale.device, backend)
        for name in scale.peers if scale.interpreted else (*scale.models, *scale.peers, *scale.larger):
            label = f"{name}, {'training' if train else 'inference'}"

            def measure(name: str = name, setting: Any = setting, label: str = label) -> None:
                peak = peak_memory(name, setting, "channels_last")
                told = "not measured" if peak is None else f"{peak / 2**20:,.0f} MiB"
                day.add(f"{label}: {told}", name=label, model=name, bytes=peak, **asdict(setting))

            day.attempt(label, measure)


def profile(day: Day) -> None:
    """Where the time of a call of VMamba-T goes, by kernel."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    from vmamba.bench.models import Setting, create_for, images, on_backend, step
    from vmamba.bench.timing import synchronizer

    scale = day.scale
    on_device = [] if scale.device == "cpu" else [getattr(ProfilerActivity, scale.device.upper())]
    for train in (False, True):
        setting = Setting(scale.size, scale.batch, train, "bf16", scale.device, "triton")
        label = f"{scale.models[0]}, bf16, {'training' if train else 'inference'}"

        def measure(setting: Any = setting, label: str = label) -> None:
            with on_backend("triton"):
                model = create_for(scale.models[0], setting).to(memory_format=torch.channels_last)
                call = step(model, images(setting).to(memory_format=torch.channels_last), setting)
                for _ in range(1 if scale.interpreted else 3):
                    call()
                synchronizer(scale.device)()
                with profiler(activities=[ProfilerActivity.CPU, *on_device]) as recorded:
                    call()
                    synchronizer(scale.device)()
            by_name = recorded.key_averages()
            column = "self_device_time_total" if on_device else "self_cpu_time_total"
            table = by_name.table(sort_by=column, row_limit=40, max_name_column_width=70)
            times = {e.key: getattr(e, column) for e in by_name if getattr(e, column) > 0}
            times = dict(sorted(times.items(), key=lambda item: -item[1]))
            day.add(f"{label}\n{table}", name=label, microseconds=times)

        day.attempt(label, measure)


def tuning(day: Day) -> None:
    """The plans of the kernels, measured at the shapes of the models, and what they gain."""
    import torch

    from vmamba.bench.operator import operands, shapes
    from vmamba.bench.timing import interleaved, ratio, synchronizer
    from vmamba.ops.accuracy import given, value_and_gradients
    from vmamba.ops.triton import plans

    scale = day.scale
    path = day.out / "plans.json"
    for shape in dict.fromkeys(
        s for name in (*scale.models, *scale.larger) for s in shapes(name, scale.size)
    ):
        for dtype in (torch.bfloat16, torch.float32):
            label = f"{shape.height}x{shape.width}x{shape.channels}, {str(dtype).removeprefix('torch.')}"

            def measure(shape: Any = shape, dtype: torch.dtype = dtype, label: str = label) -> None:
                call = operands(shape, scale.batch * shape.lines, scale.device)
                call |= {name: call[name].to(dtype) for name in ("x", "delta", "B", "C")}
                call |= {name: t.detach().requires_grad_() for name, t in given(call).items()}
                grad_y = torch.ones_like(call["x"])

                def run(file: Path | None) -> None:
                    os.environ[plans.VARIABLE] = "" if file is None else str(file)
                    value_and_gradients(call, grad_y, backend="triton")

                both = {"tuned": lambda: run(path), "default": lambda: run(None)}
                seconds = interleaved(both, scale.rounds, synchronizer(scale.device))
                gain = ratio(seconds["tuned"], seconds["default"])
                day.add(f"{label}: tuned is {gain.median:.2f} x", name=label, gain=asdict(gain), **seconds)

            day.attempt(label, measure)
    os.environ.pop(plans.VARIABLE, None)


STAGES: dict[str, Callable[[Day], None]] = {
    "environment": environment,
    "proof": proof,
    "tests": tests,
    "parity": parity,
    "operator": operator,
    "models": models,
    "high_resolution": high_resolution,
    "memory": memory,
    "profile": profile,
    "tuning": tuning,
}
"""In the order of worth, but for the environment."""


def run_stage(name: str, out: Path, scale: Scale, limit: float) -> int:
    """What the process of a stage does; returns its exit status."""
    from vmamba.processes import end_within

    end_within(limit, os.getppid())
    if scale.interpreted:
        _make_toys()
    day = Day(out, name, scale, time.monotonic() + limit - MARGIN)
    STAGES[name](day)
    return 1 if any("error" in row for row in day.rows) else 0


def _make_toys() -> None:
    """A model of one block, few programs for the interpreter, and one call a measurement."""
    from timm.models import register_model

    from interpreter import speed_up
    from vmamba import VMamba
    from vmamba.bench import timing
    from vmamba.ops.triton import backend

    @register_model
    def gpu_day_toy(pretrained: bool = False, **kwargs: Any) -> VMamba:
        cfg = {"input_size": (3, 16, 16), "num_classes": 10, "fixed_input_size": False}
        model = VMamba(num_classes=10, depths=(1,), dims=(8,), dt_rank=1)
        model.pretrained_cfg = model.default_cfg = cfg
        return model

    speed_up()
    backend.SETTINGS = dict.fromkeys(backend.SETTINGS, ((2**14, 8, 8), (1, 8, 8)))
    timing.SHORTEST = 0.0


def start_stage(name: str, options: argparse.Namespace) -> tuple[int, float]:
    """Run a stage in a process of its own, with its log in a file; its exit status and seconds."""
    from vmamba.processes import kill_group

    command = [sys.executable, str(Path(__file__).resolve()), *options.passed, "--inside", name]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path[1:]), "PYTHONUNBUFFERED": "1"}
    if options.toy:
        variables["TRITON_INTERPRET"] = "1"
    start = time.monotonic()
    with (options.out / f"{name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=variables, start_new_session=True
        )
        try:
            status = process.wait(timeout=options.limit + 10)
        except subprocess.TimeoutExpired:  # it ends itself before, unless it is stuck
            kill_group(process)
            status = process.wait()
    return status, time.monotonic() - start


def report(out: Path, statuses: dict[str, tuple[int, float]]) -> str:
    """What stands where, as Markdown."""
    lines = [f"# {out.name}", "", "| stage | | seconds | files |", "|---|---|---|---|"]
    for name, (status, seconds) in statuses.items():
        files = ", ".join(file.name for file in sorted(out.glob(f"{name}.*")))
        lines.append(f"| {name} | {'passed' if status == 0 else 'FAILED'} | {seconds:.0f} | {files} |")
    return "\n".join(lines) + "\n"


def default_folder() -> Path:
    """benchmarks/results/gpu/<card>-<date>."""
    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    name = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    return ROOT / "benchmarks" / "results" / "gpu" / f"{name}-{datetime.now(timezone.utc):%Y-%m-%d}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; default all")
    parser.add_argument("--out", type=Path, help="default benchmarks/results/gpu/<card>-<date>")
    parser.add_argument("--wheels", type=Path, help="a folder of pure-Python wheels to put on the path")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of a stage")
    parser.add_argument("--toy", action="store_true", help="toy sizes, interpreted on the CPU")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.stages if name not in STAGES]:
        parser.error(f"no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    if options.wheels is not None and not options.wheels.is_dir():
        parser.error(f"--wheels {options.wheels}: no such folder")
    wheels = sorted(map(str, options.wheels.resolve().glob("*.whl"))) if options.wheels else []
    sys.path[1:1] = [*PATHS, *wheels]
    options.out = (options.out or default_folder()).resolve()
    options.passed = ["--out", str(options.out), "--limit", str(options.limit)]
    options.passed += ["--toy"] if options.toy else []
    if options.inside:
        return run_stage(options.inside, options.out, TOY if options.toy else Scale(), options.limit)
    options.out.mkdir(parents=True, exist_ok=True)
    statuses = {}
    for name in options.stages or STAGES:
        statuses[name] = start_stage(name, options)
        (options.out / "README.md").write_text(report(options.out, statuses), encoding="utf-8")
        print(report(options.out, {name: statuses[name]}).splitlines()[-1], flush=True)
    print(f"{options.out}/README.md")
    return 1 if any(status for status, _ in statuses.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
