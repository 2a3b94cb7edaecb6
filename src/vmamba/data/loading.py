"""A data loader that can go on in the middle of an epoch, and that tells errors of the data as they are."""

import signal
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, default_collate

from vmamba.data.sampling import EpochSampler
from vmamba.errors import DataError


class ResumableLoader(DataLoader[Any]):
    """A `DataLoader` over an `EpochSampler`, with a state.

    A `DataError` comes out of it as it was raised, also from a worker, where PyTorch would wrap a traceback
    into its message. Workers leave Ctrl-C to the process that runs the steps.

    Args:
        dataset: Indexed by `SampleKey`.
        sampler: The order, and where in it to go on.
        collate_fn: How samples become a batch; None for PyTorch's default.
        kwargs: `DataLoader`'s.

    Attributes:
        consumed: Samples of the epoch, over all ranks, whose step is done. Whoever runs the steps sets it:
            the loader itself has read ahead.
    """

    sampler: EpochSampler

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: EpochSampler,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            _ErrorsAsSamples(dataset),
            sampler=sampler,
            collate_fn=_CollateUnlessError(collate_fn or default_collate),
            worker_init_fn=_ignore_interrupt,
            **kwargs,
        )
        self.consumed = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, DataError):
                raise batch
            yield batch

    def state_dict(self) -> dict[str, int]:
        """(epoch, samples consumed): all there is to the order and the augmentation."""
        return {"epoch": self.sampler.epoch, "consumed": self.consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind the last step of `state`."""
        self.sampler.epoch, self.consumed = state["epoch"], state["consumed"]
        self.sampler.done = (self.sampler.epoch, self.consumed)


class _ErrorsAsSamples(Dataset[Any]):
    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.dataset[key]
        except DataError as error:
            return error


class _CollateUnlessError:
    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        errors = [sample for sample in samples if isinstance(sample, DataError)]
        return errors[0] if errors else self.collate(samples)


def _ignore_interrupt(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
