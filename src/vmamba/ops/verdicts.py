"""What the proof of a backend on a device found, kept in the user's cache folder.

A verdict is of one kind of device, its driver, PyTorch, Triton, and this version of the backend: where one of
them changes, the backend is proven anew. A file that is damaged counts as none. Of several processes that
need a verdict at once, one proves, and the others wait for it. Where the folder cannot be written to, each
process proves for itself.
"""

import hashlib
import inspect
import json
import logging
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from threading import RLock
from typing import Any

import torch

from vmamba._torch_private import cuda_driver_version
from vmamba.files import try_lock, write_atomically
from vmamba.ops.backend import Backend
from vmamba.ops.triton.backend import triton_version
from vmamba.ops.triton.plans import library_version

log = logging.getLogger(__name__)

PATIENCE = 240.0
"""Seconds to wait for another process that proves: its limit, and the start and end of it."""


@dataclass(frozen=True)
class Verdict:
    """What a proof found.

    Attributes:
        backend: The backend's name.
        machine: What the verdict holds for, from `machine`.
        reason: What failed; None if the backend is right and faster than `chunked`.
        checked: How many calls were judged.
        speedups: How many times as fast as `chunked`, by what was timed.
        seconds: How long the proof took.
        date: When, in UTC.
        lasting: Whether it is worth keeping: a device that was busy or full says nothing of the backend.
    """

    backend: str
    machine: dict[str, str]
    reason: str | None
    checked: int
    speedups: dict[str, float]
    seconds: float
    date: str
    lasting: bool = True

    @property
    def is_proven(self) -> bool:
        return self.reason is None


_KNOWN: dict[tuple[str, torch.device], Verdict] = {}
"""Verdicts that this process has read or found, by backend and device."""

_LOCK = RLock()


def folder() -> Path:
    """Where verdicts are kept: beside what PyTorch downloads (`TORCH_HOME`, else `~/.cache/torch`)."""
    return Path(torch.hub.get_dir()) / "vmamba"


def machine(backend: Backend, device: torch.device) -> dict[str, str]:
    """What a verdict depends on: device, driver and versions."""
    name, driver = _hardware(device)
    return {
        "device": name,
        "driver": driver,
        "torch": torch.__version__,
        "triton": ".".join(map(str, triton_version() or ())) or "none",
        "vmamba": f"{library_version()}, code {_digest_of_code(Path(inspect.getfile(backend.forward)))}",
    }


@cache
def _hardware(device: torch.device) -> tuple[str, str]:
    """Name and driver of a device."""
    if device.type == "cpu":
        return platform.processor() or platform.machine(), "none"
    name = getattr(torch, device.type).get_device_name(device)
    if device.type == "xpu":
        return name, str(torch.xpu.get_device_properties(device).driver_version)
    for path in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError:
            continue
        if match := re.search(r"\d+\.\d+(\.\d+)*", text):
            return name, match[0]
    return name, str(torch.version.hip or cuda_driver_version())


@cache
def _digest_of_code(file: Path) -> str:
    """Of the files in a backend's folder: whoever edits a kernel has it proven anew."""
    digest = hashlib.sha256()
    for path in sorted(file.parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def path_of(backend: Backend, device: torch.device) -> Path:
    """The file of a verdict."""
    key = json.dumps(machine(backend, device), sort_keys=True)
    return folder() / f"{backend.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def kept(backend: Backend, device: torch.device) -> Verdict | None:
    """The verdict on a backend for a device, if this process knows it or the cache folder has it."""
    verdict = _KNOWN.get((backend.name, device))
    if verdict is None:
        verdict = _read(backend, device)
        if verdict is not None:
            _KNOWN[backend.name, device] = verdict
    return verdict


def found(backend: Backend, device: torch.device, prove: Callable[[], Verdict]) -> Verdict:
    """The verdict on a backend for a device: a kept one, else another process's, else that of `prove`."""
    with _LOCK:
        if (verdict := kept(backend, device)) is not None:
            return verdict
        with _one_process(path_of(backend, device)) as is_free:
            verdict = kept(backend, device)  # another process may have proven meanwhile
            if verdict is None:
                verdict = keep(backend, device, prove()) if is_free else _no_answer(backend, device)
        _KNOWN[backend.name, device] = verdict
        return verdict


def keep(backend: Backend, device: torch.device, verdict: Verdict) -> Verdict:
    """Write a verdict, in place of the one before; where that fails, this process alone has it."""
    _KNOWN[backend.name, device] = verdict
    if verdict.lasting:
        try:
            write_atomically(path_of(backend, device), json.dumps(asdict(verdict), indent=1))
        except OSError as error:
            log.info("%s: the verdict on %r is not kept (%s)", folder(), backend.name, error)
    return verdict


def _read(backend: Backend, device: torch.device) -> Verdict | None:
    try:
        fields = json.loads(path_of(backend, device).read_text(encoding="utf-8"))
        verdict = Verdict(**fields)
    except (OSError, ValueError, TypeError):
        return None
    fits = verdict.backend == backend.name and verdict.machine == machine(backend, device)
    return verdict if fits and _is_sound(verdict) else None


def _is_sound(verdict: Verdict) -> bool:
    """Whether the fields that are used have the types that they should."""
    return (
        (verdict.reason is None or isinstance(verdict.reason, str))
        and isinstance(verdict.checked, int)
        and isinstance(verdict.seconds, float)
        and isinstance(verdict.date, str)
        and isinstance(verdict.speedups, dict)
        and all(isinstance(value, float) for value in verdict.speedups.values())
    )


@contextmanager
def _one_process(path: Path) -> Iterator[bool]:
    """Let one process at a time into the block; False if another one stayed there beyond patience."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.with_suffix(".lock").open("a+", encoding="utf-8")
    except OSError:  # a folder that cannot be written to: each process for itself
        yield True
        return
    with file:
        yield _locked(file)


def _locked(file: Any) -> bool:
    end = time.monotonic() + PATIENCE
    try:
        while not try_lock(file):
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
    except OSError:  # a file system without locks
        pass
    return True


def _no_answer(backend: Backend, device: torch.device) -> Verdict:
    reason = f"another process has been checking it for more than {PATIENCE:.0f} s"
    return Verdict(backend.name, machine(backend, device), reason, 0, {}, PATIENCE, "", lasting=False)
