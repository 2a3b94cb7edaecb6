"""VMamba: the visual state-space backbone (arXiv 2401.10166) for PyTorch and timm.

Importing it registers every variant with timm: `timm.create_model("vmamba_tiny")`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from vmamba import ops
from vmamba.models import LoadReport, VMamba, load_official, load_weights
from vmamba.nn import SS2D, VSSBlock

__version__ = "0.1.0"

__all__ = [
    "SS2D",
    "LoadReport",
    "Predictor",
    "VMamba",
    "VSSBlock",
    "__version__",
    "load",
    "load_official",
    "load_weights",
    "ops",
]

if TYPE_CHECKING:
    from vmamba.inference import Predictor, load


def __getattr__(name: str) -> Any:
    """Import what predicts when it is first asked for: it needs more than the layers and models do."""
    if name in ("load", "Predictor"):
        return getattr(importlib.import_module("vmamba.inference"), name)
    raise AttributeError(f"module 'vmamba' has no attribute {name!r}")
