"""Evaluation mode inside a `with` block.

It is in `vmamba.nn`, the lowest layer with modules, so that every package that runs a model can import it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model to evaluation mode inside the `with` block, and give every module its own mode back.

    A model may be partly in training mode, as with frozen layers; `model.train()` alone would lose that.

    Args:
        model: Any module.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        if modes[0][1]:
            model.train()  # not only the flags: a module's train() may do more, such as split merged weights
        for module, training in modes:
            module.training = training
