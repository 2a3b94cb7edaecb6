"""The MLP of a VSS block."""

import torch
from torch import Tensor, nn

from vmamba.nn.layer import Layer


class Mlp(Layer):
    """Linear, GELU, linear, with the names of timm's `Mlp`; (..., dim) → (..., dim)."""

    def __init__(
        self, dim: int, hidden: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, device=device, dtype=dtype)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))
