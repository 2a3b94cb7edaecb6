"""Accuracy of the CPU kernel on random calls, against float64.

    python benchmarks/accuracy.py [--calls 10000] [--seed 0]

Draws shapes, strides, types and routes; compares values and every gradient with the reference in float64. The
error may be at most twice that of the reference in the same types, plus 4 eps of the largest value. Small
calls are pooled for this comparison, since the reference's error on a single one is random. In float64 the
kernel may differ from the reference by 64 eps of the largest value. About ten minutes for 10,000 calls.
"""

import argparse
import math
import random
import sys
import time

import torch

from vmamba.ops import cpu, selective_scan_2d
from vmamba.ops.routes import CROSS

TYPES = (torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
NAMES = ("x", "delta", "A", "B", "C", "D", "delta_bias", "delta_weight")
TOGETHER = 16
"""Number of small calls that are pooled."""

FEW_VALUES = 1000


def strided(t: torch.Tensor, draw: random.Random) -> torch.Tensor:
    """The same values in a random memory layout, permuted or with gaps."""
    kind = draw.randrange(4)
    if kind == 0:
        return t
    if kind == 1:
        return torch.stack((t, t), -1)[..., 0]
    order = draw.sample(range(t.ndim), t.ndim)
    inverse = [order.index(i) for i in range(t.ndim)]
    if kind == 2:
        return t.permute(order).contiguous().permute(inverse)
    return torch.cat((t, t), 0)[t.shape[0] :]


def draw_settings(draw: random.Random) -> dict:
    """Sizes, routes, types and options of a call."""
    return {
        "size": (
            draw.randint(1, 3),
            draw.randint(1, 12),
            draw.randint(1, 12),
            draw.choice([1, 3, 16, 17, 33, 70]),
        ),
        "n_state": draw.choice([1, 1, 1, 2, 5, 16, 17]),
        "rank": draw.choice([None, 1, 2, 6, 7]),
        "routes": tuple(draw.choice(CROSS) for _ in range(draw.randint(1, 5))),
        "types": [draw.choice(TYPES) for _ in range(4)],
        "skip": draw.random() < 0.7,
        "bias": draw.random() < 0.7,
        "softplus": draw.random() < 0.8,
    }


def draw_call(settings: dict, draw: random.Random) -> dict:
    """Keyword arguments of `selective_scan_2d` with these settings."""
    batch, height, width, channels = settings["size"]
    routes, n_state, rank = len(settings["routes"]), settings["n_state"], settings["rank"]
    image = (batch, height, width, routes)
    state = torch.float64 if settings["types"][0] == torch.float64 else torch.float32
    tensors = {
        "x": torch.randn(batch, height, width, channels),
        "delta": torch.randn(*image, channels if rank is None else rank),
        "B": torch.randn(*image, n_state),
        "C": torch.randn(*image, n_state),
    }
    if not settings["softplus"]:
        tensors["delta"] = tensors["delta"].abs() * 0.1
    types = dict(zip(tensors, settings["types"], strict=True))
    operands = {name: strided(t.to(types[name]), draw) for name, t in tensors.items()}
    parameters = {
        "A": -torch.rand(routes, channels, n_state) * 2,
        "D": torch.randn(routes, channels) if settings["skip"] else None,
        "delta_bias": torch.randn(routes, channels) - 2
        if settings["bias"] and settings["softplus"]
        else None,
        "delta_weight": None if rank is None else torch.randn(routes, channels, rank) * rank**-0.5,
    }
    if not settings["softplus"] and rank is not None:
        parameters["delta_weight"] = parameters["delta_weight"].abs()
    operands |= {name: t if t is None else t.to(state) for name, t in parameters.items()}
    call: dict = {name: t if t is None else t.detach().requires_grad_() for name, t in operands.items()}
    call["routes"], call["delta_softplus"] = settings["routes"], settings["softplus"]
    return call


def results(operands: dict, grad: torch.Tensor, backend: str, exact: bool = False) -> dict[str, torch.Tensor]:
    """y and the gradient of each tensor; `exact` computes in float64."""
    if exact:
        operands = {
            name: t.detach().double().requires_grad_() if isinstance(t, torch.Tensor) else t
            for name, t in operands.items()
        }
    tensors = {name: operands[name] for name in NAMES if operands[name] is not None}
    y = selective_scan_2d(**operands, backend=backend)
    gradients = torch.autograd.grad(y, list(tensors.values()), grad.to(y.dtype))
    return {"y": y.detach(), **dict(zip(tensors, gradients, strict=True))}


def compare(settings: dict, draw: random.Random) -> tuple[int, dict[str, tuple[float, float, float]]]:
    """How many calls were made, and for y and each gradient: the kernel's error, the reference's, the largest
    value."""
    exact, reference, kernel = [], [], []
    calls = TOGETHER if math.prod(settings["size"]) < FEW_VALUES else 1
    for _ in range(calls):
        operands = draw_call(settings, draw)
        grad = torch.randn(settings["size"], dtype=torch.float64).to(operands["x"].dtype)
        exact.append(results(operands, grad, "reference", exact=True))
        reference.append(results(operands, grad, "reference"))
        kernel.append(results(operands, grad, "cpu"))

    def error(computed: list[dict[str, torch.Tensor]], name: str) -> float:
        differences = zip(computed, exact, strict=True)
        return max((r[name].double() - t[name]).abs().max().item() for r, t in differences)

    return calls, {
        name: (error(kernel, name), error(reference, name), max(t[name].abs().max().item() for t in exact))
        for name in kernel[0]
    }


def allowed_error(settings: dict, name: str, reference: float, largest: float) -> float:
    """The largest error that y or a gradient may have."""
    operand = {"x": 0, "y": 0, "delta": 1, "B": 2, "C": 3}.get(name)
    state = torch.float64 if settings["types"][0] == torch.float64 else torch.float32
    eps = torch.finfo(state).eps
    if operand is not None:
        eps = max(eps, torch.finfo(settings["types"][operand]).eps)
    # In float64 the expected values have the same type, and so rounding errors too.
    return 2 * reference + (64 if state == torch.float64 else 4) * eps * largest


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    torch.manual_seed(args.seed)
    print(f"torch {torch.__version__}, kernel {cpu.instruction_set()}, seed {args.seed}", flush=True)
    start, done, failures, worst = time.perf_counter(), 0, 0, 0.0
    while done < args.calls:
        settings = draw_settings(draw)
        calls, errors = compare(settings, draw)
        done += calls
        for name, (error, reference, largest) in errors.items():
            allowed = allowed_error(settings, name, reference, largest)
            worst = max(worst, error / allowed if allowed else float(error > 0))
            if not error <= allowed:
                failures += 1
                print(
                    f"{name}: error {error:.3g}, reference {reference:.3g}, largest {largest:.3g}: {settings}"
                )
        if done % 1000 < TOGETHER:
            print(f"{done} calls, {failures} failures, worst {worst:.2f} of what is allowed", flush=True)
    minutes = (time.perf_counter() - start) / 60
    print(f"{done} calls in {minutes:.0f} minutes, {failures} failures, worst {worst:.2f} of what is allowed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
