"""Means of losses over many batches and all processes."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed
from torch import Tensor


def gather(value: Any) -> list[Any]:
    """The value of each process, in every process."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


class RunningMeans:
    """Weighted means by name, summed on the device: only `totals` and `means` synchronise with it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}

    def add(self, values: Mapping[str, Tensor], weight: float) -> None:
        """Add a batch's means; `weight` is its number of samples."""
        for name, value in values.items():
            wide = torch.float32 if value.device.type == "mps" else torch.float64  # MPS has no float64
            share = value.detach().to(wide) * weight
            before = self._sums.get(name)
            self._sums[name] = share if before is None else before.to(share.device) + share
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def totals(self) -> dict[str, tuple[float, float]]:
        """Sum and weight by name, over all processes, each of which must call this."""
        mine = {name: (value.item(), self._weights[name]) for name, value in self._sums.items()}
        totals: dict[str, tuple[float, float]] = {}
        for theirs in gather(mine):
            for name, (value, weight) in theirs.items():
                before = totals.get(name, (0.0, 0.0))
                totals[name] = (before[0] + value, before[1] + weight)
        return totals

    def means(self) -> dict[str, float]:
        """The means by name, over all processes, each of which must call this."""
        return {name: value / weight for name, (value, weight) in self.totals().items()}

    def reset(self) -> None:
        """Forget everything."""
        self._sums, self._weights = {}, {}

    def restore(self, totals: Mapping[str, tuple[float, float]]) -> None:
        """Continue from `totals`, which are of all processes: restore one of them and reset the others."""
        self._sums = {name: torch.tensor(value, dtype=torch.float64) for name, (value, _) in totals.items()}
        self._weights = {name: weight for name, (_, weight) in totals.items()}
