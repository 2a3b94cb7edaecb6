"""The operands of one call of the operator, and their validation.

Sizes: b batch, h height, w width, l = h·w positions, d channels, k routes, n state size, r rank of delta.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vmamba.ops.routes import GIVEN, check_codes, scan_order

FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(eq=False, slots=True)  # no NamedTuple: TorchDynamo 2.7 knows neither their properties nor slices
class Operands:
    """The operator's arguments, named as in its schema; nothing here reads a tensor's values.

    Attributes:
        x: (b, h, w, d).
        delta: (b, h, w, k, d), or with `delta_weight` its low-rank factor (b, h, w, k, r).
        A: (k, d, n).
        B: (b, h, w, k, n).
        C: (b, h, w, k, n).
        D: (k, d).
        delta_bias: (k, d).
        delta_weight: (k, d, r).
        delta_softplus: Whether delta passes through softplus.
        routes: k codes, see `vmamba.ops.routes`.
        initial_state: (b, k, d, n); None: zero.
        orders: (m, l) int64, a permutation for each of the m routes whose code is `GIVEN`.
    """

    x: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    delta_bias: Tensor | None
    delta_weight: Tensor | None
    delta_softplus: bool
    routes: list[int]
    initial_state: Tensor | None = None
    orders: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The nine operands that have gradients, in the order of `Gradients`."""
        return (
            self.x,
            self.delta,
            self.A,
            self.B,
            self.C,
            self.D,
            self.delta_bias,
            self.delta_weight,
            self.initial_state,
        )

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def length(self) -> int:
        """l."""
        return self.x.shape[1] * self.x.shape[2]

    @property
    def n_routes(self) -> int:
        """k."""
        return len(self.routes)

    @property
    def n_state(self) -> int:
        """n."""
        return self.A.shape[2]

    @property
    def rank(self) -> int:
        """r; 0 where delta is given for every channel."""
        return 0 if self.delta_weight is None else self.delta_weight.shape[2]

    @property
    def state_dtype(self) -> torch.dtype:
        """The type of the state and of every reduction: float64 where x is float64, else float32."""
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32

    def order(self) -> Tensor:
        """(k, l): the flat image positions in the order in which each route visits them."""
        return scan_order(self.routes, self.x.shape[1], self.x.shape[2], self.device, self.orders)

    def validate(self, out_dtype: torch.dtype | None = None) -> None:
        """Check the type, device and shape of every operand.

        Raises:
            TypeError: An operand or `out_dtype` is not of a supported type.
            ValueError: An operand is on another device than x, or its shape does not fit; a route is unknown.
        """
        device = self.device
        for name, operand in zip(_NAMES, self.tensors, strict=True):
            if operand is None:
                continue
            if operand.dtype not in FLOAT_TYPES:
                raise TypeError(
                    f"{name}: expected float16, bfloat16, float32 or float64, got {operand.dtype}"
                )
            if operand.device != device:
                raise ValueError(f"{name}: expected on {device} as x is, got {operand.device}")
        if out_dtype is not None and out_dtype not in FLOAT_TYPES:
            raise TypeError(f"out_dtype: expected float16, bfloat16, float32 or float64, got {out_dtype}")
        check_codes(self.routes)
        self._check_shapes()
        if self.orders is not None or GIVEN in self.routes:
            self._check_orders()

    def _check_shapes(self) -> None:
        x, A, delta_weight = self.x, self.A, self.delta_weight
        if x.ndim != 4:
            raise ValueError(f"x: expected (b, h, w, d), got shape {tuple(x.shape)}")
        if A.ndim != 3:
            raise ValueError(f"A: expected (k, d, n), got shape {tuple(A.shape)}")
        if delta_weight is not None and (delta_weight.ndim != 3 or delta_weight.shape[2] < 1):
            raise ValueError(f"delta_weight: expected (k, d, r), got shape {tuple(delta_weight.shape)}")
        b, h, w, d = x.shape
        k, n, r = self.n_routes, self.n_state, self.rank
        if h < 1 or w < 1 or d < 1 or n < 1:
            raise ValueError(
                f"x, A: expected h, w, d and n of at least 1, got x {tuple(x.shape)} and A {tuple(A.shape)}"
            )
        delta_shape = ((b, h, w, k, d), "(b, h, w, k, d)") if r == 0 else ((b, h, w, k, r), "(b, h, w, k, r)")
        expected = (
            (x.shape, ""),
            delta_shape,
            ((k, d, n), "(k, d, n)"),
            ((b, h, w, k, n), "(b, h, w, k, n)"),
            ((b, h, w, k, n), "(b, h, w, k, n)"),
            ((k, d), "(k, d)"),
            ((k, d), "(k, d)"),
            ((k, d, r), "(k, d, r)"),
            ((b, k, d, n), "(b, k, d, n)"),
        )
        for name, operand, (shape, letters) in zip(_NAMES, self.tensors, expected, strict=True):
            if operand is not None and operand.shape != shape:
                raise ValueError(
                    f"{name}: expected {letters} = {tuple(shape)}, got shape {tuple(operand.shape)}; "
                    f"x is {tuple(x.shape)}, there are k = {k} routes and n = {n}"
                )

    def _check_orders(self) -> None:
        shape = (sum(code == GIVEN for code in self.routes), self.length)
        orders = self.orders
        if orders is None or orders.dtype != torch.int64 or orders.shape != shape:
            got = "none" if orders is None else f"{orders.dtype} of shape {tuple(orders.shape)}"
            raise ValueError(
                f"routes: expected {shape[0]} permutations of {shape[1]} positions, an int64 tensor {shape}; "
                f"got {got}"
            )
        if orders.device != self.device:
            raise ValueError(f"routes: expected permutations on {self.device} as x is, got {orders.device}")


_NAMES = ("x", "delta", "A", "B", "C", "D", "delta_bias", "delta_weight", "initial_state")
