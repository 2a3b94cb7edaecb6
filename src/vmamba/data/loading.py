"""A data loader that can go on in the middle of an epoch, and that tells errors of the data as they are."""

import atexit
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple
from weakref import WeakSet

from torch.utils.data import DataLoader, Dataset, default_collate

from vmamba.data.sampling import EpochSampler, SampleKey
from vmamba.errors import CheckpointError, DataError

TRIES = 100
"""So many damaged samples in a row are not a blemish of the data any more."""


class ShardError(DataError):
    """A file that holds many samples cannot be read.

    Args:
        message: Names it.
        samples: How many it holds: from a sample in it, so far on is one of another file.
    """

    def __init__(self, message: str, samples: int = 1) -> None:
        super().__init__(message)
        self.samples = samples


class Loaded(NamedTuple):
    """A batch, and where it comes from."""

    batch: Any
    indices: list[int]  # of its samples in the data set, in order
    skipped: list[str]  # what was wrong with those left out


class ResumableLoader(DataLoader[Any]):
    """A `DataLoader` over an `EpochSampler`, with a state; it yields `Loaded`.

    A `DataError` comes out of it as it was raised, also from a worker, where PyTorch would wrap a traceback
    into its message; so does a worker that died or hangs. Workers leave signals to the process that runs the
    steps.

    Args:
        dataset: Indexed by `SampleKey`.
        sampler: The order, and where in it to go on.
        collate_fn: How samples become a batch; None for PyTorch's default.
        on_error: What to do about a sample that raises `DataError`: "raise" it, "replace" it by the next
            readable one (training: batches keep their size), or "drop" it from the batch (evaluation).
        timeout: Seconds to wait for a worker's batch.
        kwargs: `DataLoader`'s.

    Attributes:
        consumed: Samples of the epoch, over all ranks, whose step is done. Whoever runs the steps sets it:
            the loader itself has read ahead.
        skipped: What was wrong with the samples left out so far, each once.
    """

    sampler: EpochSampler

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: EpochSampler,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        *,
        on_error: Literal["raise", "replace", "drop"] = "raise",
        timeout: float = 60,
        num_workers: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            _ErrorsAsSamples(dataset, on_error),
            sampler=sampler,
            collate_fn=_Collate(collate_fn or default_collate, on_error),
            worker_init_fn=_leave_signals,
            num_workers=num_workers,
            timeout=timeout if num_workers else 0,
            **kwargs,
        )
        self.consumed = 0
        self.skipped: dict[str, None] = {}

    def __iter__(self) -> Iterator[Loaded]:  # type: ignore[override]
        batches = super().__iter__()
        _workers.update(getattr(batches, "_workers", []))
        while True:
            try:
                loaded = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                raise self._explain(error, getattr(batches, "_workers", [])) from error
            if isinstance(loaded, DataError):
                raise loaded
            self.skipped.update(dict.fromkeys(loaded.skipped))
            if loaded.indices:  # else all of it was dropped
                yield loaded

    def _explain(self, error: RuntimeError, workers: list[Any]) -> Exception:
        """A worker's death or silence as the user's to mend, with what is left of the workers put away."""
        text = str(error)
        if "timed out" not in text and "DataLoader worker" not in text:
            return error
        ended = [worker for worker in workers if worker.exitcode is not None]
        dead = ", ".join(f"{worker.pid} (exit code {worker.exitcode})" for worker in ended)
        _kill(workers)
        self._iterator = None  # the next one starts new workers
        if "timed out" in text:
            return DataError(
                f"no batch from the data workers within {self.timeout:g} s: a worker hangs or the storage "
                "does not answer; raise train.loader_timeout if the data are that slow"
            )
        return DataError(
            f"a data worker died: {dead or text}; if it was killed (exit code -9), memory ran out: lower "
            "train.workers"
        )

    def state_dict(self) -> dict[str, int]:
        """(epoch, samples consumed): all there is to the order and the augmentation; and in what parts."""
        return {"epoch": self.sampler.epoch, "consumed": self.consumed, "part": self._part}

    @property
    def _part(self) -> int:
        """Samples that all ranks read at a time."""
        return (self.batch_size or 1) * self.sampler.world_size

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind the last step of `state`.

        Raises:
            CheckpointError: It is within an epoch that was read in other parts, which Lightning counts.
        """
        if 0 < state["consumed"] < self.sampler.total and state["part"] != self._part:
            raise CheckpointError(
                f"the checkpoint is within an epoch, read in parts of {state['part']} samples; here they "
                f"would be of {self._part}: resume with the same processes and train.micro_batch_size"
            )
        self.sampler.epoch, self.consumed = state["epoch"], state["consumed"]
        self.sampler.done = (self.sampler.epoch, self.consumed)


class _ErrorsAsSamples(Dataset[Any]):
    """Yields (index, sample or error, errors on the way to it)."""

    def __init__(self, dataset: Dataset[Any], on_error: str) -> None:
        self.dataset, self.on_error = dataset, on_error

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: SampleKey) -> tuple[int, Any, list[str]]:
        skipped: list[str] = []
        index = key.index
        for _ in range(TRIES if self.on_error == "replace" else 1):
            try:
                return index, self.dataset[SampleKey(key.epoch, index)], skipped
            except DataError as error:
                last = error
                skipped.append(str(error))
                index = (index + (error.samples if isinstance(error, ShardError) else 1)) % len(self)
        if self.on_error == "replace":
            last = DataError(f"{TRIES} damaged samples in a row, the last: {last}")
        return key.index, last, skipped


class _Collate:
    def __init__(self, collate: Callable[[list[Any]], Any], on_error: str) -> None:
        self.collate, self.on_error = collate, on_error

    def __call__(self, samples: list[tuple[int, Any, list[str]]]) -> Loaded | DataError:
        errors = [sample for _, sample, _ in samples if isinstance(sample, DataError)]
        if errors and self.on_error != "drop":
            return errors[0]
        good = [(index, sample) for index, sample, _ in samples if not isinstance(sample, DataError)]
        return Loaded(
            self.collate([sample for _, sample in good]) if good else None,
            [index for index, _ in good],
            [message for _, _, skipped in samples for message in skipped],
        )


def _leave_signals(worker: int) -> None:
    """Let the process that runs the steps decide when to stop, though a whole group was told to."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), signal.SIG_IGN)


_workers: WeakSet[Any] = WeakSet()
"""All that may be alive."""


def _kill(workers: Iterable[Any]) -> None:
    """Put workers away, also those that hang; PyTorch's handler would raise an error for each."""
    handled = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if handled else None
    for worker in workers:
        worker.kill()
        worker.join()
    if handled:
        signal.signal(signal.SIGCHLD, before)


@atexit.register
def _kill_all() -> None:
    """Python's own end would send a signal that they ignore, and wait for them."""
    _kill([worker for worker in _workers if worker.is_alive()])
