"""Logits and gradients of every variant on fixed inputs, to check that a change of the code changes no bit.

    python tools/logits.py before.json          # on the old code
    python tools/logits.py after.json           # on the new code
    python tools/logits.py --compare before.json after.json

Weights are drawn from a fixed seed. The numbers depend on the machine and on PyTorch: compare files that were
written on one machine alone.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import vmamba
from vmamba.models import model_names

SIZES = [(1, 64, 64), (3, 45, 70)]
"""(batch, height, width) at which every variant runs."""
VARIANTS_OF_THE_CODE: dict[str, dict[str, Any]] = {
    "cascade": {"routes": "cascade"},
    "gate": {"gate": True, "ssm_conv_bias": True, "d_state": 2},
    "no convolution": {"ssm_conv": 0, "ssm_ratio": 1.0},
    "vanilla": {"gate": True, "d_state": 3, "mlp_ratio": 0.0, "stem": "patch", "downsample": "merge"},
}
"""Small models with settings that no variant has, or that are worth checking in every type."""


def digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the tensors' bytes."""
    sha = hashlib.sha256()
    for t in tensors:
        sha.update(t.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def images(batch: int, height: int, width: int) -> Tensor:
    """The same images at every call."""
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Digest of the logits in evaluation mode without gradients."""
    with torch.no_grad():
        y = model.eval()(x)
    return {"logits": y.float().tolist(), "sha256": digest([y])}


def gradients(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Digests of a loss' gradients in training mode, for every parameter; drop path has a fixed seed."""
    torch.manual_seed(2)
    y = model.train()(x)
    loss = y.float().square().mean()
    return {"loss": loss.item(), "sha256": digest(torch.autograd.grad(loss, list(model.parameters())))}


def measured() -> dict[str, Any]:
    """All digests, by names that describe them."""
    results: dict[str, Any] = {}
    for name in (each for each in model_names() if ".peers." not in timm.model_entrypoint(each).__module__):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=10, drop_path_rate=0.2)
        for size in SIZES:
            results[f"{name} {size}"] = logits(model, images(*size))
        results[f"{name} {SIZES[1]} gradients"] = gradients(model, images(*SIZES[1]))
    for name, settings in VARIANTS_OF_THE_CODE.items():
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            torch.manual_seed(0)
            model = vmamba.VMamba(depths=(1, 1, 2, 1), dims=(16, 32, 48, 64), num_classes=10, **settings)
            model, x = model.to(dtype), images(*SIZES[1]).to(dtype)
            results[f"{name} {dtype}"] = logits(model, x)
            results[f"{name} {dtype} gradients"] = gradients(model, x)
        with torch.autocast("cpu", torch.bfloat16):
            results[f"{name} autocast"] = logits(model.float(), x.float())
    torch.manual_seed(0)
    pico = timm.create_model("vmamba_pico", num_classes=10)
    # Large enough that the fused forms split it into images and rows.
    results["vmamba_pico large"] = logits(pico, images(3, 704, 704))
    results["vmamba_pico large gradients"] = gradients(pico, images(4, 224, 224))
    return results


def compare(before: Path, after: Path) -> int:
    """Print the names whose digests differ; returns their number."""
    old, new = (json.loads(path.read_text()) for path in (before, after))
    different = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    print(f"{len(different)} of {len({**old, **new})} differ", *different, sep="\n")
    return len(different)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+", help="one to write, or two to compare")
    parser.add_argument("--compare", action="store_true", help="compare two files")
    arguments = parser.parse_args()
    if arguments.compare:
        sys.exit(compare(*arguments.files) > 0)
    torch.set_num_threads(1)
    arguments.files[0].write_text(json.dumps(measured(), indent=1))
