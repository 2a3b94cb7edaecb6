"""The VSS block (arXiv 2401.10166, section 4.3): SS2D and an MLP, each behind a norm, with residuals."""

from typing import TYPE_CHECKING, Any

import torch
from timm.layers import DropPath
from timm.models import checkpoint
from torch import Tensor, nn

from vmamba.nn.config import SS2DConfig, configured
from vmamba.nn.fused.entry import fused_form
from vmamba.nn.fused.switch import fused
from vmamba.nn.layer import MISSHAPEN, Layer
from vmamba.nn.mlp import Mlp
from vmamba.nn.ss2d import SS2D, CascadeSS2D


class VSSBlock(Layer):
    """x + SS2D(norm(x)), then x + MLP(norm(x)); (b, h, w, c) → (b, h, w, c).

    Args:
        dim: c.
        config: Settings of the SS2D layer; routes="cascade" makes it a `CascadeSS2D`.
        mlp_ratio: Hidden width of the MLP over c; 0 leaves the MLP out, as in the vanilla models.
        drop_path: Rate of stochastic depth of both residual branches.
        device: Of the parameters.
        dtype: Of the parameters.
        changes: Settings in which the layer differs from `config`: `VSSBlock(96, d_state=16, gate=True)`.

    Attributes:
        grad_checkpointing: Keep only the block's input for backward, and compute the block again there.

    Raises:
        TypeError: `changes` names an unknown setting.
        ValueError: A setting is out of range or unknown.
    """

    if TYPE_CHECKING:  # all None without an MLP; at run time TorchScript would read the annotations
        norm2: Any
        mlp: Any
        drop_path2: Any

    def __init__(
        self,
        dim: int,
        config: SS2DConfig | None = None,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **changes: Any,
    ) -> None:
        super().__init__()
        config = configured(config, changes)
        ss2d = CascadeSS2D if config.routes == "cascade" else SS2D
        self.in_channels = dim
        self.grad_checkpointing = False
        self.norm1 = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.op = ss2d(dim, config, device=device, dtype=dtype)
        self.drop_path1 = _drop_path(drop_path)
        has_mlp = mlp_ratio > 0
        self.norm2 = nn.LayerNorm(dim, device=device, dtype=dtype) if has_mlp else None
        self.mlp = Mlp(dim, int(dim * mlp_ratio), device=device, dtype=dtype) if has_mlp else None
        self.drop_path2 = _drop_path(drop_path) if has_mlp else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.op(self.norm1(x)))
        if self.mlp is not None:
            x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.grad_checkpointing:
            return super().__call__(*args, **kwargs)
        if torch.compiler.is_compiling():
            return checkpoint(super().__call__, *args, **kwargs)
        try:
            return self._checkpointed(*args, **kwargs)
        except MISSHAPEN as error:
            self.explain_shape(error, *args, **kwargs)
            raise

    def _checkpointed(self, *args: Any, **kwargs: Any) -> Any:
        """The call, recomputed in backward in the form (fused or plain) that the forward had."""
        form = fused_form(self, args[0]) if len(args) == 1 and not kwargs else None
        if form is not None:
            return checkpoint(form.forward, args[0])
        return checkpoint(self._call_plainly, *args, **kwargs)

    def _call_plainly(self, *args: Any, **kwargs: Any) -> Any:
        with fused(False):
            return super().__call__(*args, **kwargs)


def _drop_path(rate: float) -> nn.Module:
    return DropPath(rate) if rate > 0 else nn.Identity()
