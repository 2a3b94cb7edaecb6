"""The proof of a backend on a device: is it right there, and faster than `chunked`?

Forward and every gradient of small calls are judged against `reference` by the tests' criterion
(`vmamba.ops.accuracy`), twice for equal bits; then larger ones are timed beside `chunked`. All of it runs in
another process, because a kernel may hang or leave the device's context unusable.

Sizes: b batch, h height, w width, d channels, k routes, n state size, r rank of delta.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vmamba.ops.backend import Backend
from vmamba.ops.verdicts import Verdict, machine
from vmamba.processes import end_within, kill_group

if TYPE_CHECKING:
    from vmamba.ops.accuracy import Deviation

LIMIT = 180.0
"""Seconds for a proof at first use; most of it compiles kernels, which Triton then keeps."""

LIMIT_THOROUGH = 1800.0
"""Seconds for a proof by `vmamba prove`."""

NOT_FOR_THE_PROOF = ("VMAMBA_ENGINE", "VMAMBA_TRITON_PLANS")
"""Environment variables that the other process does not see: the proof is of the default."""

_MARK = "vmamba-proof:"


@dataclass(frozen=True)
class Case:
    """One call of the operator along the routes of "cross"."""

    batch: int
    height: int
    width: int
    channels: int
    n_state: int
    rank: int | None
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        sizes = (self.batch, self.height, self.width, self.channels, self.n_state, self.rank)
        return f"(b, h, w, d, n, r) = {sizes} in {str(self.dtype).removeprefix('torch.')}"

    @property
    def fields(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**vars(self), "dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Case:
        """From `fields`."""
        return cls(**{**fields, "dtype": getattr(torch, fields["dtype"])})

    def operands(self) -> dict[str, Any]:
        """The same values each time."""
        from vmamba.ops.accuracy import operands

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(str(self).encode()))
            sizes = (self.batch, self.height, self.width, self.channels, self.n_state, self.rank)
            return operands(*sizes, dtype=self.dtype)


def _cases(
    images: Iterable[tuple[int, int, int, int, int | None]],
    states: Iterable[int],
    dtypes: Iterable[torch.dtype],
) -> tuple[Case, ...]:
    states, dtypes = tuple(states), tuple(dtypes)
    return tuple(Case(*image[:4], n, image[4], dtype) for image in images for dtype in dtypes for n in states)


_HALF = (torch.bfloat16, torch.float16)
_TILES, _WHOLE = (1, 9, 18, 40, 3), (2, 7, 7, 40, 6)
CASES = (
    *_cases([_TILES, _WHOLE], (1, 16), (torch.float32, *_HALF)),
    *_cases([(2, 9, 12, 40, 3)], (1, 16), [torch.float32]),
)
"""Images of several tiles, of one tile, and of one tile in forward alone; channels that fill no block."""

CASES_THOROUGH = (
    *_cases([_TILES, _WHOLE, (2, 9, 12, 40, 3)], (1, 16), (torch.float32, *_HALF)),
    *_cases([_TILES, _WHOLE], (1, 16), [torch.float64]),
    *_cases([(1, 28, 28, 96, 6), (1, 14, 14, 384, 24), (3, 7, 7, 130, 48)], (1, 16), (torch.float32, *_HALF)),
    *_cases(
        [(1, 33, 20, 24, None), (1, 1, 140, 8, 2), (1, 140, 1, 8, 2), (2, 1, 1, 130, 4)],
        (1, 3, 16, 64),
        (torch.float32, torch.bfloat16),
    ),
)

TIMED: tuple[Case, ...] = (
    Case(8, 56, 56, 96, 1, 6),
    Case(8, 14, 14, 384, 1, 24),
    Case(4, 28, 28, 96, 16, 12),
)
"""What is timed, forward and with backward: layers of a model at a small batch."""


@dataclass
class Findings:
    """What the other process reports.

    Attributes:
        failures: What failed, in words; empty if nothing did.
        checked: How many calls were judged.
        speedups: As in `Verdict`.
        cases: Each call with its deviations, for the report.
        lasting: As in `Verdict`.
    """

    failures: list[str] = field(default_factory=list)
    checked: int = 0
    speedups: dict[str, float] = field(default_factory=dict)
    cases: list[dict[str, Any]] = field(default_factory=list)
    lasting: bool = True


def check(
    backend: str, device: torch.device, cases: Iterable[Case], timed: Iterable[Case], thorough: bool = False
) -> Findings:
    """Judge and time a backend in this process.

    Args:
        backend: Its name.
        device: Where.
        cases: Calls to judge; the first that fails ends the proof, unless it is thorough.
        timed: Calls to time, if all others passed.
        thorough: Whether to judge all calls, and time, whatever fails.
    """
    findings = Findings()
    try:
        torch.zeros(1, device=device).sum().item()
    except (RuntimeError, AssertionError) as error:
        findings.failures.append(f"a second process cannot use the device: {_first_line(error)}")
        findings.lasting = False
        return findings
    for step, case in _steps(cases, timed):
        try:
            step(backend, device, case, findings)
        except torch.OutOfMemoryError as error:
            findings.failures.append(f"{case}: {_first_line(error)}")
            findings.lasting = False
            break
        except Exception as error:  # whatever a compiler or a driver raises is a reason not to use it
            findings.failures.append(f"{case}: {type(error).__name__}: {_first_line(error)}")
        if findings.failures and not thorough:
            break
    return findings


def _steps(cases: Iterable[Case], timed: Iterable[Case]) -> Iterator[tuple[Callable[..., None], Case]]:
    yield from ((_judge, case) for case in cases)
    yield from ((_time, case) for case in timed)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:300]


def _judge(backend: str, device: torch.device, case: Case, findings: Findings) -> None:
    """Compare y and all gradients with the truth, computed on the CPU, and with a second run."""
    from vmamba.ops.accuracy import cast, deviations, value_and_gradients

    exact = case.operands()
    call, grad_y = cast(exact, device=device), torch.ones_like(exact["x"]) - 0.5 * exact["x"].detach()
    true = value_and_gradients(cast(exact, torch.float64), grad_y, backend="reference")
    reference = value_and_gradients(call, grad_y.to(device), backend="reference")
    first, second = (value_and_gradients(call, grad_y.to(device), backend=backend) for _ in range(2))
    findings.checked += 1
    if case.dtype == torch.float64:
        judged = [_float64_deviation(name, first[name].cpu(), t) for name, t in true.items()]
    else:
        judged = deviations([true], [reference], [first])
    changed = [name for name, t in first.items() if not torch.equal(t, second[name])]
    findings.failures += [f"{case}: {deviation}" for deviation in judged if not deviation.within]
    if changed:
        findings.failures.append(f"{case}: other bits when run again: {', '.join(changed)}")
    findings.cases.append(
        {
            "case": str(case),
            "other bits": changed,
            "deviations": {d.name: {"error": d.error, "allowed": d.allowed} for d in judged},
        }
    )


def _float64_deviation(name: str, computed: Tensor, true: Tensor) -> Deviation:
    """float64 is as exact as the truth itself; what may differ is the order of sums."""
    from vmamba.ops.accuracy import Deviation

    return Deviation(name, (computed - true).abs().max().item(), 0.0, 1e-12 * true.abs().max().item())


def _time(backend: str, device: torch.device, case: Case, findings: Findings) -> None:
    """Compare the time with that of `chunked`: the best of three rounds in turns."""
    from torch.utils.benchmark import Timer

    from vmamba.ops.accuracy import cast, given, value_and_gradients
    from vmamba.ops.selective_scan import selective_scan_2d

    call = cast(case.operands(), device=device)
    fixed = {name: t.detach() if name in given(call) else t for name, t in call.items()}
    grad_y = torch.ones_like(fixed["x"])

    def clock() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    runs: dict[str, Callable[[str], Any]] = {
        "forward": lambda name: selective_scan_2d(**fixed, backend=name),
        "forward and backward": lambda name: value_and_gradients(call, grad_y, backend=name),
    }
    for what, run in runs.items():
        best = dict.fromkeys((backend, "chunked"), math.inf)
        for _ in range(3):
            for name in best:
                timer = Timer("run(name)", globals={"run": run, "name": name}, timer=clock)
                best[name] = min(best[name], timer.timeit(5).median)
        ratio = best["chunked"] / best[backend]
        findings.speedups[f"{what} of {case}"] = round(ratio, 3)
        if not ratio > 1:
            findings.failures.append(
                f"{case}: slower than 'chunked', {what} {1e3 * best[backend]:.3g} ms against "
                f"{1e3 * best['chunked']:.3g} ms"
            )


@dataclass(frozen=True)
class Proof:
    """A verdict and what it rests on, for a report.

    Attributes:
        verdict: The verdict.
        failures: All that failed.
        cases: Each call with its deviations.
        log: The end of what the other process wrote to its standard error.
    """

    verdict: Verdict
    failures: list[str]
    cases: list[dict[str, Any]]
    log: str


def prove(
    backend: Backend,
    device: torch.device,
    *,
    thorough: bool = False,
    limit: float | None = None,
    calls: tuple[Iterable[Case], Iterable[Case]] | None = None,
) -> Proof:
    """Prove a backend on a device in another process.

    Args:
        backend: The backend.
        device: With its index.
        thorough: More shapes and all types.
        limit: Seconds after which the process is killed with those that it started; default `LIMIT`, and
            `LIMIT_THOROUGH` for a thorough proof.
        calls: What to judge and what to time instead of the usual.
    """
    limit = limit or (LIMIT_THOROUGH if thorough else LIMIT)
    start = time.monotonic()
    findings, log = _in_another_process(backend, device, thorough, limit, calls)
    verdict = Verdict(
        backend.name,
        machine(backend, device),
        _summary(findings.failures),
        findings.checked,
        findings.speedups,
        round(time.monotonic() - start, 1),
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
        findings.lasting,
    )
    return Proof(verdict, findings.failures, findings.cases, log)


def _summary(failures: list[str]) -> str | None:
    if len(failures) < 2:
        return failures[0] if failures else None
    return f"{failures[0]} (and {len(failures) - 1} more)"


_CHILD = """
import json, sys, types
arguments = json.loads(sys.argv[1])
sys.path[:] = arguments["path"]
package = types.ModuleType("vmamba")  # without the models, so that timm is not imported
package.__path__ = arguments["package"]
sys.modules["vmamba"] = package
from vmamba.ops.proof import main
main(arguments)
"""


def _in_another_process(
    backend: Backend,
    device: torch.device,
    thorough: bool,
    limit: float,
    calls: tuple[Iterable[Case], Iterable[Case]] | None,
) -> tuple[Findings, str]:
    """What the other process found, or how it ended without an answer; and the end of its errors."""
    arguments = {
        "path": [entry for entry in sys.path if entry],
        "package": [str(Path(__file__).parents[1])],
        "module": backend.forward.__module__,
        "backend": backend.name,
        "device": str(device),
        "thorough": thorough,
        "limit": limit,
        "calls": calls and [[case.fields for case in cases] for cases in calls],
        "starter": os.getpid(),
    }
    environment = {name: value for name, value in os.environ.items() if name not in NOT_FOR_THE_PROOF}
    command = [sys.executable, "-c", _CHILD, json.dumps(arguments)]
    try:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="backslashreplace",
            start_new_session=True,
        )
    except OSError as error:
        return Findings([f"no process could be started for the proof: {error}"], lasting=False), ""
    try:
        output, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        return Findings([f"the proof did not end within {limit:g} s"]), ""
    finally:
        if process.returncode is None:
            kill_group(process)
            process.communicate()
    return _answer(output, process.returncode, errors), errors[-4000:]


def _answer(output: str, status: int, errors: str) -> Findings:
    answers = [line for line in output.splitlines() if line.startswith(_MARK)]
    if answers:
        return Findings(**json.loads(answers[-1].removeprefix(_MARK)))
    last = (errors.strip().splitlines() or ["it wrote nothing"])[-1][:300]
    return Findings([f"the process of the proof ended with status {status}: {last}"])


def main(arguments: dict[str, Any]) -> None:
    """What the other process does: prove, print the findings, and end whatever state the device is in."""
    end_within(arguments["limit"], arguments["starter"])
    import_module(arguments["module"])
    cases: tuple[Case, ...] = CASES_THOROUGH if arguments["thorough"] else CASES
    timed = TIMED
    if arguments["calls"] is not None:
        cases, timed = (tuple(map(Case.of, each)) for each in arguments["calls"])
    device = torch.device(arguments["device"])
    findings = check(arguments["backend"], device, cases, timed, arguments["thorough"])
    print(f"\n{_MARK}{json.dumps(vars(findings))}", flush=True)
    sys.stderr.flush()
    os._exit(0)
