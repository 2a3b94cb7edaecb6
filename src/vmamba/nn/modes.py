"""The modes of a module: evaluation for the length of a block.

It stands on the lowest floor that has modules, so that every floor that runs a model can import it.
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
            model.train()  # a module may do more than set its flag, such as taking merged weights apart
        for module, training in modes:
            module.training = training
