"""The VSS block (arXiv 2401.10166, section 4.3): SS2D and an MLP, each behind a norm, with residuals."""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from vmamba.nn.linear import HIDDEN_AT_ONCE, Mlp, runs_as_written
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
            if self._goes_in_parts(x):
                return self._in_parts(x)
        x = x + self.drop_path1(self.op(self.norm1(x)))
        if self.mlp is not None:
            x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x

    def _mlp_branch(self, x: Tensor) -> Tensor:
        assert self.mlp is not None
        return self.mlp(self.norm2(x))

    def _goes_in_parts(self, x: Tensor) -> bool:
        layers = (self.op, self.drop_path1, self.norm2, self.mlp, self.drop_path2)
        return (
            not torch.is_grad_enabled()
            and not self.training
            and runs_as_written(x)
            and isinstance(self.op, SS2D)
            and not any(m is not None and (m._forward_hooks or m._forward_pre_hooks) for m in layers)
        )

    def _in_parts(self, x: Tensor) -> Tensor:
        """Without gradients: what follows the scan some rows at a time, so that it stays in the cache."""
        x_in, delta, B, C, z = self.op.project(self.norm1(x))
        y = self.op.scan(x_in, delta, B, C)
        x = _add_in_parts(x, self.op.finish, (y, z), y.shape[-1])
        if self.mlp is not None:
            x = _add_in_parts(x, self._mlp_branch, (x,), self.hidden)
        return x


def _add_in_parts(
    x: Tensor, function: Callable[..., Tensor], operands: tuple[Tensor | None, ...], width: int
) -> Tensor:
    """x + function(*operands) for a function of rows, whose widest value between is `width` wide."""
    step = max(64, HIDDEN_AT_ONCE // width)
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) <= step:
        return x + function(*operands)
    out = torch.empty_like(rows)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        own = (None if t is None else t.reshape(-1, t.shape[-1])[part] for t in operands)
        torch.add(rows[part], function(*own), out=out[part])
    return out.view(x.shape)
