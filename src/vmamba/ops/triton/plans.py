"""How a Triton kernel is launched: by a default plan, or by the fastest of several measured ones.

Nothing is measured unless `VMAMBA_TRITON_PLANS` in the environment names a file. A call that is not in the
file measures the candidates on its own operands, and the file keeps the fastest: from then on every call and
every process that reads the file takes that one, without measuring. Plans sum in different orders: results of
two plans differ in their last digits, those of one plan never do.
"""

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import Any

import torch

from vmamba.files import write_atomically

VARIABLE = "VMAMBA_TRITON_PLANS"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """How a kernel is launched.

    Attributes:
        programs: Programs for each group of channels.
        tiles: Tiles of the image that a program takes, one after the other.
        groups: Groups of channels, each a program's.
        blocks: Blocks of channels in a group, one after the other.
        height: Height of a tile.
        width: Width of a tile.
        channels: Channels in a block.
        warps: Warps of a program.
    """

    programs: int
    tiles: int
    groups: int
    blocks: int
    height: int
    width: int
    channels: int
    warps: int

    @property
    def grid(self) -> tuple[int, int]:
        return self.programs, self.groups

    @property
    def constants(self) -> dict[str, int]:
        return {"TILES": self.tiles, "TH": self.height, "TW": self.width, "BD": self.channels}


class PlanFile:
    """The fastest plans by call, in a JSON file.

    A file that cannot be read counts as empty; if it cannot be written, the next process measures again. Both
    are logged as warnings.

    Args:
        path: The file; it and its folder are created with the first measurement.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, Lock()
        self._plans = self._read()

    def _read(self) -> dict[str, Any]:
        try:
            plans = json.loads(self._path.read_text(encoding="utf-8"))
            if not isinstance(plans, dict):
                raise ValueError(f"expected an object by call, got {type(plans).__name__}")
            return plans
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            log.warning("%s=%s: not readable, plans are measured anew (%s)", VARIABLE, self._path, error)
            return {}

    def fastest(
        self,
        call: str,
        plans: Sequence[Plan],
        milliseconds: Callable[[Plan], float],
        *,
        measure: bool = True,
    ) -> Plan:
        """The plan in the file for a call, else the one measured now, else the first.

        Args:
            call: What the choice depends on.
            plans: Candidates; the first is the default.
            milliseconds: Time of a plan, infinite where it does not run here.
            measure: Whether to measure a call that is not in the file; otherwise it gets the default.
        """
        with self._lock:
            for plan in plans:
                if asdict(plan) == self._plans.get(call):
                    return plan
            if not measure:
                return plans[0]
            times = {plan: milliseconds(plan) for plan in plans}
            best = min(plans, key=times.__getitem__)  # of equals the first, which is the default
            log.info("%s: %s, %.3g ms; by default %.3g ms", call, best, times[best], times[plans[0]])
            self._plans[call] = asdict(best)
            self._write()
            return best

    def _write(self) -> None:
        """Write the plans, with those that other processes have written meanwhile."""
        try:
            self._plans = self._read() | self._plans
            write_atomically(self._path, json.dumps(self._plans, indent=1, sort_keys=True))
        except OSError as error:
            log.warning("%s=%s: not writable, plans are not kept (%s)", VARIABLE, self._path, error)


@cache
def _file(path: str) -> PlanFile:
    return PlanFile(Path(path).expanduser())


def plan_for(call: str, plans: Sequence[Plan], launch: Callable[[Plan], Any], device: torch.device) -> Plan:
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


def library_version() -> str:
    """The version of the installed library, for keys of what is kept."""
    try:
        return metadata.version("vmamba")
    except metadata.PackageNotFoundError:  # a checkout on the path
        return "not installed"


@cache
def _machine(device: torch.device) -> str:
    import triton

    name = "interpreter" if device.type == "cpu" else getattr(torch, device.type).get_device_name(device)
    return f"{name}, triton {triton.__version__}, vmamba {library_version()}"


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
