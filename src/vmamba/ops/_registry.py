"""The registered backends, and the choice of the one that serves a call."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module

import torch

from vmamba.errors import BackendError, UnknownBackendError
from vmamba.ops.backend import Backend, no_data_call
from vmamba.ops.operands import Operands

BY_PREFERENCE = ("cpu", "triton", "chunked", "reference")
"""Modules of this folder, each with a `BACKEND`, in order of preference. A call that names no backend gets
the first one that is preferred on its device and can serve it."""

FALLBACK = "chunked"
"""The backend that serves any call on any device."""

_BACKENDS: dict[str, Backend] = {}
_FORCED: ContextVar[str | None] = ContextVar("vmamba_backend", default=None)
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


def default_backend(device: str | torch.device, n_state: int = 1) -> str:
    """The name of the backend that serves a usual call on a device if none is named."""
    device = torch.device(device)
    # The device itself is touched only where a backend can run on its type.
    candidates = [b for b in _BACKENDS.values() if device.type in b.preferred_on and not b.why_not_here()]
    return next((b.name for b in candidates if not b.why_not(no_data_call(device, n_state))), FALLBACK)


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


def resolve(name: str | None, call: Operands) -> Backend:
    """The backend that serves a call: the one named, else the one forced, else the device's preferred.

    Raises:
        UnknownBackendError: There is no backend of that name.
        BackendError: The backend named or forced cannot serve the call; the message says why.
    """
    name = name or _FORCED.get()
    if name is not None:
        backend = get_backend(name)
        reason = _why_not(backend, call)
        if reason is not None:
            raise BackendError(f"backend: {name!r} cannot serve this call: {reason}")
        return backend
    for backend in _BACKENDS.values():
        if call.device.type not in backend.preferred_on:
            continue
        reason = _why_not(backend, call)
        if reason is None:
            return backend
        if (backend.name, reason) not in _WARNED:
            _WARNED.add((backend.name, reason))
            warnings.warn(
                f"the selective scan runs on the slower {FALLBACK!r}, not on {backend.name!r}: {reason}",
                BackendWarning,
                stacklevel=2,
            )
    return _BACKENDS[FALLBACK]
