"""The registered backends, and the choice of the one that serves a call."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

import torch

from vmamba._torch_private import is_exporting, is_in_transform
from vmamba.errors import BackendError, UnknownBackendError
from vmamba.ops import verdicts
from vmamba.ops.backend import Backend, no_data_call
from vmamba.ops.operands import Operands
from vmamba.ops.verdicts import Verdict

if TYPE_CHECKING:
    from vmamba.ops.proof import Proof

BY_PREFERENCE = ("cpu", "triton", "chunked", "reference")
"""Modules of this folder, each with a `BACKEND`, in order of preference. A call that names no backend gets
the first one that is preferred on its device and can serve it."""

FALLBACK = "chunked"
"""The backend that serves any call on any device."""

VARIABLE = "VMAMBA_ENGINE"
"""The environment variable that names the backend of every call which names none."""

OF_CHOICE = "?"
"""Behind a backend's name in a compiled graph: take it where it can serve the call."""

ISSUES = "https://github.com/vmamba/vmamba/issues"

_BACKENDS: dict[str, Backend] = {}
_FORCED: ContextVar[str | None] = ContextVar("vmamba_backend", default=None)
_NO_PROOF: ContextVar[bool] = ContextVar("vmamba_no_proof", default=False)
_WARNED: set[tuple[str, str]] = set()


class BackendWarning(UserWarning):
    """A slower backend than the device could have is in use."""


@dataclass(frozen=True)
class BackendStatus:
    """A backend as it stands on this machine; `reason` says why it is not available."""

    name: str
    summary: str
    available: bool
    reason: str | None


def register_backend(backend: Backend) -> None:
    """Add a backend, after the others in the order of preference; one of the same name is replaced."""
    _BACKENDS[backend.name] = backend


for _name in BY_PREFERENCE:
    register_backend(import_module(f"vmamba.ops.{_name}").BACKEND)


def get_backend(name: str) -> Backend:
    """The backend of a name.

    Raises:
        UnknownBackendError: There is none.
    """
    if name not in _BACKENDS:
        raise UnknownBackendError(
            f"backend: there is no {name!r}; expected one of {', '.join(map(repr, _BACKENDS))}"
        )
    return _BACKENDS[name]


def _why_not(backend: Backend, call: Operands) -> str | None:
    return backend.why_not_here() or backend.why_not(call)


def backends() -> tuple[BackendStatus, ...]:
    """Every backend in the order of preference, whether it can run on this machine, and why not."""
    reasons = {backend.name: backend.why_not_here() for backend in _BACKENDS.values()}
    return tuple(
        BackendStatus(backend.name, backend.summary, reasons[backend.name] is None, reasons[backend.name])
        for backend in _BACKENDS.values()
    )


def default_backend(device: str | torch.device, n_state: int = 1, *, prove: bool = False) -> str:
    """The name of the backend that serves a usual call on a device if none is named.

    Args:
        device: The device.
        n_state: The call's state size.
        prove: Whether to prove a backend that has to prove itself on the device and has not yet, as the first
            call would; otherwise it does not count.

    Raises:
        UnknownBackendError: `VMAMBA_ENGINE` names no backend.
    """
    device = torch.device(device)
    if name := os.environ.get(VARIABLE):
        return _named_by_environment(name).name
    # The device itself is touched only where a backend can run on its type.
    candidates = [b for b in _BACKENDS.values() if _is_for(b, device) and not b.why_not_here()]
    call = no_data_call(device, n_state) if candidates else None
    for backend in candidates:
        if call and not backend.why_not(call) and not _why_unproven(backend, call.device, prove):
            return backend.name
    return FALLBACK


def _is_for(backend: Backend, device: torch.device) -> bool:
    return device.type in backend.preferred_on or device.type in backend.proven_on


def _named_by_environment(name: str) -> Backend:
    try:
        return get_backend(name)
    except UnknownBackendError as error:
        raise UnknownBackendError(f"{VARIABLE}={name}: {error}") from error


@contextmanager
def no_proof() -> Iterator[None]:
    """Start no proof inside the block: a verdict that is kept counts, else `chunked` serves."""
    token = _NO_PROOF.set(True)
    try:
        yield
    finally:
        _NO_PROOF.reset(token)


def _is_eager(device: torch.device) -> bool:
    """Whether a call just runs: no graph of it is captured, compiled, traced or transformed."""
    return not (
        _NO_PROOF.get() or torch.compiler.is_compiling() or is_in_transform() or _is_capturing(device)
    )


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _why_unproven(backend: Backend, device: torch.device, may_prove: bool) -> str | None:
    """Why a backend that has to prove itself on a device is not the one of choice there; None if it is.

    Args:
        backend: The backend.
        device: With its index.
        may_prove: Whether the proof may run now, for some seconds in another process.
    """
    if device.type not in backend.proven_on:
        return None
    verdict = verdicts.kept(backend, device)
    if verdict is None and may_prove and _is_eager(device):
        from vmamba.ops.proof import prove

        verdict = verdicts.found(backend, device, lambda: prove(backend, device).verdict)
    if verdict is None:
        return (
            f"it has not proven itself on {device} yet, and does not while a graph is captured, compiled, "
            f"traced or transformed; call it eagerly once before, or run `vmamba prove --device {device}`"
        )
    if verdict.is_proven:
        return None
    return (
        f"its check on {device} failed: {verdict.reason}. Please run `vmamba prove --device {device} --all "
        f"--out report.json` and attach the file to an issue at {ISSUES}; `{VARIABLE}={backend.name}` uses "
        "it all the same"
    )


