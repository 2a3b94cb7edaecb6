"""Check that the installed package has its weights, and that the CPU kernel gives the reference's result.

python tools/check_installed.py
"""

import platform
import sys
from pathlib import Path

import timm
import torch

import vmamba


def main() -> None:
    package = Path(vmamba.__file__).resolve()
    if not package.is_relative_to(Path(sys.prefix).resolve()):
        raise SystemExit(f"vmamba is not installed in {sys.prefix}, but imported from {package}")
    torch.manual_seed(0)
    model = timm.create_model("vmamba_pico_wide", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    scores = {}
    for backend in ("cpu", "reference"):
        with torch.inference_mode(), vmamba.ops.use_backend(backend):
            scores[backend] = model(images)
    torch.testing.assert_close(scores["cpu"], scores["reference"], rtol=1e-4, atol=1e-4)
    print(
        f"Python {platform.python_version()}, PyTorch {torch.__version__}, {platform.platform()}: "
        f"{package} classifies with the kernel as with the reference"
    )


if __name__ == "__main__":
    main()
