"""The selective scan (S6) over an image and over a sequence, as functions.

Sizes: b batch, h height, w width, l length, d channels, k routes, n state size, r rank of delta, g groups.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import vmamba.ops._operator  # noqa: F401  (registers the operator)
from vmamba.ops._registry import backend_of_graph, is_compiled, no_proof
from vmamba.ops.operands import Operands
from vmamba.ops.routes import GIVEN, Routes, parse_routes, route_codes


def selective_scan_2d(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_weight: Tensor | None = None,
    delta_softplus: bool = True,
    routes: Routes = "cross",
    split_channels: bool = False,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Read an image along k routes, each a selective state-space recurrence, and sum (SS2D, section 4.2).

    For route k visiting the positions p_1 … p_l, per channel:

        δ_t = softplus(delta[p_t] + delta_bias)
        h_t = exp(δ_t A) ⊙ h_{t-1} + δ_t B[p_t] x[p_t]
        y[p_t] += C[p_t]·h_t + D x[p_t]

    **`delta_softplus` is True by default here, and False in `selective_scan`**, which keeps mamba's default:
    name it where you go from one to the other.

    Every operand is in image position, channels last, of any strides; float16, bfloat16, float32 and float64
    may be mixed. State and sums are in float32, in float64 where x is float64, under autocast too.

    Every derivative of PyTorch works: backward on each backend; a second derivative on "reference" alone,
    elsewhere it raises; torch.func's transforms, forward mode and vmap with any. Under torch.func's
    derivatives and forward mode the scan is computed in plain PyTorch whatever the backend, which is slower.

    Args:
        x: (b, h, w, d).
        delta: (b, h, w, k, d); with `delta_weight` the low-rank (b, h, w, k, r).
        A: (k, d, n), as a rule negative.
        B: (b, h, w, k, n).
        C: (b, h, w, k, n).
        D: (k, d), the skip.
        delta_bias: (k, d).
        delta_weight: (k, d, r): delta is formed inside as delta @ delta_weightᵀ.
        delta_softplus: Apply softplus to delta; the default differs from that of `selective_scan`.
        routes: The name of a set ("cross", "unidirectional", "bidirectional", "snake", "diagonal"; "window:7"
            and "atrous:2" of any size), or a sequence of k routes. Each is a name of `vmamba.ops.ROUTES`, one
            of `vmamba.ops.SIZED_ROUTES` with its size ("window_row:7"), a name of `register_route`, or a
            permutation: the h·w positions row·w + column, each once, in the order of the route. A tensor
            (h·w,) or (k, h·w) of permutations will do too. Checking permutations synchronises with the GPU.
        split_channels: Read only a part of the channels along each route: the first d / k along the first
            route, the next along the second, and so on. Then d / k stands for d in the shapes of delta, A,
            D, delta_bias and delta_weight, and nothing is summed over routes.
        out_dtype: Type of y, rounded to once; default x's.
        backend: Name of the backend; default the preferred one of the device, see `backends`.

    Returns:
        y: (b, h, w, d), contiguous.

    Raises:
        TypeError: An operand's type is not supported.
        ValueError: A shape or device does not fit, a route or backend is unknown, or a permutation does not
            hold each position once.
        BackendError: The backend named cannot serve the call (a RuntimeError).
    """
    codes, orders = parse_routes(routes, x.device)
    call = Operands(x, delta, A, B, C, D, delta_bias, delta_weight, delta_softplus, codes, None, orders)
    if not split_channels:
        return _run(call, out_dtype, backend)
    return torch.cat([_run(part, out_dtype, backend) for part in split_by_route(call)], dim=-1)


def _run(call: Operands, out_dtype: torch.dtype | None, backend: str | None) -> Tensor:
    if backend is None and is_compiled():
        backend = backend_of_graph(call.x.device)
    scan = traced_scan if torch.jit.is_tracing() else _scan
    return scan(
        call.x,
        call.delta,
        call.A,
        call.B,
        call.C,
        call.D,
        call.delta_bias,
        call.delta_weight,
        call.delta_softplus,
        call.routes,
        call.initial_state,
        out_dtype or call.x.dtype,
        backend,
        call.orders,
    )


def _scan(*arguments: Any) -> Tensor:
    """y by the operator, with its arguments by position."""
    y: Tensor = torch.ops.vmamba.selective_scan_2d(*arguments)[0]
    return y


def traced_scan(*arguments: Any) -> Tensor:
    """As the operator under torch.jit.trace, which its kernels cannot see: no proof of a backend starts."""
    with no_proof():
        return _scan(*arguments)