def prove_backend(name: str, device: str | torch.device | None = None, *, thorough: bool = False) -> Proof:
    """Prove a backend on a device, in another process, and keep the verdict in place of the one before.

    Args:
        name: The backend's name.
        device: Default the machine's accelerator, or the CPU where it has none.
        thorough: More shapes and all types.

    Raises:
        UnknownBackendError: There is no backend of that name.
        BackendError: It cannot run on this machine, or not on this device, or has no need to prove itself
            there; the message says why.
    """
    from vmamba.ops.proof import LIMIT_THOROUGH, prove

    backend = get_backend(name)
    reason = backend.why_not_here()
    if reason is not None:
        raise BackendError(f"backend: {name!r} cannot run here: {reason}")
    if device is None:
        device = torch.accelerator.current_accelerator() or "cpu"
    try:
        call = no_data_call(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise BackendError(f"device: {device} cannot be used: {str(error).splitlines()[0]}") from error
    reason = backend.why_not(call)
    if reason is not None:
        raise BackendError(f"backend: {name!r} cannot serve {call.device}: {reason}")
    proof = prove(backend, call.device, thorough=thorough, limit=LIMIT_THOROUGH)
    verdicts.keep(backend, call.device, proof.verdict)
    return proof


def verdict_on(name: str, device: str | torch.device) -> Verdict | None:
    """The verdict that is kept on a backend that has to prove itself on a device; None if there is none.

    Raises:
        UnknownBackendError: There is no backend of that name.
    """
    backend, device = get_backend(name), torch.device(device)
    if device.type not in backend.proven_on or backend.why_not_here():
        return None
    return verdicts.kept(backend, no_data_call(device).device)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every scan inside the `with` block on one backend, and the backward of those scans too.

    A call that names its backend keeps it.

    Raises:
        UnknownBackendError: There is no such backend (a ValueError).
        BackendError: It cannot run on this machine; the message says why (a RuntimeError).
    """
    reason = get_backend(name).why_not_here()
    if reason is not None:
        raise BackendError(f"backend: {name!r} cannot run here: {reason}")
    token = _FORCED.set(name)
    try:
        yield
    finally:
        _FORCED.reset(token)


def resolve(name: str | None, call: Operands, may_prove: bool = True) -> Backend:
    """The backend that serves a call: the one named, else the one forced, else the device's preferred.

    Args:
        name: From the call.
        call: The call.
        may_prove: Whether a backend that has to prove itself may do so now; False where tensors are fake.

    Raises:
        UnknownBackendError: There is no backend of that name.
        BackendError: The backend named or forced cannot serve the call; the message says why.
    """
    name = name or _FORCED.get()
    if name is not None and name.endswith(OF_CHOICE):
        return _preferred([get_backend(name.removesuffix(OF_CHOICE))], call, may_prove=None)
    if name is not None:
        backend, named_by = get_backend(name), "backend: "
    elif forced := os.environ.get(VARIABLE):
        backend, named_by = _named_by_environment(forced), f"{VARIABLE}: "
    else:
        return _preferred(_BACKENDS.values(), call, may_prove)
    reason = _why_not(backend, call)
    if reason is not None:
        raise BackendError(f"{named_by}{backend.name!r} cannot serve this call: {reason}")
    return backend


def _preferred(backends: Iterable[Backend], call: Operands, may_prove: bool | None) -> Backend:
    """The first of the backends that is for the call's device and can serve it, else `chunked`.

    Args:
        backends: In order.
        call: The call.
        may_prove: As for `resolve`; None: take the backends as proven.
    """
    for backend in backends:
        if not _is_for(backend, call.device):
            continue
        reason = _why_not(backend, call)
        if reason is None and may_prove is not None:
            reason = _why_unproven(backend, call.device, may_prove)
        if reason is None:
            return backend
        _warn(backend, reason)
    return _BACKENDS[FALLBACK]


def _warn(backend: Backend, reason: str) -> None:
    """Say once that `chunked` serves in a backend's place, and why."""
    if (backend.name, reason) not in _WARNED:
        _WARNED.add((backend.name, reason))
        message = f"the selective scan runs on the slower {FALLBACK!r}, not on {backend.name!r}: {reason}"
        warnings.warn(message, BackendWarning, stacklevel=3)


def is_compiled() -> bool:
    """Whether torch.compile is tracing, and not torch.export, whose graphs name no backend."""
    return torch.compiler.is_dynamo_compiling() and not is_exporting()


@torch.compiler.assume_constant_result
def backend_of_graph(device: torch.device) -> str:
    """What a graph that torch.compile makes now passes as `backend` where the call names none.

    PyTorch keeps compiled graphs, on disk too, by what is in them: with a backend in the graph one that was
    compiled for another, whose saved states may have another number, is not taken in its place.

    Returns:
        A name: of the backend that is forced; else of the device's preferred one with `OF_CHOICE` behind,
        for which `chunked` serves the calls that it cannot.
    """
    forced = _FORCED.get() or os.environ.get(VARIABLE)
    if forced:
        return forced
    for backend in _BACKENDS.values():
        if _is_for(backend, device) and not backend.why_not_here():
            if reason := _why_unproven(backend, device, may_prove=False):
                _warn(backend, reason)
            else:
                return backend.name + OF_CHOICE
    return FALLBACK
