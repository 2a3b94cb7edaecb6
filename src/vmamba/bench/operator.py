"""Speed of the operator's backends at the shapes of a model, against each other and against other packages.

b batch, h height, w width, l = h·w, d channels, k routes, n state size, r rank of delta.
"""

import importlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vmamba.analysis.scans import ScanShape, scan_shapes
from vmamba.bench.models import on_backend
from vmamba.bench.timing import BenchError, Ratio, interleaved, ratio, synchronizer
from vmamba.models.factory import create_on_meta
from vmamba.ops import backends, cpu, cross_merge, cross_scan, selective_scan_2d
from vmamba.ops.reference import softplus

Implementation = Callable[[dict[str, Any]], Tensor]
"""Keyword arguments of `selective_scan_2d` → y."""

BARE_LOOP = "exp, log1p, exp"
MAMBAPY = "mambapy"
MAMBA_SSM = "mamba_ssm"

TOLERANCE = 1e-4
"""Largest difference from the reference, over the reference's largest value."""


@dataclass(frozen=True)
class ScanMeasurement:
    """One implementation at one shape.

    Attributes:
        backend: The backend's name, `MAMBAPY`, `MAMBA_SSM`, or `BARE_LOOP`.
        shape: The scan's shape.
        batch: Images in the model's batch.
        backward: Whether the time includes the gradients.
        nanoseconds: Time per (position, channel, route), from the median round.
        ratio: Speed of the first implementation over this one's.
    """

    backend: str
    shape: ScanShape
    batch: int
    backward: bool
    nanoseconds: float
    ratio: Ratio


def shapes(name: str, size: int) -> list[ScanShape]:
    """The scans of a model on square images, from one pass on the meta device.

    Raises:
        ModelError: No model has that name.
        BenchError: The model does not take the size, or has no scan.
    """
    model = create_on_meta(name, (size, size))
    input_size = (model.pretrained_cfg["input_size"][0], size, size)
    try:
        scans = scan_shapes(model, input_size)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise BenchError(f"{name} does not take an input of {input_size}: {error}") from error
    if not scans:
        raise BenchError(f"{name} has no selective scan")
    return scans


def values_of(shape: ScanShape) -> int:
    """(position, channel, route) triples of one scan, for one image of the model."""
    return shape.lines * shape.height * shape.width * shape.channels * len(shape.routes)


def operands(shape: ScanShape, batch: int, device: str = "cpu") -> dict[str, Any]:
    """Keyword arguments of `selective_scan_2d`, distributed as a newly initialised SS2D has them.

    Args:
        shape: The scan's shape.
        batch: b.
        device: As PyTorch names it.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    routes, channels, rank, n_state = len(shape.routes), shape.channels, shape.rank, shape.n_state
    splits = [rank or channels, n_state, n_state]
    delta, B, C = normal(batch, shape.height, shape.width, routes, sum(splits)).split(splits, -1)
    return {
        "x": normal(batch, shape.height, shape.width, channels),
        "delta": delta,
        "A": -torch.arange(1.0, n_state + 1, device=device).expand(routes, channels, n_state),
        "B": B,
        "C": C,
        "D": torch.ones(routes, channels, device=device),
        "delta_bias": normal(routes, channels) - 4,
        "delta_weight": normal(routes, channels, rank) * rank**-0.5 if rank else None,
        "routes": shape.routes,
    }


def _along(t: Tensor, routes: tuple[str, ...]) -> Tensor:
    """(b, h, w, k, ·) → (b, k, l, ·), each route's values in that route's order."""
    return torch.stack([cross_scan(t[..., k, :], routes)[:, k] for k in range(len(routes))], 1)


def _delta(call: dict[str, Any]) -> Tensor:
    """delta before bias and softplus, (b, k, l, d), each route's values in that route's order."""
    delta, weight = _along(call["delta"], call["routes"]), call["delta_weight"]
    return delta if weight is None else torch.einsum("bklr,kdr->bkld", delta, weight)


def by_mambapy(call: dict[str, Any]) -> Tensor:
    """The operator by mambapy's parallel scan, with operands prepared as in mambapy's Mamba block."""
    from mambapy.pscan import pscan

    x, routes = call["x"], call["routes"]
    batch, height, width, _ = x.shape
    xs = cross_scan(x, routes)  # (b, k, l, d)

    delta = softplus(_delta(call) + call["delta_bias"][:, None])
    decay = torch.exp(delta[..., None] * call["A"][:, None])  # (b, k, l, d, n)
    driven = (delta * xs)[..., None] * _along(call["B"], routes)[..., None, :]
    states = pscan(decay.flatten(0, 1), driven.flatten(0, 1)).unflatten(0, (batch, -1))
    ys = (states @ _along(call["C"], routes)[..., None]).squeeze(-1) + call["D"][:, None] * xs
    return cross_merge(ys, (height, width), routes)


def by_mamba_ssm(call: dict[str, Any]) -> Tensor:
    """The operator by mamba's CUDA kernel, with a copy of x for every route, as in the authors' code."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    x, routes = call["x"], call["routes"]
    _, height, width, _ = x.shape
    xs = cross_scan(x, routes)  # (b, k, l, d)

    B, C = (_along(call[name], routes).mT.contiguous() for name in ("B", "C"))
    ys = selective_scan_fn(
        xs.mT.flatten(1, 2).contiguous(),
        _delta(call).mT.flatten(1, 2).contiguous(),
        call["A"].flatten(0, 1),
        B,
        C,
        call["D"].flatten(),
        delta_bias=call["delta_bias"].flatten(),
        delta_softplus=True,
    )
    return cross_merge(ys.unflatten(1, (len(routes), -1)).mT, (height, width), routes)


