"""Which plan a kernel of the engine `triton` is launched by: the default one, or the fastest of a few.

Nothing is measured unless `VMAMBA_TRITON_PLANS` in the environment names a file. A call that the file does
not know measures the candidates on its own operands, and the file keeps the fastest: from then on every call
and every process that reads the file takes that one, without measuring. Plans sum in different orders: from
plan to plan results differ in their last digits, from call to call by one plan never.
"""

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vmamba.ops.triton import Plan

VARIABLE = "VMAMBA_TRITON_PLANS"

log = logging.getLogger(__name__)


class PlanFile:
    """The fastest plans by call, in a JSON file.

    A file that cannot be read counts as empty, one that cannot be written keeps nothing for the next process;
    a warning tells of both.

    Args:
        path: Of the file; it and its folder are made with the first measurement.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, Lock()
        self._known = self._read()

    def _read(self) -> dict[str, Any]:
        try:
            known = json.loads(self._path.read_text(encoding="utf-8"))
            if not isinstance(known, dict):
                raise ValueError(f"expected an object by call, got {type(known).__name__}")
            return known
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            log.warning("%s=%s: not readable, plans are measured anew (%s)", VARIABLE, self._path, error)
            return {}

    def fastest(
        self,
        call: str,
        plans: Sequence["Plan"],
        milliseconds: Callable[["Plan"], float],
        *,
        measure: bool = True,
    ) -> "Plan":
        """The plan that the file has for a call, else the one measured now, else the first.

        Args:
            call: What the choice depends on.
            plans: Candidates; the first is the default.
            milliseconds: Time of a plan, infinite where it does not run here.
            measure: Whether this is a time to measure; otherwise the default serves what is not known.
        """
        with self._lock:
            for plan in plans:
                if asdict(plan) == self._known.get(call):
                    return plan
            if not measure:
                return plans[0]
            times = {plan: milliseconds(plan) for plan in plans}
            best = min(plans, key=times.__getitem__)  # of equals the first, which is the default
            log.info("%s: %s, %.3g ms; by default %.3g ms", call, best, times[best], times[plans[0]])
            self._known[call] = asdict(best)
            self._write()
            return best

    def _write(self) -> None:
        """With what other processes have added meanwhile, and whole or not at all."""
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._known = self._read() | self._known
            try:
                temporary.write_text(json.dumps(self._known, indent=1, sort_keys=True), encoding="utf-8")
                os.replace(temporary, self._path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s=%s: not writable, plans are not kept (%s)", VARIABLE, self._path, error)


@cache
def _file(path: str) -> PlanFile:
    return PlanFile(Path(path).expanduser())


def plan_for(
    call: str, plans: Sequence["Plan"], launch: Callable[["Plan"], Any], device: torch.device
) -> "Plan":
    """The first of the plans, or the fastest where `VMAMBA_TRITON_PLANS` is set.

    Args:
        call: What the choice depends on besides the device and the versions of Triton and vmamba.
        plans: Candidates; the first is the default.
        launch: Runs the kernel by a plan, any number of times with the same result.
        device: On which it runs; while a CUDA graph is captured there nothing is measured.
    """
    path = os.environ.get(VARIABLE)
    if not path or len(plans) == 1 or device.type == "meta":
        return plans[0]
    return _file(path).fastest(
        f"{_machine(device)}: {call}",
        plans,
        lambda plan: _milliseconds(partial(launch, plan), device),
        measure=not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()),
    )


@cache
def _machine(device: torch.device) -> str:
    import triton

    name = "interpreter" if device.type == "cpu" else getattr(torch, device.type).get_device_name(device)
    return f"{name}, triton {triton.__version__}, vmamba {version('vmamba')}"


def _milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    """Median time of a launch; infinite where the GPU has not the shared memory or the registers for it."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        if device.type == "cpu":  # interpreted
            start = perf_counter()
            run()
            return 1e3 * (perf_counter() - start)
        return float(do_bench(run, warmup=5, rep=20, return_mode="median"))
    except OutOfResources:
        return float("inf")
