"""The VSS block (arXiv 2401.10166, section 4.3): SS2D and an MLP, each behind a norm, with residuals."""

from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from vmamba.nn.linear import Mlp
from vmamba.nn.parts import add_by_rows, goes_in_parts, in_groups
from vmamba.nn.ss2d import SS2D, CascadeSS2D


class VSSBlock(nn.Module):
    """x + SS2D(norm(x)), then x + MLP(norm(x)); (B, H, W, C) → (B, H, W, C).

    Args:
        dim: C.
        mlp_ratio: Hidden width of the MLP over C; 0 leaves the MLP out, as in the vanilla models.
        drop_path: Rate of stochastic depth of both residual branches.
        routes: As for `SS2D`, or "cascade" for `CascadeSS2D`.
        d_state, dt_rank, ssm_ratio, ssm_conv, ssm_conv_bias, ssm_init, gate: As for `SS2D`.

    Raises:
        ValueError: An argument is out of range or unknown.
    """

    def __init__(
        self,
        dim: int,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        d_state: int = 1,
        dt_rank: int | None = None,
        ssm_ratio: float = 2.0,
        ssm_conv: int = 3,
        ssm_conv_bias: bool = False,
        ssm_init: str = "mamba",
        gate: bool = False,
        routes: str | tuple[str, ...] = "cross",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        args = (dim, d_state, dt_rank, ssm_ratio, ssm_conv, ssm_conv_bias, ssm_init, gate)
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.op = CascadeSS2D(*args, **dd) if routes == "cascade" else SS2D(*args, routes, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, **dd) if mlp_ratio > 0 else nn.Identity()
        self.hidden = int(dim * mlp_ratio)
        self.mlp = Mlp(dim, self.hidden, **dd) if mlp_ratio > 0 else None
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 and mlp_ratio > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript prunes this branch, not an `and`)
            if self._known() and goes_in_parts(self, x):
                inner = x.numel() // x.shape[-1] * self.op.D.shape[1]
                return in_groups(self._by_rows, x, inner)
        x = x + self.drop_path1(self.op(self.norm1(x)))
        if self.mlp is not None:
            x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x

    def _mlp_branch(self, x: Tensor) -> Tensor:
        assert self.mlp is not None
        return self.mlp(self.norm2(x))

    def _known(self) -> bool:
        """Whether what the layers do is known: none has taken the place of another."""
        return isinstance(self.op, SS2D) and all(
            isinstance(m, (DropPath, nn.Identity)) for m in (self.drop_path1, self.drop_path2)
        )

    def _by_rows(self, x: Tensor) -> Tensor:
        """The forward without random numbers; what follows the scan some rows at a time."""
        x = add_by_rows(x, self.op.finish, self._scanned(x), self.op.D.shape[1])
        if self.mlp is not None:
            x = add_by_rows(x, self._mlp_branch, (x,), self.hidden)
        return x

    def _scanned(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What `SS2D.finish` takes; all else is free on return."""
        x, delta, B, C, z = self.op.project(self.norm1(x))
        return self.op.scan(x, delta, B, C), z
