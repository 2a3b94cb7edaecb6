"""VMamba and its variants, registered with timm."""

from vmamba.models.official import load_official
from vmamba.models.vmamba import ALIASES, VARIANTS, VMamba

__all__ = ["ALIASES", "VARIANTS", "VMamba", "load_official"]
