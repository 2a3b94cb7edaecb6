"""Engines of the selective scan, and the choice between them.

An engine is one file that defines `forward` and `backward` and registers itself as a `Backend`.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

Gradients = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None
]
"""Of x, delta, A, B, C, D, delta_bias, delta_weight and initial_state."""


class BackendWarning(UserWarning):
    """A slower engine than the device could have is in use."""


@dataclass(frozen=True)
class Backend:
    """One engine.

    Attributes:
        name: As given to `backend=` and `use_backend`.
        summary: What it is, in a line.
        forward: The operator's operands up to `initial_state` → y (B, H, W, D), the last state (B, K, D, N)
            and what it saves for its backward, states (B, K, `saved_states`, N, D), all of the state's type.
        backward: The gradients of y and of the last state (or None), the operands, the saved states →
            a gradient for each operand given, in the state's type or the operand's.
        why_not_here: Why it cannot run on this machine and how to make it run, or None if it can.
        why_not: Why it cannot serve a call on this device with this state size, or None if it can.
        fast_on: Device types on which it is the engine of choice.
        saved_states: How many states of a route forward saves, from H, W and N; by default those before the
            first position of each `state_stride(N)`.
    """

    name: str
    summary: str
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., Gradients]
    why_not_here: Callable[[], str | None] = lambda: None
    why_not: Callable[[torch.device, int], str | None] = lambda device, n_state: None
    fast_on: tuple[str, ...] = ()
    saved_states: Callable[[int, int, int], int] = lambda height, width, n_state: (
        -(-height * width // state_stride(n_state))
    )


@dataclass(frozen=True)
class BackendStatus:
    """An engine as it stands on this machine; `reason` says why it is not available."""

    name: str
    summary: str
    available: bool
    reason: str | None


FALLBACK = "chunked"
"""The engine that serves any call on any device."""

_BACKENDS: dict[str, Backend] = {}
_FORCED: ContextVar[str | None] = ContextVar("vmamba_backend", default=None)
_WARNED: set[tuple[str, str]] = set()


def register(backend: Backend) -> None:
    """Add an engine."""
    _BACKENDS[backend.name] = backend


def _get(name: str) -> Backend:
    if name not in _BACKENDS:
        raise ValueError(
            f"backend: unknown engine {name!r}; expected one of {', '.join(map(repr, _BACKENDS))}"
        )
    return _BACKENDS[name]


def _why_not(backend: Backend, device: torch.device, n_state: int) -> str | None:
    return backend.why_not_here() or backend.why_not(device, n_state)


def backends() -> tuple[BackendStatus, ...]:
    """Every engine, whether it can run on this machine, and why not."""
    reasons = {backend.name: backend.why_not_here() for backend in _BACKENDS.values()}
    return tuple(
        BackendStatus(backend.name, backend.summary, reasons[backend.name] is None, reasons[backend.name])
        for backend in _BACKENDS.values()
    )


def engine_of(device: str | torch.device, n_state: int = 1) -> str:
    """The engine that serves a call on a device if none is named."""
    device = torch.device(device)
    fast = (backend for backend in _BACKENDS.values() if device.type in backend.fast_on)
    return next((b.name for b in fast if _why_not(b, device, n_state) is None), FALLBACK)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every scan inside the `with` block on one engine, and the backward of those scans too.

    A call that names its engine keeps it.

    Raises:
        ValueError: There is no such engine.
        RuntimeError: It cannot run on this machine; the message says why.
    """
    reason = _get(name).why_not_here()
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run here: {reason}")
    token = _FORCED.set(name)
    try:
        yield
    finally:
        _FORCED.reset(token)


def resolve(name: str | None, device: torch.device, n_state: int) -> Backend:
    """The engine that serves a call: the one named, else the one forced, else the device's fastest.

    Raises:
        ValueError: There is no engine of that name.
        RuntimeError: The engine named or forced cannot serve the call; the message says why.
    """
    name = name or _FORCED.get()
    if name is not None:
        backend = _get(name)
        reason = _why_not(backend, device, n_state)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} cannot serve this call: {reason}")
        return backend
    for backend in _BACKENDS.values():
        if device.type not in backend.fast_on:
            continue
        reason = _why_not(backend, device, n_state)
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


def state_stride(n_state: int) -> int:
    """Positions of a route between two saved states.

    Grows with the state size N, so that what is saved for backward stays at most a quarter of (B, L, K, D).
    """
    return 64 * ((n_state + 15) // 16)
