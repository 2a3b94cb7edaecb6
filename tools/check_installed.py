"""Classify with the installed package, in whatever Python runs this: the kernel's answer is the reference's.

python tools/check_installed.py
"""

import platform
from pathlib import Path

import timm
import torch

import vmamba

CHECKOUT = Path(__file__).resolve().parent.parent


def main() -> None:
    place = Path(vmamba.__file__).resolve()
    if place.is_relative_to(CHECKOUT / "src"):
        raise SystemExit(f"this is the checkout, not an installed wheel: {place}")
    torch.manual_seed(0)
    model = timm.create_model("vmamba_pico").eval()
    images = torch.randn(2, 3, 32, 32)
    scores = {}
    for backend in ("cpu", "reference"):
        with torch.inference_mode(), vmamba.ops.use_backend(backend):
            scores[backend] = model(images)
    torch.testing.assert_close(scores["cpu"], scores["reference"], rtol=1e-4, atol=1e-4)
    print(
        f"Python {platform.python_version()}, PyTorch {torch.__version__}, {platform.platform()}: "
        f"{place} classifies with the kernel as with the reference"
    )


if __name__ == "__main__":
    main()
