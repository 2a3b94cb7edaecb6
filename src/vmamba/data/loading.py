"""A data loader that can go on in the middle of an epoch."""

from typing import Any

from torch.utils.data import DataLoader

from vmamba.data.sampling import EpochSampler


class ResumableLoader(DataLoader[Any]):
    """A `DataLoader` over an `EpochSampler`, with a state.

    Attributes:
        consumed: Samples of the epoch, over all ranks, whose step is done. Whoever runs the steps sets it: the
            loader itself has read ahead.
    """

    sampler: EpochSampler

    def __init__(self, dataset: Any, sampler: EpochSampler, **kwargs: Any) -> None:
        super().__init__(dataset, sampler=sampler, **kwargs)
        self.consumed = 0

    def state_dict(self) -> dict[str, int]:
        """(epoch, samples consumed): all there is to the order and the augmentation."""
        return {"epoch": self.sampler.epoch, "consumed": self.consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind the last step of `state`; behind the last of an epoch, with the next epoch."""
        epoch, consumed = state["epoch"], state["consumed"]
        per_step = (self.batch_size or 1) * self.sampler.world_size
        steps = len(self)
        if consumed >= steps * per_step:
            epoch, consumed = epoch + 1, 0
        self.sampler.epoch, self.sampler.consumed = epoch, consumed
        self.consumed = consumed
