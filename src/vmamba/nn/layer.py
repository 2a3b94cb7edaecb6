"""The base of our layers: a call runs the layer's fused form where the difference cannot be observed."""

from typing import Any

import torch
from torch import nn

from vmamba.nn.fused.entry import fused_form


class Layer(nn.Module):
    """An `nn.Module` whose `forward` reads like the paper, and which may have a fused form for a CPU.

    The forms are in `vmamba.nn.fused`. Scripting, tracing, compilation and export see `forward` alone.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Compilers turn the first condition into a constant, and so never see the rest.
        if not torch.compiler.is_compiling() and len(args) == 1 and not kwargs:
            form = fused_form(self, args[0])
            if form is not None:
                return form.forward(args[0])
        return super().__call__(*args, **kwargs)
