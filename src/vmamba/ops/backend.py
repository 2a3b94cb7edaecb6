"""What a backend of the selective scan is.

A new backend is one file, `vmamba/ops/<name>.py` with a `BACKEND`, and its name in `_registry.BY_PREFERENCE`.

Sizes: b batch, h height, w width, l = h·w positions, d channels, k routes, n state size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vmamba.ops.operands import Operands
from vmamba.ops.routes import CROSS, names_of

Gradients = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None
]
"""Gradients of x, delta, A, B, C, D, delta_bias, delta_weight and initial_state."""


def state_stride(n_state: int) -> int:
    """Positions of a route between two saved states.

    Grows with the state size, so that what is saved for backward stays at most a quarter of (b, l, k, d).
    """
    return 64 * ((n_state + 15) // 16)


def saved_every_stride(call: Operands) -> int:
    """How many states a route saves: one before every `state_stride` positions."""
    return -(-call.length // state_stride(call.n_state))


@dataclass(frozen=True)
class Backend:
    """One implementation of the operator. Its results are in the state's type or in the operand's.

    Attributes:
        name: As given to `backend=` and `use_backend`.
        summary: What it is, in a line.
        forward: The call → y (b, h, w, d), the last state (b, k, d, n), and the states that it saves for its
            backward (b, k, `n_saved(call)`, n, d).
        backward: The gradients of y and of the last state (or None), the call, the saved states → a gradient
            for each operand that is not None.
        why_not_here: Why it cannot run on this machine and how to make it run, or None if it can.
        why_not: Why it cannot serve a call, or None if it can. It may use shapes, types, device and routes
            but not values: the tensors may be fake.
        preferred_on: Device types on which it serves the calls that name no backend.
        proven_on: Device types on which it serves them once it has proven itself there, see
            `vmamba.ops.proof`. The proof runs in another process, which imports `vmamba.ops` and the module
            of `forward`; that module must register the backend.
        n_saved: How many states of a route forward saves.
    """

    name: str
    summary: str
    forward: Callable[[Operands], tuple[Tensor, Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor | None, Operands, Tensor], Gradients]
    why_not_here: Callable[[], str | None] = lambda: None
    why_not: Callable[[Operands], str | None] = lambda call: None
    preferred_on: tuple[str, ...] = ()
    proven_on: tuple[str, ...] = ()
    n_saved: Callable[[Operands], int] = saved_every_stride


def why_not_kernel(
    call: Operands, device_types: tuple[str, ...], most_states: int, *, any_route: bool = False
) -> str | None:
    """`why_not` of a kernel: for these types of device, this state size, and routes of "cross" unless any."""
    if call.device.type not in device_types:
        return f"it runs on {' or '.join(device_types)}, the operands are on {call.device}"
    if call.n_state > most_states:
        return f"it takes a state size n of at most {most_states}, got {call.n_state}"
    if not any_route and not all(0 <= code < len(CROSS) for code in call.routes):
        others = [name for name in names_of(call.routes) if name not in CROSS]
        return f"it reads along the routes {', '.join(CROSS)} only, got {', '.join(dict.fromkeys(others))}"
    return None


def no_data_call(device: torch.device, n_state: int = 1) -> Operands:
    """The smallest call on a device, for asking `why_not` before there is a real call."""
    x, row = torch.empty(1, 1, 1, 1, device=device), torch.empty(1, 1, 1, 1, n_state, device=device)
    return Operands(x, row[..., :1], row[0, 0], row, row, None, None, None, True, [0])
