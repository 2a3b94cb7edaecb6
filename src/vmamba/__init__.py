"""VMamba: the visual state-space backbone (arXiv 2401.10166) for PyTorch and timm.

Importing it registers every variant with timm: `timm.create_model("vmamba_tiny")`.
"""

from vmamba import ops
from vmamba.models import LoadReport, VMamba, load_official, load_weights
from vmamba.nn import SS2D, VSSBlock

__version__ = "0.1.0"

__all__ = [
    "SS2D",
    "LoadReport",
    "VMamba",
    "VSSBlock",
    "__version__",
    "load_official",
    "load_weights",
    "ops",
]
