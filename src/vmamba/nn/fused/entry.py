"""When a layer's fused form may stand in for it: only where nobody could tell.

Every condition is looked at in each call, so it has to be cheap: about 5 µs for a VSS block.
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
        submodules: For each submodule that the form computes by itself the exact types that it knows.
        replaced: The layer's methods that the form does not call.
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
    """The fused form of a layer that is known to have one, whatever watches it."""
    cls: Any = _FORMS[type(layer)]
    form = cls.__new__(cls)
    form.__dict__ = layer.__dict__
    return form


def fused_form(layer: nn.Module, x: Any) -> Any:
    """The fused form of a layer for an input, or None where somebody could tell it from the layer."""
    if (
        type(x) is Tensor
        and is_enabled()
        and x.is_cpu
        and not _torch_private.has_global_hook()
        and not _torch_private.is_transformed_or_recorded()
        and x.numel() > 0  # behind the line above: a trace would warn of it
        and not _is_patched()
        and type(layer) in _FORMS
        and _is_plain(layer)
    ):
        return view(layer)
    return None


# Layers of PyTorch and timm that the forms compute by themselves, and the settings which they know.
_KNOWN_SETTINGS: dict[type[nn.Module], Callable[[Any], bool] | None] = {
    nn.Linear: None,
    nn.SiLU: None,
    nn.Identity: None,
    DropPath: None,
    nn.GELU: lambda layer: layer.approximate == "none",
    nn.LayerNorm: lambda layer: len(layer.normalized_shape) == 1,
    nn.Conv2d: lambda layer: layer.padding_mode == "zeros" and type(layer.padding) is tuple,
}


def _is_plain(layer: nn.Module) -> bool:
    """Whether nothing but its class decides what a call of the layer does, and its submodules are known.

    That is: no hook, no `forward` of the instance, parameters of PyTorch's own types, known settings; and the
    same of its submodules. Parametrizations change the type of the module.
    """
    modules = [layer]
    for module in modules:  # grows
        attributes = module.__dict__
        if _torch_private.is_watched(attributes):
            return False
        for parameter in attributes["_parameters"].values():
            if type(parameter) not in _PARAMETERS:
                return False
        kind = type(module)
        if kind in _KNOWN_SETTINGS:
            settings = _KNOWN_SETTINGS[kind]
            if settings is not None and not settings(module):
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


# torch.func.functional_call puts plain tensors in.
_PARAMETERS: tuple[type, ...] = (nn.Parameter, ABSENT, Tensor)

# Tools that count or trace replace these functions for a while.
_PATCHABLE = [
    (nn.Module, "__call__"),
    *((kind, "forward") for kind in _KNOWN_SETTINGS),
    *((F, name) for name in ("linear", "conv2d", "layer_norm", "gelu", "silu")),
]
_ORIGINALS = [(owner, name, getattr(owner, name)) for owner, name in _PATCHABLE]


def _is_patched() -> bool:
    """Whether a method or function that a fused form leaves out has been replaced."""
    for owner, name, original in _ORIGINALS:  # noqa: SIM110  (a generator costs more)
        if getattr(owner, name) is not original:
            return True
    return False


def looked_at_in_backward(grad: Tensor) -> bool:
    """Whether a backward pass is differentiated, transformed, recorded or compiled in its turn."""
    return (
        torch.is_grad_enabled()
        or type(grad) is not Tensor
        or _torch_private.is_legacy_batch(grad)
        or torch.compiler.is_compiling()
        or _torch_private.is_transformed_or_recorded()
    )
