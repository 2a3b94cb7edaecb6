"""VMamba, its variants and its peers, registered with timm."""

import timm

from vmamba.models import peers  # noqa: F401  (registers the models)
from vmamba.models.official import load_official
from vmamba.models.vmamba import ALIASES, VMamba, VMambaConfig
from vmamba.models.weights import LoadReport, load_weights

__all__ = [
    "ALIASES",
    "LoadReport",
    "VMamba",
    "VMambaConfig",
    "load_official",
    "load_weights",
    "model_names",
]


def model_names() -> list[str]:
    """The names of the models that this library registers with timm, the aliases first."""
    names = [
        name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("vmamba.")
    ]
    return [*ALIASES, *(name for name in names if name not in ALIASES)]
