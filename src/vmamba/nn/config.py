"""The settings of an SS2D layer as one object."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

INITIALISATIONS = ("mamba", "rand", "zero")


@dataclass(frozen=True)
class SS2DConfig:
    """How an SS2D layer is built; the names are those of `VMamba`'s arguments.

    Attributes:
        d_state: State size n of the scan.
        dt_rank: Rank r of delta; None for ⌈dim / 16⌉.
        ssm_ratio: Channels inside the layer over those outside.
        ssm_conv: Kernel size of the depthwise convolution before the scan, odd; 0 leaves the convolution out
            and keeps its SiLU.
        ssm_conv_bias: Give that convolution a bias.
        ssm_conv_dilation: Dilation of that convolution; above 1 where an `output_stride` keeps a stage large.
        ssm_init: "mamba": A = -(1 … n), and softplus(dt_bias) log-uniform in [1e-3, 0.1]; "rand": A_log
            normal; "zero": A_log zero (both with delta's weight and bias drawn small).
        gate: Multiply the normed output by SiLU(z), where z is the second half of the input projection.
        routes: Names as for `vmamba.ops.selective_scan_2d`, a permutation of your own by its name of
            `vmamba.ops.register_route`; or "cascade" (Table 5), which only `VSSBlock` and `CascadeSS2D` take.
        split_channels: Read only a part of the channels, d / k of them, along each of the k routes.

    Raises:
        ValueError: A value is out of range or unknown.
    """

    d_state: int = 1
    dt_rank: int | None = None
    ssm_ratio: float = 2.0
    ssm_conv: int = 3
    ssm_conv_bias: bool = False
    ssm_conv_dilation: int = 1
    ssm_init: str = "mamba"
    gate: bool = False
    routes: str | tuple[str, ...] = "cross"
    split_channels: bool = False

    def __post_init__(self) -> None:
        if self.d_state < 1 or (self.dt_rank is not None and self.dt_rank < 1):
            raise ValueError(
                f"expected d_state and dt_rank of at least 1, got {self.d_state} and {self.dt_rank}"
            )
        if self.ssm_conv < 0 or (self.ssm_conv > 0 and self.ssm_conv % 2 == 0):
            raise ValueError(f"ssm_conv: expected 0 or an odd kernel size, got {self.ssm_conv}")
        if self.ssm_conv_dilation < 1:
            raise ValueError(f"ssm_conv_dilation: expected at least 1, got {self.ssm_conv_dilation}")
        if self.ssm_init not in INITIALISATIONS:
            expected = ", ".join(map(repr, INITIALISATIONS))
            raise ValueError(f"ssm_init: expected one of {expected}, got {self.ssm_init!r}")
        if self.routes == "cascade" and self.split_channels:
            raise ValueError("split_channels: the cascade reads all channels along each route")

    def inner(self, dim: int) -> int:
        """Channels d inside a layer of `dim` channels.

        Raises:
            ValueError: There would be none.
        """
        inner = int(self.ssm_ratio * dim)
        if inner < 1:
            raise ValueError(f"expected ssm_ratio·dim of at least 1, got {self.ssm_ratio}·{dim}")
        return inner

    def channels_of_route(self, dim: int, n_routes: int) -> int:
        """Channels that each of the routes reads in a layer of `dim` channels.

        Raises:
            ValueError: The routes do not divide the channels.
        """
        inner = self.inner(dim)
        if not self.split_channels:
            return inner
        if inner % n_routes:
            raise ValueError(
                f"split_channels: expected a multiple of the {n_routes} routes, got {inner} channels "
                f"({self.ssm_ratio}·{dim})"
            )
        return inner // n_routes

    def rank(self, dim: int) -> int:
        """Rank r of delta in a layer of `dim` channels."""
        return math.ceil(dim / 16) if self.dt_rank is None else self.dt_rank


def configured(config: SS2DConfig | None, changes: dict[str, Any]) -> SS2DConfig:
    """The config (None: the defaults) with some settings changed.

    Raises:
        TypeError: `config` is not an SS2DConfig, or `changes` names an unknown setting.
        ValueError: A value is out of range or unknown.
    """
    if config is None:
        config = SS2DConfig()
    if not isinstance(config, SS2DConfig):
        raise TypeError(f"config: expected an SS2DConfig, got {config!r}; settings are keyword arguments")
    names = [field.name for field in fields(SS2DConfig)]
    unknown = [name for name in changes if name not in names]
    if unknown:
        raise TypeError(f"unknown setting {unknown[0]!r}; expected one of {', '.join(names)}")
    return replace(config, **changes)