def split_by_route(call: Operands) -> list[Operands]:
    """A call of one route for each route of a call in which each reads a part of the channels.

    Args:
        call: With (k, d / k, ·) for (k, d, ·) in the shapes of the parameters, and delta likewise.

    Raises:
        ValueError: The number of routes does not divide d, or an operand's routes are of another number.
    """
    k = call.n_routes
    if call.x.ndim != 4 or call.x.shape[3] % k:
        raise ValueError(
            f"x: expected (b, h, w, d) with d a multiple of the {k} routes, as split_channels is set; "
            f"got shape {tuple(call.x.shape)}"
        )
    for name, t, axis in (("delta", call.delta, 3), ("B", call.B, 3), ("C", call.C, 3), ("A", call.A, 0)):
        if t.ndim <= axis or t.shape[axis] != k:
            raise ValueError(f"{name}: expected {k} routes in dimension {axis}, got shape {tuple(t.shape)}")
    for name, parameter in (
        ("D", call.D),
        ("delta_bias", call.delta_bias),
        ("delta_weight", call.delta_weight),
    ):
        if parameter is not None and len(parameter) != k:
            raise ValueError(
                f"{name}: expected {k} routes in dimension 0, got shape {tuple(parameter.shape)}"
            )
    given = iter(() if call.orders is None else call.orders)

    def of(t: Tensor | None, i: int) -> Tensor | None:
        return None if t is None else t[i : i + 1]

    return [
        replace(
            call,
            x=x,
            delta=call.delta[:, :, :, i : i + 1],
            A=call.A[i : i + 1],
            B=call.B[:, :, :, i : i + 1],
            C=call.C[:, :, :, i : i + 1],
            D=of(call.D, i),
            delta_bias=of(call.delta_bias, i),
            delta_weight=of(call.delta_weight, i),
            routes=[code],
            orders=next(given)[None] if code == GIVEN else None,
        )
        for i, (code, x) in enumerate(zip(call.routes, call.x.chunk(k, dim=-1), strict=True))
    ]


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The 1D selective scan, with mamba's order of arguments, defaults and meaning.

    The same recurrence as `selective_scan_2d` on a sequence, through the same backends: a group is an image
    of height 1 that is read along "row".

    **`delta_softplus` is False by default here, as in mamba, and True in `selective_scan_2d`**: name it where
    you go from one to the other.

    Args:
        u: (b, g·d, l).
        delta: (b, g·d, l).
        A: (g·d, n).
        B: (b, g, n, l), or (b, n, l) for one group; or (g·d, n), constant over the sequence, which takes n
            scans of one state.
        C: As B.
        D: (g·d,), the skip.
        z: (b, g·d, l), the gate: y is multiplied by SiLU(z).
        delta_bias: (g·d,).
        delta_softplus: Apply softplus to delta + delta_bias; the default differs from that of
            `selective_scan_2d`.
        return_last_state: Return the state after the last position too; it is differentiable.
        initial_state: (b, g·d, n), the state before the first position; default zero.
        backend: As for `selective_scan_2d`.

    Returns:
        y (b, g·d, l) in u's type, and with `return_last_state` the state (b, g·d, n) in float32
        (float64 where u is float64).

    Raises:
        As `selective_scan_2d`.
    """
    B, C = (t.unsqueeze(1) if t.ndim == 3 else t for t in (B, C))
    if backend is None and is_compiled():
        backend = backend_of_graph(u.device)
    call = _Sequence(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, backend)
    call.validate()
    constant = B.ndim == 2 or C.ndim == 2
    scan = _scan_each_state if constant else _scan_groups
    if torch.jit.is_tracing():
        with no_proof():
            y, last_state = scan(call)
    else:
        y, last_state = scan(call)
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    y = y.to(u.dtype)
    return (y, last_state) if return_last_state else y


@dataclass(eq=False, slots=True)  # as `Operands`
class _Sequence:
    """The operands of `selective_scan`; B and C are (b, g, n, l) or (g·d, n)."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    delta_softplus: bool
    initial_state: Tensor | None
    backend: str | None

    @property
    def groups(self) -> int:
        """g; 1 where both B and C are constant."""
        given = [t.shape[1] for t in (self.B, self.C) if t.ndim == 4]
        return given[0] if given else 1

    def validate(self) -> None:
        """Raise ValueError if a shape does not fit."""
        if self.u.ndim != 3:
            raise ValueError(f"u: expected (b, g·d, l), got shape {tuple(self.u.shape)}")
        if self.A.ndim != 2:
            raise ValueError(f"A: expected (g·d, n), got shape {tuple(self.A.shape)}")
        for name, t in (("B", self.B), ("C", self.C)):
            if t.ndim not in (2, 4):
                raise ValueError(
                    f"{name}: expected (b, g, n, l), (b, n, l), or constant (g·d, n), got {tuple(t.shape)}"
                )
        batch, width, length = self.u.shape
        # n is what at least two of A, B and C agree on, so that the message names the one that differs.
        _, n_state, _ = sorted(t.shape[2 if t.ndim == 4 else 1] for t in (self.A, self.B, self.C))
        groups = self.groups
        of_B, of_C = (
            ((width, n_state), "(g·d, n)")
            if t.ndim == 2
            else ((batch, groups, n_state, length), "(b, g, n, l)")
            for t in (self.B, self.C)
        )
        expected = {
            "delta": ((batch, width, length), "(b, g·d, l)"),
            "A": ((width, n_state), "(g·d, n)"),
            "B": of_B,
            "C": of_C,
            "D": ((width,), "(g·d,)"),
            "z": ((batch, width, length), "(b, g·d, l)"),
            "delta_bias": ((width,), "(g·d,)"),
            "initial_state": ((batch, width, n_state), "(b, g·d, n)"),
        }
        for name, (shape, letters) in expected.items():
            operand = getattr(self, name)
            if operand is not None and operand.shape != shape:
                raise ValueError(
                    f"{name}: expected {letters} = {shape}, got shape {tuple(operand.shape)}; "
                    f"u is {tuple(self.u.shape)}, A is {tuple(self.A.shape)}"
                )
        if groups < 1 or width % groups:
            raise ValueError(f"u: expected a number of channels that {groups} groups divide, got {width}")


