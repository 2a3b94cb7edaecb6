"""Time two checkouts of this repository against each other.

    python tools/compare_checkouts.py BEFORE AFTER [--models vmamba_tiny …] [--batch 8] [--rounds 12]

BEFORE and AFTER are Python interpreters with vmamba installed, or checkouts. A checkout runs with its
`.venv/bin/python` or, if it has none, with this Python and its `src` on the path; the CPU kernel is then only
there if a copy of it lies in `src/vmamba/ops`.

Each runs in a separate process, with the same weights. They take turns, in a random order in each round, so
that a drift of the machine's speed affects both. The result is the median over rounds of the ratio of their
times, after over before, with its quartiles: below 1 the change made it faster. Before any timing the
logits are compared; they must agree to the bit unless `--tolerance` allows more. The exit status is 1 if they
differ, or if the ratio is above `--limit`.

On a machine that does other work at the same time the quartiles are wide; comparing a checkout with itself
shows how wide.
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

SHORTEST = 0.2
"""Least seconds of one measurement: a faster call is repeated."""

PAUSE = 0.05
"""Seconds between turns, in which the last process' threads stop spinning."""


@dataclass(frozen=True)
class Setting:
    """The setting in which both are timed.

    Attributes:
        model: By timm's name.
        batch: Images at once.
        size: Side of the images in pixels.
        train: Forward and backward of a training step, instead of inference.
        autocast: None, "bf16" or "fp16".
        channels_last: Memory format of images and weights.
        device: As PyTorch names it.
        threads: On a CPU; None is PyTorch's own choice.
    """

    model: str
    batch: int
    size: int
    train: bool
    autocast: str | None
    channels_last: bool
    device: str
    threads: int | None


class CompareError(Exception):
    """The two cannot be compared; the message says why."""


# The worker also runs in old checkouts, so it uses nothing of vmamba but the models in timm's registry.
def work() -> None:
    """Answer a line of JSON for each line of JSON, until the input ends."""
    # Anything that a library prints goes to stderr, so that it is not mistaken for an answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    state: dict[str, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = REQUESTS[request.pop("do")](state, **request)
        except Exception as error:  # of any type: the parent process reports it
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _hello(state: dict[str, Any]) -> dict[str, Any]:
    # An editable install of vmamba in this Python would answer imports before PYTHONPATH.
    if "PYTHONPATH" in os.environ:
        sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__module__.startswith("_editable")]
    import timm
    import torch

    import vmamba

    return {"vmamba": vmamba.__file__, "torch": torch.__version__, "timm": timm.__version__}


def _build(state: dict[str, Any], setting: dict[str, Any], weights: str, save: bool) -> dict[str, Any]:
    """Make the model, save its weights or load those of the other process, and compute its logits."""
    import timm
    import torch

    s = Setting(**setting)
    state.clear()  # of the model before
    if s.threads is not None:
        torch.set_num_threads(s.threads)
    torch.manual_seed(0)
    config = timm.get_pretrained_cfg(s.model)
    kwargs = {"img_size": s.size} if config is not None and config.fixed_input_size else {}
    model = timm.create_model(s.model, **kwargs)
    if save:
        torch.save(model.state_dict(), weights)
    else:
        model.load_state_dict(torch.load(weights, weights_only=True))
    layout = torch.channels_last if s.channels_last else torch.contiguous_format
    images = torch.randn(s.batch, 3, s.size, s.size, generator=torch.Generator().manual_seed(0))
    images = images.to(s.device).contiguous(memory_format=layout)
    model = model.to(s.device).to(memory_format=layout)
    logits = _call(model.eval(), images, replace(s, train=False))()
    state["call"] = _call(model.train(s.train), images, s)
    return {"logits": logits.double().flatten().tolist(), "threads": torch.get_num_threads()}


def _call(model: Any, images: Any, s: Setting) -> Callable[[], Any]:
    """A function that calls the model as the setting says, and returns the logits."""
    import torch
    from torch.nn import functional as F

    labels = torch.arange(len(images), device=images.device)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(s.autocast or "")

    def run() -> Any:
        autocast = nullcontext() if half is None else torch.autocast(images.device.type, half)
        with nullcontext() if s.train else torch.inference_mode():
            with autocast:
                logits = model(images)
            if s.train:
                F.cross_entropy(logits.float(), labels).backward()
                for parameter in model.parameters():
                    parameter.grad = None
        if images.device.type != "cpu":
            torch.accelerator.synchronize(images.device)
        return logits.detach()

    return run


def _time(state: dict[str, Any], times: int) -> dict[str, Any]:
    """Seconds of one call, averaged over several, after one that is not timed."""
    call = state["call"]
    call()  # the caches still hold the other process's data
    start = time.perf_counter()
    for _ in range(times):
        call()
    return {"seconds": (time.perf_counter() - start) / times}


REQUESTS: dict[str, Callable[..., dict[str, Any]]] = {"hello": _hello, "build": _build, "time": _time}


