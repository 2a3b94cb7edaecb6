"""Speed of the operator's engines at the shapes of a model, against each other and against others.

B batch, H height, W width, L = H·W, D channels, K routes, N state size, R rank of delta.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vmamba.analysis.complexity import create_on_meta
from vmamba.analysis.throughput import BenchError, Ratio, interleaved, ratio
from vmamba.nn import SS2D
from vmamba.ops import ROUTES, backends, cpu, cross_merge, cross_scan, selective_scan_2d

BARE_LOOP = "exp, log1p, exp"
MAMBAPY = "mambapy"
MAMBA_SSM = "mamba_ssm"


@dataclass(frozen=True)
class Shape:
    """Of one scan of a model; `times` is how often the model has it."""

    height: int
    width: int
    channels: int
    n_state: int
    rank: int
    routes: tuple[str, ...]
    times: int


@dataclass(frozen=True)
class ScanMeasurement:
    """One engine at one shape.

    Attributes:
        engine: Its name, `MAMBAPY`, `MAMBA_SSM`, or `BARE_LOOP`.
        shape: Of the scan.
        batch: B.
        backward: Whether the gradients are in it.
        nanoseconds: Of one (position, channel, route), by the median round.
        ratio: How many times as fast the first engine is.
    """

    engine: str
    shape: Shape
    batch: int
    backward: bool
    nanoseconds: float
    ratio: Ratio


def shapes(name: str, size: int) -> list[Shape]:
    """The scans of a model on square images, from one pass on the meta device.

    Raises:
        ModelError: There is no such model, or it does not take the size.
        BenchError: It has no scan.
    """
    model = create_on_meta(name)
    found: list[tuple[int, int, int, int, int, tuple[str, ...]]] = []

    def note(layer: SS2D, inputs: tuple[Tensor, ...]) -> None:
        _, height, width, _ = inputs[0].shape
        _, channels, rank = layer.dt_weight.shape
        routes = tuple(ROUTES[code] for code in layer.routes)
        found.append((height, width, channels, layer.A_log.shape[2], rank, routes))

    for layer in model.modules():
        if type(layer) is SS2D:
            layer.register_forward_pre_hook(note)
    with torch.no_grad():
        model(torch.empty(1, 3, size, size, device="meta"))
    if not found:
        raise BenchError(f"{name}: it has no 2D selective scan")
    return [Shape(*shape, found.count(shape)) for shape in dict.fromkeys(found)]


def operands(shape: Shape, batch: int, device: str = "cpu") -> dict[str, Any]:
    """Keyword arguments of `selective_scan_2d` as a freshly made SS2D would give them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    routes, channels, rank, n_state = len(shape.routes), shape.channels, shape.rank, shape.n_state
    projected = normal(batch, shape.height, shape.width, routes, rank + 2 * n_state)
    delta, B, C = projected.split([rank, n_state, n_state], -1)
    return {
        "x": normal(batch, shape.height, shape.width, channels),
        "delta": delta,
        "A": -torch.arange(1.0, n_state + 1, device=device).expand(routes, channels, n_state),
        "B": B,
        "C": C,
        "D": torch.ones(routes, channels, device=device),
        "delta_bias": normal(routes, channels) - 4,
        "delta_weight": normal(routes, channels, rank) * rank**-0.5,
        "routes": shape.routes,
    }


def _along(t: Tensor, routes: tuple[str, ...]) -> Tensor:
    """(B, H, W, K, F) → (B, K, L, F), each route's own along that route."""
    return torch.stack([cross_scan(t[..., k, :], routes)[:, k] for k in range(len(routes))], 1)


def by_mambapy(call: dict[str, Any]) -> Tensor:
    """The operator around mambapy's parallel scan, its operands formed as by its Mamba block."""
    from mambapy.pscan import pscan

    x, routes = call["x"], call["routes"]
    batch, height, width, _ = x.shape
    xs = cross_scan(x, routes)  # (B, K, L, D)

    delta = torch.einsum("bklr,kdr->bkld", _along(call["delta"], routes), call["delta_weight"])
    delta = F.softplus(delta + call["delta_bias"][:, None])
    decay = torch.exp(delta[..., None] * call["A"][:, None])  # (B, K, L, D, N)
    driven = (delta * xs)[..., None] * _along(call["B"], routes)[..., None, :]
    states = pscan(decay.flatten(0, 1), driven.flatten(0, 1)).unflatten(0, (batch, -1))
    ys = (states @ _along(call["C"], routes)[..., None]).squeeze(-1) + call["D"][:, None] * xs
    return cross_merge(ys, (height, width), routes)