def _implementations(shape: ScanShape, device: str, backend: str | None) -> dict[str, Implementation]:
    """The fast backends that can serve such a scan, `chunked` last, and other packages if installed.

    Raises:
        BenchError: The backend that was asked for cannot serve it.
    """
    trial = operands(ScanShape(1, 1, 1, shape.n_state, shape.rank, shape.routes), 1, device)
    implementations: dict[str, Implementation] = {}
    for status in sorted(backends(), key=lambda status: status.name == "chunked"):
        if backend is not None and status.name != backend:
            continue
        if backend is None and (not status.available or status.name == "reference"):
            continue

        def run(call: dict[str, Any], name: str = status.name) -> Tensor:
            return selective_scan_2d(**call, backend=name)

        try:
            run(trial)
        except RuntimeError as error:  # it does not serve this device, these routes or so many states
            if backend is not None:
                raise BenchError(str(error)) from error
            continue
        implementations[status.name] = run
    if _can_import("mambapy.pscan"):
        implementations[MAMBAPY] = by_mambapy
    if device.startswith("cuda") and _can_import("mamba_ssm.ops.selective_scan_interface"):
        implementations[MAMBA_SSM] = by_mamba_ssm
    return implementations


def _can_import(module: str) -> bool:
    """Whether a module is installed and imports; one built for another PyTorch does not."""
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


@torch.no_grad()
def _compare_with_reference(implementations: dict[str, Implementation], call: dict[str, Any]) -> None:
    expected = selective_scan_2d(**call, backend="reference")
    for name, run in implementations.items():
        error = ((run(call) - expected).abs().max() / expected.abs().max()).item()
        if not error < TOLERANCE:
            raise BenchError(f"{name} differs from the reference by {error:.1e} of the largest value")


def bench_operator(
    shape: ScanShape,
    batch: int = 8,
    *,
    backward: bool = False,
    device: str = "cpu",
    rounds: int = 10,
    backend: str | None = None,
) -> list[ScanMeasurement]:
    """Time the implementations in turns at one shape, after comparing each with `reference` on one image.

    If the compiled CPU kernel is available, a loop of its exponentials and logarithms alone over as many
    values is timed too.

    Args:
        shape: From `shapes`.
        batch: Images of the model.
        backward: Time forward and backward together.
        device: As PyTorch names it.
        rounds: At least 1.
        backend: The only backend to time, beside other packages; None for all that are fast.

    Raises:
        BenchError: An implementation computes something wrong, or `backend` is unknown or cannot serve the
            scan.
    """
    with on_backend(backend):
        implementations = _implementations(shape, device, backend)
    _compare_with_reference(implementations, operands(shape, 1, device))
    call = operands(shape, batch * shape.lines, device)
    grad_y = torch.randn_like(call["x"])
    if backward:
        call = {name: t.detach().requires_grad_() if isinstance(t, Tensor) else t for name, t in call.items()}
    tensors = [t for t in call.values() if isinstance(t, Tensor)]

    def function(run: Implementation) -> Callable[[], Any]:
        if backward:
            return lambda: torch.autograd.grad(run(call), tensors, grad_y)
        return lambda: run(call)

    functions = {name: function(run) for name, run in implementations.items()}
    values = batch * values_of(shape)
    library = cpu._load()
    if device == "cpu" and not isinstance(library, str):
        functions[BARE_LOOP] = lambda: library.vmamba_bare_loop(values, torch.get_num_threads())
    with torch.set_grad_enabled(backward):
        seconds = interleaved(functions, rounds, synchronizer(device))
    first = seconds[next(iter(functions))]
    return [
        ScanMeasurement(
            name, shape, batch, backward, statistics.median(times) / values * 1e9, ratio(first, times)
        )
        for name, times in seconds.items()
    ]


def model_totals(measurements: Sequence[ScanMeasurement]) -> dict[tuple[str, bool], float]:
    """Seconds of all of a model's scans for one image, by (backend, backward)."""
    totals: dict[tuple[str, bool], float] = {}
    for m in measurements:
        seconds = m.nanoseconds * 1e-9 * values_of(m.shape) * m.shape.times
        totals[m.backend, m.backward] = totals.get((m.backend, m.backward), 0.0) + seconds
    return totals
