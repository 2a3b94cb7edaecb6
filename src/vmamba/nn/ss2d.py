"""SS2D: the 2D selective scan as a layer (arXiv 2401.10166, section 4.2).

B batch, H height, W width, C channels outside, D = ssm_ratio·C inside, K routes, N state size, R rank of
delta.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.nn.linear import Linear, convolved_silu, linear, normed_product
from vmamba.ops import decomposition
from vmamba.ops.routes import route_codes


def at_least_float32(t: Tensor) -> Tensor:
    """Half precision widened to float32, everything else as it is."""
    return t.float() if t.dtype == torch.float16 or t.dtype == torch.bfloat16 else t


# A symbolic trace has no types to branch on: it keeps the call as one node.
torch.fx.wrap("at_least_float32")


class SS2D(nn.Module):
    """Project, scan along K routes, finish; (B, H, W, C) → (B, H, W, C).

    The forward is `finish(scan(project(x)))`, so that what the scan takes can be had without running it.

    Args:
        dim: C.
        d_state: N.
        dt_rank: R; default ⌈C / 16⌉.
        ssm_ratio: D / C.
        conv: Kernel size of the depthwise convolution before the scan, odd; 0 leaves it out (its SiLU stays).
        conv_bias: Give that convolution a bias.
        init: "mamba": A = -(1 … N), and softplus(dt_bias) log-uniform in [1e-3, 0.1]; "rand": A_log normal;
            "zero": A_log zero (both with delta's weight and bias drawn small).
        gate: Multiply the normed output by SiLU(z), z a second half of the input projection.
        routes: As for `vmamba.ops.selective_scan_2d`.

    Raises:
        ValueError: An argument is out of range or unknown.
    """

    routes: list[int]
    splits: list[int]

    def __init__(
        self,
        dim: int,
        d_state: int = 1,
        dt_rank: int | None = None,
        ssm_ratio: float = 2.0,
        conv: int = 3,
        conv_bias: bool = False,
        init: str = "mamba",
        gate: bool = False,
        routes: str | tuple[str, ...] = "cross",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        inner, rank = int(ssm_ratio * dim), math.ceil(dim / 16) if dt_rank is None else dt_rank
        if d_state < 1 or rank < 1 or inner < 1:
            raise ValueError(
                f"expected d_state, dt_rank and ssm_ratio·dim of at least 1, got {d_state}, {rank}, {inner}"
            )
        if conv < 0 or (conv > 0 and conv % 2 == 0):
            raise ValueError(f"conv: expected 0 or an odd kernel size, got {conv}")
        if init not in ("mamba", "rand", "zero"):
            raise ValueError(f"init: expected 'mamba', 'rand' or 'zero', got {init!r}")
        self.routes = route_codes(routes)
        self.gated = gate
        self.init = init
        self.splits = [rank, d_state, d_state]
        n_routes = len(self.routes)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}

        self.in_proj = Linear(dim, 2 * inner if gate else inner, bias=False, **dd)
        self.conv = (
            nn.Conv2d(inner, inner, conv, padding=conv // 2, groups=inner, bias=conv_bias, **dd)
            if conv
            else nn.Identity()
        )
        self.x_proj_weight = nn.Parameter(torch.empty(n_routes, sum(self.splits), inner, **dd))
        self.dt_weight = nn.Parameter(torch.empty(n_routes, inner, rank, **dd))
        self.dt_bias = nn.Parameter(torch.empty(n_routes, inner, **dd))
        self.A_log = nn.Parameter(torch.empty(n_routes, inner, d_state, **dd))
        self.D = nn.Parameter(torch.empty(n_routes, inner, **dd))
        self.out_norm = nn.LayerNorm(inner, **dd)
        self.out_proj = Linear(inner, dim, bias=False, **dd)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters of the scan; the submodules draw their own."""
        _, inner, rank = self.dt_weight.shape
        nn.init.uniform_(self.x_proj_weight, -(inner**-0.5), inner**-0.5)  # Linear's default, a group each
        self.D.fill_(1.0)
        if self.init == "mamba":
            nn.init.uniform_(self.dt_weight, -(rank**-0.5), rank**-0.5)
            nn.init.uniform_(self.dt_bias, math.log(1e-3), math.log(0.1))
            dt = self.dt_bias.exp().clamp_(min=1e-4)
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
            self.A_log.copy_(torch.arange(1, self.A_log.shape[2] + 1, device=self.A_log.device).log())
        elif self.init == "rand":
            nn.init.normal_(self.dt_weight, std=0.1)
            nn.init.normal_(self.dt_bias, std=0.1)
            nn.init.normal_(self.A_log)
        else:
            nn.init.uniform_(self.dt_weight, 0.0, 0.1)
            nn.init.uniform_(self.dt_bias, 0.0, 0.1)
            nn.init.zeros_(self.A_log)

    def A(self) -> Tensor:  # noqa: N802
        """A = -exp(A_log), (K, D, N), in float32 at least, also in a model put to half."""
        return -torch.exp(at_least_float32(self.A_log))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """(B, H, W, C) → the operator's x (B, H, W, D), low-rank delta (B, H, W, K, R), B and C
        (B, H, W, K, N), and the gate's z (B, H, W, D) if there is a gate."""
        x, z = self._expand(x)
        delta, B, C = self._scan_inputs(x, self.x_proj_weight)
        return x, delta, B, C, z

    def _expand(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, C) → x after convolution and SiLU, and z, each (B, H, W, D)."""
        x = self.in_proj(x)
        z: Tensor | None = None
        if self.gated:
            x, z = x.chunk(2, dim=-1)
        if not torch.jit.is_scripting():
            return convolved_silu(x, self.conv), z
        return F.silu(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)), z

    def _scan_inputs(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One product for all routes, (B, H, W, D) and (K, R + 2N, D) → delta, B and C, (B, H, W, K, ·)."""
        rows = weight.flatten(0, 1)
        projected = F.linear(x, rows) if torch.jit.is_scripting() else linear(x, rows)
        projected = projected.unflatten(-1, (weight.shape[0], weight.shape[1]))
        delta, B, C = projected.split(self.splits, dim=-1)
        return delta, B, C

    def scan(self, x: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """Run the operator → (B, H, W, D) in float32 (float64 where x is float64), as the paper's V3 does."""
        return self._operator(x, delta, self.A(), B, C, self.D, self.dt_bias, self.dt_weight)

    def _operator(
        self,
        x: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        dt_bias: Tensor,
        dt_weight: Tensor,
    ) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript prunes this branch, not an `and`)
            if torch.compiler.is_exporting():
                return decomposition.selective_scan_2d(
                    x, delta, A, B, C, D, dt_bias, dt_weight, True, self.routes, None, None
                )[0]
        y, _, _ = torch.ops.vmamba.selective_scan_2d(
            x, delta, A, B, C, D, dt_bias, dt_weight, True, self.routes, None, None, None
        )
        return y

    def finish(self, y: Tensor, z: Tensor | None) -> Tensor:
        """Norm in y's type, gate, cast, project back → (B, H, W, C)."""
        if z is None and not torch.jit.is_scripting():
            joined = normed_product(y, self.out_norm, self.out_proj)
            if joined is not None:
                return joined
        weight, bias = self.out_norm.weight.to(y.dtype), self.out_norm.bias.to(y.dtype)
        y = F.layer_norm(y, weight.shape, weight, bias, self.out_norm.eps)
        if z is not None:
            y = y * F.silu(z)
        return self.out_proj(y.to(self.out_proj.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        x, delta, B, C, z = self.project(x)
        return self.finish(self.scan(x, delta, B, C), z)


class CascadeSS2D(SS2D):
    """SS2D with the cascade scan of Table 5: along every row, then along every column.

    Each row is a sequence of its own, read left to right (group 0) plus right to left (group 1) from
    u = LayerNorm(x); then each column likewise, down (group 2) plus up (group 3), from v = LayerNorm of what
    the rows gave, whose projections are made anew. Neither norm has weights. Arguments as for `SS2D`, without
    `routes`.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 1,
        dt_rank: int | None = None,
        ssm_ratio: float = 2.0,
        conv: int = 3,
        conv_bias: bool = False,
        init: str = "mamba",
        gate: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim, d_state, dt_rank, ssm_ratio, conv, conv_bias, init, gate, "cross", device=device, dtype=dtype
        )
        self.routes = route_codes(("row", "row_reversed"))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """As `SS2D.project`, for the rows: delta, B and C are of groups 0 and 1."""
        x, z = self._expand(x)
        x = F.layer_norm(x, [x.shape[-1]])
        delta, B, C = self._scan_inputs(x, self.x_proj_weight[:2])
        return x, delta, B, C, z

    def scan(self, x: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """Rows, then columns → (B, H, W, D)."""
        y = self._scan_lines(x, delta, B, C, 0)
        v = F.layer_norm(y, [y.shape[-1]]).to(x.dtype).transpose(1, 2)
        delta, B, C = self._scan_inputs(v, self.x_proj_weight[2:])
        return self._scan_lines(v, delta, B, C, 2).transpose(1, 2)

    def _scan_lines(self, x: Tensor, delta: Tensor, B: Tensor, C: Tensor, group: int) -> Tensor:
        """Both ways along every line of the image: dimension 1 counts sequences, dimension 2 is one."""
        own = slice(group, group + 2)
        batch, lines = x.shape[0], x.shape[1]
        y = self._operator(
            x.flatten(0, 1).unsqueeze(1),
            delta.flatten(0, 1).unsqueeze(1),
            self.A()[own],
            B.flatten(0, 1).unsqueeze(1),
            C.flatten(0, 1).unsqueeze(1),
            self.D[own],
            self.dt_bias[own],
            self.dt_weight[own],
        )
        return y.squeeze(1).unflatten(0, (batch, lines))
