"""VMamba and its variants, registered with timm."""

from vmamba.models.official import load_official
from vmamba.models.vmamba import ALIASES, VARIANTS, VMamba
from vmamba.models.weights import LoadReport, load_weights

__all__ = ["ALIASES", "VARIANTS", "LoadReport", "VMamba", "load_official", "load_weights"]
