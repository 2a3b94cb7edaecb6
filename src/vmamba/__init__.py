"""VMamba: the visual state-space backbone (arXiv 2401.10166) for PyTorch and timm."""

__version__ = "0.1.0"