def _scan_groups(call: _Sequence) -> tuple[Tensor, Tensor]:
    """Scan each group by the 2D operator, as an image of one row, with B and C of (b, g, n, l).

    Returns:
        y (b, g·d, l) in the state's type, not gated yet, and the last state.
    """
    ys, last_states = [], []
    channels = call.u.shape[1] // call.groups
    for g in range(call.groups):
        of_group = slice(g * channels, (g + 1) * channels)
        state = call.initial_state
        y, last_state, _ = torch.ops.vmamba.selective_scan_2d(
            call.u[:, None, of_group].transpose(2, 3),  # (b, 1, l, d)
            call.delta[:, None, None, of_group].permute(0, 1, 4, 2, 3),  # (b, 1, l, 1, d)
            call.A[None, of_group],
            call.B[:, None, None, g].permute(0, 1, 4, 2, 3),  # (b, 1, l, 1, n)
            call.C[:, None, None, g].permute(0, 1, 4, 2, 3),
            None if call.D is None else call.D[None, of_group],
            None if call.delta_bias is None else call.delta_bias[None, of_group],
            None,
            call.delta_softplus,
            route_codes(("row",)),
            None if state is None else state[:, None, of_group],
            None,
            call.backend,
        )
        ys.append(y[:, 0].transpose(1, 2))
        last_states.append(last_state[:, 0])
    return torch.cat(ys, 1), torch.cat(last_states, 1)


def _scan_each_state(call: _Sequence) -> tuple[Tensor, Tensor]:
    """As `_scan_groups`, where B or C is constant: it scales each channel before (B) or after (C) the scan.

    The operator has one B and C for all channels of a group, so each of the n states takes one scan.
    """
    u = call.u.to(torch.float64 if call.u.dtype == torch.float64 else torch.float32)
    ones = u.new_ones(1).expand(u.shape[0], call.groups, 1, u.shape[2])
    ys, last_states = [], []
    for n in range(call.A.shape[1]):
        state = slice(n, n + 1)
        y, last_state = _scan_groups(
            replace(
                call,
                u=u if call.B.ndim == 4 else u * call.B[:, state].to(u.dtype),
                A=call.A[:, state],
                B=call.B[:, :, state] if call.B.ndim == 4 else ones,
                C=call.C[:, :, state] if call.C.ndim == 4 else ones,
                D=None,
                initial_state=None if call.initial_state is None else call.initial_state[..., state],
            )
        )
        ys.append(y if call.C.ndim == 4 else y * call.C[:, state].to(u.dtype))
        last_states.append(last_state)
    out = torch.stack(ys).sum(0)
    if call.D is not None:
        out = out + call.D.to(u.dtype)[:, None] * u
    return out, torch.cat(last_states, 2)