def by_mamba_ssm(call: dict[str, Any]) -> Tensor:
    """The operator around mamba's CUDA kernel, as the authors' chain has it: every route materialised."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    x, routes = call["x"], call["routes"]
    _, height, width, _ = x.shape
    xs = cross_scan(x, routes)  # (B, K, L, D)

    delta = torch.einsum("bklr,kdr->bkdl", _along(call["delta"], routes), call["delta_weight"])
    B, C = (_along(call[name], routes).mT.contiguous() for name in ("B", "C"))
    ys = selective_scan_fn(
        *(xs.mT.flatten(1, 2).contiguous(), delta.flatten(1, 2).contiguous(), call["A"].flatten(0, 1)),
        *(B, C, call["D"].flatten()),
        delta_bias=call["delta_bias"].flatten(),
        delta_softplus=True,
    )
    return cross_merge(ys.unflatten(1, (len(routes), -1)).mT, (height, width), routes)


def _engines(device: str) -> dict[str, Callable[[dict[str, Any]], Tensor]]:
    """The engines that are for speed, the fastest first, and others that are installed."""
    found: dict[str, Callable[[dict[str, Any]], Tensor]] = {}
    for status in sorted(backends(), key=lambda status: status.name == "chunked"):
        if status.available and status.name != "reference":

            def run(call: dict[str, Any], name: str = status.name) -> Tensor:
                return selective_scan_2d(**call, backend=name)

            try:
                run(operands(Shape(1, 1, 1, 1, 1, ("row",), 1), 1, device))
            except RuntimeError:  # not on this device
                continue
            found[status.name] = run
    try:
        import mambapy.pscan  # noqa: F401
    except ImportError:
        pass
    else:
        found[MAMBAPY] = by_mambapy
    if device.startswith("cuda"):
        try:
            import mamba_ssm.ops.selective_scan_interface  # noqa: F401
        except ImportError:
            pass
        else:
            found[MAMBA_SSM] = by_mamba_ssm
    return found


def bench_operator(
    shape: Shape, batch: int = 8, *, backward: bool = False, device: str = "cpu", rounds: int = 10
) -> list[ScanMeasurement]:
    """Run the engines in turns at one shape, after each was compared with `reference` on one image.

    With a compiled kernel for CPUs, its polynomials alone are measured too, over as many values.

    Raises:
        BenchError: An engine computes something wrong.
    """
    engines = _engines(device)
    one = operands(shape, 1, device)
    with torch.no_grad():
        expected = selective_scan_2d(**one, backend="reference")
        for name, run in engines.items():
            error = ((run(one) - expected).abs().max() / expected.abs().max()).item()
            if not error < 1e-4:
                raise BenchError(f"{name} differs from the reference by {error:.1e} of the largest value")

    call = operands(shape, batch, device)
    grad_y = torch.randn_like(call["x"])
    if backward:
        call = {name: t.detach().requires_grad_() if isinstance(t, Tensor) else t for name, t in call.items()}
    tensors = [t for t in call.values() if isinstance(t, Tensor)]

    def calls(run: Callable[[dict[str, Any]], Tensor]) -> Callable[[], Any]:
        if backward:
            return lambda: torch.autograd.grad(run(call), tensors, grad_y)
        return lambda: run(call)

    functions = {name: calls(run) for name, run in engines.items()}
    values = batch * shape.height * shape.width * shape.channels * len(shape.routes)
    library = cpu._load()
    if device == "cpu" and not isinstance(library, str):
        functions[BARE_LOOP] = lambda: library.vmamba_bare_loop(values, torch.get_num_threads())
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    with torch.set_grad_enabled(backward):
        seconds = interleaved(functions, rounds, synchronize)
    first = seconds[next(iter(functions))]
    return [
        ScanMeasurement(
            name, shape, batch, backward, statistics.median(own) / values * 1e9, ratio(first, own)
        )
        for name, own in seconds.items()
    ]


def model_totals(measurements: Sequence[ScanMeasurement]) -> dict[tuple[str, bool], float]:
    """Seconds of all of a model's scans for one image, by (engine, backward)."""
    found: dict[tuple[str, bool], float] = {}
    for m in measurements:
        values = m.shape.height * m.shape.width * m.shape.channels * len(m.shape.routes)
        key = (m.engine, m.backward)
        found[key] = found.get(key, 0.0) + m.nanoseconds * 1e-9 * values * m.shape.times
    return found