class Worker:
    """A process of one checkout.

    Args:
        place: A Python interpreter, or the folder of a checkout.

    Raises:
        CompareError: `place` is neither.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        path, environment = Path(place), dict(os.environ)
        if path.is_dir():
            interpreter = path / ".venv" / "bin" / "python"
            if not interpreter.exists():
                if not (path / "src" / "vmamba").is_dir():
                    raise CompareError(
                        f"{place}: expected a Python interpreter or a checkout with src/vmamba"
                    )
                interpreter, environment["PYTHONPATH"] = Path(sys.executable), str(path.resolve() / "src")
        else:
            interpreter = path
        try:
            self.process = subprocess.Popen(
                [interpreter, __file__, "--worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
        except OSError as error:
            raise CompareError(f"{place}: cannot be run: {error.strerror}") from error

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def send(self, request: str, **arguments: Any) -> None:
        """Send the process a request."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": request, **arguments}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise CompareError(f"{self.place}: the process ended early") from error

    def receive(self) -> dict[str, Any]:
        """The process' answer to the last request.

        Raises:
            CompareError: The process failed or ended.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise CompareError(f"{self.place}: the process ended with status {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise CompareError(f"{self.place}: {answer['error']}")
        return answer

    def ask(self, request: str, **arguments: Any) -> dict[str, Any]:
        """`send` and `receive`."""
        self.send(request, **arguments)
        return self.receive()


def largest_difference(before: list[float], after: list[float]) -> float:
    """Largest difference of the logits over the largest logit; 0 if all are the same to the bit.

    Raises:
        CompareError: They differ in number, or some are not finite.
    """
    if len(before) != len(after):
        raise CompareError(f"the logits differ in number: {len(before)} and {len(after)}")
    if not all(map(math.isfinite, (*before, *after))):
        raise CompareError("some logits are not finite")
    largest = max(map(abs, before))
    return max(abs(a - b) for a, b in zip(before, after, strict=True)) / (largest or 1.0)


def take_turns(
    before: Callable[[int], float], after: Callable[[int], float], rounds: int, seed: int = 0
) -> list[float]:
    """The ratio of the times, after over before, of each round.

    Args:
        before: Makes a given number of calls, and returns the seconds of one.
        after: Likewise.
        rounds: At least 1.
        seed: Seed of the order of the two in each round.
    """
    times = max(1, math.ceil(SHORTEST / max(before(1), after(1), 1e-9)))
    draw = random.Random(seed)
    ratios = []
    for _ in range(rounds):
        seconds = {}
        for name, measure in draw.sample((("before", before), ("after", after)), 2):
            seconds[name] = measure(times)
        ratios.append(seconds["after"] / seconds["before"])
    return ratios


def quartiles(ratios: list[float]) -> tuple[float, float, float]:
    """The first quartile, the median and the third quartile."""
    if len(ratios) == 1:
        return ratios[0], ratios[0], ratios[0]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, median, high


def compare(workers: tuple[Worker, Worker], setting: Setting, options: argparse.Namespace) -> bool:
    """Compare at one setting and print a line; returns whether the result is within the limits."""
    before, after = workers
    with tempfile.TemporaryDirectory() as folder:
        build = {"setting": asdict(setting), "weights": str(Path(folder) / "weights.pt")}
        logits = [worker.ask("build", **build, save=worker is before)["logits"] for worker in workers]
    difference = largest_difference(*logits)
    same = difference <= options.tolerance

    def measure(worker: Worker) -> Callable[[int], float]:
        def seconds(times: int) -> float:
            time.sleep(PAUSE)
            return float(worker.ask("time", times=times)["seconds"])

        return seconds

    low, median, high = quartiles(take_turns(measure(before), measure(after), options.rounds, options.seed))
    agreement = "the same logits" if difference == 0 else f"logits differ by {difference:.1e} of the largest"
    fast_enough = options.limit is None or median <= options.limit
    verdict = "" if same and fast_enough else ": NOT AS ASKED FOR"
    print(
        f"{setting.model}, {'training step' if setting.train else 'inference'}, batch {setting.batch}, "
        f"{setting.size}²: after / before {median:.3f} ({low:.3f}–{high:.3f}), {agreement}{verdict}",
        flush=True,
    )
    return same and fast_enough


def positive(text: str) -> int:
    """A whole number of at least 1, of the command line."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", help="Python interpreter or checkout")
    parser.add_argument("after", help="Python interpreter or checkout")
    parser.add_argument("--models", nargs="+", default=["vmamba_tiny"], metavar="NAME")
    parser.add_argument("--batch", type=positive, nargs="+", default=[8])
    parser.add_argument("--input", type=positive, nargs="+", default=[224], help="side of the images")
    parser.add_argument("--train", action="store_true", help="a training step: forward and backward")
    parser.add_argument("--autocast", choices=("bf16", "fp16"))
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=positive)
    parser.add_argument("--rounds", type=positive, default=12)
    parser.add_argument("--seed", type=int, default=0, help="of the order in each round")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        help="of logits, over the largest; default the same to the bit",
    )
    parser.add_argument("--limit", type=float, help="the largest ratio that is allowed, such as 1.02")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Compare at every setting; returns 0 if all results are within the limits."""
    options = parse(arguments)
    settings = [
        Setting(
            model,
            batch,
            size,
            options.train,
            options.autocast,
            options.channels_last,
            options.device,
            options.threads,
        )
        for model in options.models
        for size in options.input
        for batch in options.batch
    ]
    try:
        with ExitStack() as stack:
            before = stack.enter_context(Worker(options.before))
            after = stack.enter_context(Worker(options.after))
            for worker in (before, after):
                worker.send("hello")
            for name, worker in {"before": before, "after": after}.items():
                facts = worker.receive()
                print(f"{name}: {facts['vmamba']}, torch {facts['torch']}, timm {facts['timm']}", flush=True)
            as_asked = [compare((before, after), setting, options) for setting in settings]
    except CompareError as error:
        print(f"compare_checkouts: {error}", file=sys.stderr)
        return 2
    return 0 if all(as_asked) else 1


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        work()
    else:
        sys.exit(main())
