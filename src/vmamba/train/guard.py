"""Find the layer in which the first NaN or infinity arises."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vmamba.errors import UserError


class NonFiniteError(UserError, ArithmeticError):
    """A loss or gradient is NaN or infinite; the message names step, samples and layer."""


def first_nonfinite(module: nn.Module, batch: Any, loss: Callable[[], Tensor]) -> str:
    """Name the first thing in a forward and backward pass that is not finite.

    Args:
        module: The module whose weights and submodules are checked.
        batch: Its input.
        loss: Runs the forward pass of `module` on `batch`, as in the step in question. Gradients are left as
            they were.

    Returns:
        A phrase, such as "the output of stages.0.blocks.1.op".
    """
    for tensor in tree_leaves(batch):
        if isinstance(tensor, Tensor) and not _finite(tensor):
            return "the batch itself"
    for name, parameter in module.named_parameters():
        if not _finite(parameter):
            return f"the weight {name}, before the step"
    nonfinite: list[str] = []
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    with _watching(module, nonfinite):
        value = loss()
        if nonfinite:
            return nonfinite[0]
        if not _finite(value):
            return "the loss itself, of a finite output"
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    if nonfinite:
        return nonfinite[0]
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None and not _finite(gradient):
            return f"the gradient of {names[id(parameter)]}"
    return "nothing: the same samples give finite values now"


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


@contextmanager
def _watching(module: nn.Module, nonfinite: list[str]) -> Iterator[None]:
    """Append each output that is not finite, and each such gradient of an output, in the order they arise."""

    def note(tensor: Tensor, what: str) -> None:
        if not _finite(tensor):
            nonfinite.append(what)

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, inputs: Any, outputs: Any) -> None:
            for tensor in tree_leaves(outputs):
                if isinstance(tensor, Tensor):
                    note(tensor, f"the output of {name}")
                    if tensor.requires_grad:
                        back = f"the gradient that comes back to the output of {name}"
                        tensor.register_hook(partial(note, what=back))

        return hook

    handles = [
        child.register_forward_hook(watch(name or "the model")) for name, child in module.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
