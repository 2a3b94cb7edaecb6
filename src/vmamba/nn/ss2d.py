"""SS2D: the 2D selective scan as a layer (arXiv 2401.10166, section 4.2).

b batch, h height, w width, c channels outside, d = ssm_ratio·c channels inside, k routes, n state size,
r rank of delta.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba._torch_private import is_exporting
from vmamba.nn.config import SS2DConfig, configured
from vmamba.nn.half import call_in_type_of, is_half
from vmamba.nn.layer import Layer
from vmamba.ops import decomposition
from vmamba.ops._registry import backend_of_graph, is_compiled
from vmamba.ops.routes import route_codes
from vmamba.ops.selective_scan import traced_scan


def at_least_float32(t: Tensor) -> Tensor:
    """Half precision widened to float32, everything else as it is."""
    return t.float() if t.dtype == torch.float16 or t.dtype == torch.bfloat16 else t


# A symbolic trace has no types to branch on: it keeps the call as one node.
torch.fx.wrap("at_least_float32")


def scan_along(
    routes: list[int],
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    dt_weight: Tensor,
) -> Tensor:
    """The operator with low-rank delta and softplus, in TorchScript and export too; y in the state's type.

    Args:
        routes: k codes.
        x: (b, h, w, d).
        delta: (b, h, w, k, r).
        A: (k, d, n).
        B: (b, h, w, k, n).
        C: (b, h, w, k, n).
        D: (k, d).
        dt_bias: (k, d).
        dt_weight: (k, d, r).
    """
    backend: str | None = None
    if not torch.jit.is_scripting():  # TorchScript prunes this branch, not an `and`
        if is_exporting():
            return decomposition.exported(x, delta, A, B, C, D, dt_bias, dt_weight, True, routes, None, None)
        if is_compiled():
            backend = backend_of_graph(x.device)
        if torch.jit.is_tracing():
            return traced_scan(x, delta, A, B, C, D, dt_bias, dt_weight, True, routes, None, None, None)
    y, _, _ = torch.ops.vmamba.selective_scan_2d(
        x, delta, A, B, C, D, dt_bias, dt_weight, True, routes, None, None, backend
    )
    return y


class SS2D(Layer):
    """Project, scan along k routes, finish; (b, h, w, c) → (b, h, w, c).

    The forward is `finish(scan(project(x)))`, so that the scan's operands can be computed without running it.

    Args:
        dim: c.
        config: The settings; None for the defaults.
        device: Of the parameters.
        dtype: Of the parameters.
        changes: Settings in which the layer differs from `config`: `SS2D(96, d_state=16, gate=True)`.

    Attributes:
        config: The settings.
        routes: The code of each route, as the operator takes them.

    Raises:
        TypeError: `changes` names an unknown setting.
        ValueError: A setting is out of range or unknown.
    """

    routes: list[int]
    splits: list[int]

    def __init__(
        self,
        dim: int,
        config: SS2DConfig | None = None,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **changes: Any,
    ) -> None:
        super().__init__()
        self.config = configured(config, changes)
        self.in_channels = dim
        inner, rank, n = self.config.inner(dim), self.config.rank(dim), self.config.d_state
        self.routes = route_codes(self.config.routes)
        self.splits = [rank, n, n]
        k = len(self.routes)
        of_route = self.config.channels_of_route(dim, k)
        self.split_channels = self.config.split_channels
        dd: dict[str, Any] = {"device": device, "dtype": dtype}

        self.in_proj = nn.Linear(dim, 2 * inner if self.config.gate else inner, bias=False, **dd)
        self.conv = self._depthwise_conv(inner, **dd)
        self.act = nn.SiLU()
        self.x_proj_weight = nn.Parameter(torch.empty(k, sum(self.splits), inner, **dd))
        self.dt_weight = nn.Parameter(torch.empty(k, of_route, rank, **dd))
        self.dt_bias = nn.Parameter(torch.empty(k, of_route, **dd))
        self.A_log = nn.Parameter(torch.empty(k, of_route, n, **dd))
        self.D = nn.Parameter(torch.empty(k, of_route, **dd))
        self.out_norm = nn.LayerNorm(inner, **dd)
        self.gate_act = nn.SiLU() if self.config.gate else None
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.reset_parameters()

    def _depthwise_conv(self, inner: int, **dd: Any) -> nn.Module:
        kernel, dilation = self.config.ssm_conv, self.config.ssm_conv_dilation
        if not kernel:
            return nn.Identity()
        return nn.Conv2d(
            inner,
            inner,
            kernel,
            padding=dilation * (kernel // 2),
            dilation=dilation,
            groups=inner,
            bias=self.config.ssm_conv_bias,
            **dd,
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters of the scan; the submodules draw their own."""
        if self.dt_weight.is_meta:  # no values to draw, and PyTorch's draws are slow even there
            return
        inner, rank = self.x_proj_weight.shape[2], self.dt_weight.shape[2]
        # The default of nn.Linear, for each route.
        nn.init.uniform_(self.x_proj_weight, -(inner**-0.5), inner**-0.5)
        self.D.fill_(1.0)
        if self.config.ssm_init == "mamba":
            nn.init.uniform_(self.dt_weight, -(rank**-0.5), rank**-0.5)
            nn.init.uniform_(self.dt_bias, math.log(1e-3), math.log(0.1))
            dt = self.dt_bias.exp().clamp_(min=1e-4)
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
            self.A_log.copy_(torch.arange(1, self.A_log.shape[2] + 1, device=self.A_log.device).log())
        elif self.config.ssm_init == "rand":
            nn.init.normal_(self.dt_weight, std=0.1)
            nn.init.normal_(self.dt_bias, std=0.1)
            nn.init.normal_(self.A_log)
        else:
            nn.init.uniform_(self.dt_weight, 0.0, 0.1)
            nn.init.uniform_(self.dt_bias, 0.0, 0.1)
            nn.init.zeros_(self.A_log)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The parameters of the recurrence: A_log, D and delta's bias."""
        return {"A_log", "D", "dt_bias"}

    def A(self) -> Tensor:  # noqa: N802
        """A = -exp(A_log), (k, d, n), in float32 at least, even if the model is in half precision."""
        return -torch.exp(at_least_float32(self.A_log))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """(b, h, w, c) → the operator's x (b, h, w, d), low-rank delta (b, h, w, k, r), B and C
        (b, h, w, k, n), and the gate's z (b, h, w, d) if there is a gate."""
        x, z = self._expand(x)
        delta, B, C = self._scan_inputs(x, self.x_proj_weight)
        return x, delta, B, C, z

    def _expand(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(b, h, w, c) → x after convolution and SiLU, and z, each (b, h, w, d)."""
        x, z = self._split(self.in_proj(x))
        return self.act(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)), z

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(b, h, w, 2d) → x and z with a gate; else x (b, h, w, d) and None."""
        if self.gate_act is None:
            return x, None
        x, z = x.chunk(2, dim=-1)
        return x, z

    def _scan_inputs(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One product for all routes, (b, h, w, d) and (k, r + 2n, d) → delta, B and C, (b, h, w, k, ·)."""
        projected = self._linear(x, weight.flatten(0, 1)).unflatten(-1, (weight.shape[0], weight.shape[1]))
        delta, B, C = projected.split(self.splits, dim=-1)
        return delta, B, C

    def _linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def scan(self, x: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """Run the operator → (b, h, w, d) in float32 (float64 where x is float64), as the paper's V3 does."""
        if self.split_channels:
            return self._scan_parts(x, delta, B, C)
        return scan_along(self.routes, x, delta, self.A(), B, C, self.D, self.dt_bias, self.dt_weight)

    def _scan_parts(self, x: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """A scan of one route for each part of the channels."""
        k, A = len(self.routes), self.A()
        parts: list[Tensor] = []
        for i, x_of_route in enumerate(x.chunk(k, dim=-1)):
            y = scan_along(
                self.routes[i : i + 1],
                x_of_route,
                delta[:, :, :, i : i + 1],
                A[i : i + 1],
                B[:, :, :, i : i + 1],
                C[:, :, :, i : i + 1],
                self.D[i : i + 1],
                self.dt_bias[i : i + 1],
                self.dt_weight[i : i + 1],
            )
            parts.append(y)
        return torch.cat(parts, dim=-1)

    def finish(self, y: Tensor, z: Tensor | None) -> Tensor:
        """Norm in y's type, gate, cast, project back → (b, h, w, c)."""
        return self.out_proj(self._gated_norm(y, z))

    def _gated_norm(self, y: Tensor, z: Tensor | None) -> Tensor:
        y = self._norm(y)
        if self.gate_act is not None:
            assert z is not None
            y = y * self.gate_act(z)
        return y.to(self.x_proj_weight.dtype)

    def _norm(self, y: Tensor) -> Tensor:
        """out_norm(y) in y's type, even if the model is in half precision and its weights narrower than y."""
        if torch.jit.is_scripting():
            return self._scripted_norm(y)
        else:  # noqa: RET505  (TorchScript compiles what follows an `if`, but not its `else`)
            return call_in_type_of(y, self.out_norm) if is_half(self.out_norm) else self.out_norm(y)

    def _scripted_norm(self, y: Tensor) -> Tensor:
        """`_norm` in TorchScript, which evaluates the `hasattr` calls when it compiles."""
        if hasattr(self.out_norm, "normalized_shape"):  # noqa: SIM102
            if hasattr(self.out_norm, "bias"):  # noqa: SIM102
                if self.out_norm.bias is not None:
                    weight, bias = self.out_norm.weight.to(y.dtype), self.out_norm.bias.to(y.dtype)
                    return F.layer_norm(y, self.out_norm.normalized_shape, weight, bias, self.out_norm.eps)
        return self.out_norm(y)

    def forward(self, x: Tensor) -> Tensor:
        x, delta, B, C, z = self.project(x)
        return self.finish(self.scan(x, delta, B, C), z)


class CascadeSS2D(SS2D):
    """SS2D with the cascade scan of Table 5: along every row, then along every column.

    Each row of u = LayerNorm(x) is a separate sequence, scanned left to right (route 0) and right to left
    (route 1), and the two are added. v = LayerNorm of the result is projected again, and each of its columns
    is scanned likewise, down (route 2) and up (route 3). Neither norm has weights. Arguments as for `SS2D`;
    the setting `routes` is always "cascade".
    """

    def __init__(
        self,
        dim: int,
        config: SS2DConfig | None = None,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **changes: Any,
    ) -> None:
        # Weights for four routes; each of the two scans uses two of them.
        four = replace(configured(config, changes), routes="cross")
        super().__init__(dim, four, device=device, dtype=dtype)
        self.config = replace(four, routes="cascade")
        self.routes = route_codes(("row", "row_reversed"))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """As `SS2D.project`, for the scan of the rows: delta, B and C have routes 0 and 1 only."""
        x, z = self._expand(x)
        x = F.layer_norm(x, [x.shape[-1]])
        delta, B, C = self._scan_inputs(x, self.x_proj_weight[:2])
        return x, delta, B, C, z

    def scan(self, x: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """Rows, then columns → (b, h, w, d)."""
        y = self._scan_lines(x, delta, B, C, 0)
        v = F.layer_norm(y, [y.shape[-1]]).to(x.dtype).transpose(1, 2)
        delta, B, C = self._scan_inputs(v, self.x_proj_weight[2:])
        return self._scan_lines(v, delta, B, C, 2).transpose(1, 2)

    def _scan_lines(self, x: Tensor, delta: Tensor, B: Tensor, C: Tensor, first: int) -> Tensor:
        """Routes `first` and `first + 1` along each line x[:, i], a row (or a column, where transposed)."""
        routes = slice(first, first + 2)
        batch, lines = x.shape[0], x.shape[1]
        y = scan_along(
            self.routes,
            x.flatten(0, 1).unsqueeze(1),
            delta.flatten(0, 1).unsqueeze(1),
            self.A()[routes],
            B.flatten(0, 1).unsqueeze(1),
            C.flatten(0, 1).unsqueeze(1),
            self.D[routes],
            self.dt_bias[routes],
            self.dt_weight[routes],
        )
        return y.squeeze(1).unflatten(0, (batch, lines))
