"""When a layer's fused form may replace it: only where the caller cannot observe the difference.

All conditions are checked on every call, so they have to be cheap: about 5 µs for a VSS block.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba import _torch_private
from vmamba.nn.fused.switch import is_enabled


class Form:
    """Base of the fused forms: a subclass of a layer that computes the same in other calls.

    A form has no state. It shares the layer's attributes and lives for one call.

    Attributes:
        submodules: For each submodule that the form computes by itself, the exact types that it supports.
        replaced: The layer's methods that the form overrides.
    """

    submodules: ClassVar[dict[str, tuple[type, ...]]] = {}
    replaced: ClassVar[tuple[tuple[str, Any], ...]] = ()
    forward: Callable[..., Any]

    def __init_subclass__(cls, *, of: type[nn.Module], **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        forms = [base for base in cls.__mro__ if issubclass(base, Form) and base is not Form]
        names = {"forward"} | {name for form in forms for name in vars(form) if not name.startswith("__")}
        methods = ((name, getattr(of, name, None)) for name in sorted(names))
        cls.replaced = tuple((name, method) for name, method in methods if callable(method))
        _FORMS[of] = cls


ABSENT: type = type(None)
"""The type of a submodule that a layer was built without."""
_FORMS: dict[type, type[Form]] = {}


def view(layer: nn.Module) -> Any:
    """The fused form of a layer that must have one, without the checks of `fused_form`."""
    cls: Any = _FORMS[type(layer)]
    form = cls.__new__(cls)
    form.__dict__ = layer.__dict__
    return form


def fused_form(layer: nn.Module, x: Any) -> Any:
    """The fused form of a layer for an input, or None if a hook, patch or transform would notice it."""
    if (
        type(x) is Tensor
        and is_enabled()
        and x.is_cpu
        and not _torch_private.has_global_hook()
        and not _torch_private.is_transformed_or_recorded()
        and x.numel() > 0  # after the line above: torch.jit.trace would warn about this one
        and not _is_patched()
        and type(layer) in _FORMS
        and _is_plain(layer)
    ):
        return view(layer)
    return None


# Layers of PyTorch and timm that the forms compute by themselves; the function says whether its settings are
# supported (None: always).
_SUPPORTED_SETTINGS: dict[type[nn.Module], Callable[[Any], bool] | None] = {
    nn.Linear: None,
    nn.SiLU: None,
    nn.Identity: None,
    DropPath: None,
    nn.GELU: lambda layer: layer.approximate == "none",
    nn.LayerNorm: lambda layer: len(layer.normalized_shape) == 1,
    nn.Conv2d: lambda layer: layer.padding_mode == "zeros" and type(layer.padding) is tuple,
}


def _is_plain(layer: nn.Module) -> bool:
    """Whether a call of the layer does what its class defines and nothing else, in supported submodules.

    That is: no hook, no instance attribute `forward`, parameters of PyTorch's own types, supported settings,
    for the layer and its submodules. Parametrizations change a module's type, so they are excluded too.
    """
    modules = [layer]
    for module in modules:  # the loop appends to the list
        attributes = module.__dict__
        if _torch_private.is_watched(attributes):
            return False
        for parameter in attributes["_parameters"].values():
            if type(parameter) not in _PARAMETERS:
                return False
        kind = type(module)
        if kind in _SUPPORTED_SETTINGS:
            is_supported = _SUPPORTED_SETTINGS[kind]
            if is_supported is not None and not is_supported(module):
                return False
            continue
        form = _FORMS[kind]
        for name, method in form.replaced:
            if getattr(kind, name) is not method:
                return False
        children = attributes["_modules"]
        for name, types in form.submodules.items():
            child = children.get(name)
            if type(child) not in types:
                return False
            if child is not None:
                modules.append(child)
    return True


# Plain tensors: torch.func.functional_call puts them in the place of parameters.
_PARAMETERS: tuple[type, ...] = (nn.Parameter, ABSENT, Tensor)

# Functions that tools for counting or tracing replace temporarily.
_PATCHABLE = [
    (nn.Module, "__call__"),
    *((kind, "forward") for kind in _SUPPORTED_SETTINGS),
    *((F, name) for name in ("linear", "conv2d", "layer_norm", "gelu", "silu")),
]
_ORIGINALS = [(owner, name, getattr(owner, name)) for owner, name in _PATCHABLE]


def _is_patched() -> bool:
    """Whether a method or function that fused forms bypass has been replaced."""
    for owner, name, original in _ORIGINALS:  # noqa: SIM110  (a generator costs more)
        if getattr(owner, name) is not original:
            return True
    return False


def needs_plain_backward(grad: Tensor) -> bool:
    """Whether a backward pass is itself differentiated, transformed, recorded or compiled."""
    return (
        torch.is_grad_enabled()
        or type(grad) is not Tensor
        or _torch_private.is_legacy_batch(grad)
        or torch.compiler.is_compiling()
        or _torch_private.is_transformed_or_recorded()
    )
