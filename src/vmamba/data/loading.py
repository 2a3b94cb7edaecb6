"""A data loader that can resume in the middle of an epoch, and that raises data errors unchanged."""

import atexit
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple
from weakref import WeakSet

from torch.utils.data import DataLoader, Dataset, default_collate

from vmamba._torch_private import (
    LOADER_TIMED_OUT,
    end_loader_workers,
    kill,
    loader_workers,
    unregister_workers,
)
from vmamba.data.sampling import EpochSampler, SampleKey
from vmamba.errors import CheckpointError, DataError
from vmamba.processes import end_with_parent

MAX_DAMAGED_IN_A_ROW = 100
"""Damaged samples in a row after which loading fails: more are not just a few bad files."""


class ShardError(DataError):
    """A file that holds many samples cannot be read.

    Args:
        message: Names the file.
        samples: How many samples it holds. "replace" skips that many, to reach a sample of another file.
    """

    def __init__(self, message: str, samples: int = 1) -> None:
        super().__init__(message)
        self.samples = samples


class WorkerError(DataError):
    """A process that reads data died or hangs."""


class LoadedBatch(NamedTuple):
    """A batch, and where it comes from.

    Attributes:
        batch: The collated samples.
        keys: Their keys, in order.
        skipped: For each sample left out, what was wrong with it.
    """

    batch: Any
    keys: list[SampleKey]
    skipped: list[str]

    @property
    def indices(self) -> list[int]:
        """The samples' indices in the dataset, in order."""
        return [key.index for key in self.keys]


class ResumableLoader(DataLoader[Any]):
    """A `DataLoader` over an `EpochSampler`, with a state; it yields `LoadedBatch`.

    A `DataError` in a worker is raised as it is, where PyTorch would put a traceback into its message, with
    one more sentence: how to leave such samples out. If a worker died or hangs, `WorkerError` is raised.
    Workers ignore signals: the process that runs the steps decides when to stop.

    Args:
        dataset: Indexed by `SampleKey`.
        sampler: The order, and where in it to go on.
        collate_fn: How samples become a batch; None for PyTorch's default.
        on_error: What to do about a sample that raises `DataError`: "raise" it, "replace" it by the next
            readable one (training: batches keep their size), or "drop" it from the batch (evaluation).
        timeout: Seconds to wait for a worker's batch.
        kwargs: `DataLoader`'s.

    Attributes:
        consumed: Samples of the epoch, over all ranks, whose step is done. The training loop sets it, since
            the loader has read ahead.
        skipped: What was wrong with the samples left out so far, each message once.
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
            worker_init_fn=_start_worker,
            num_workers=num_workers,
            timeout=min(timeout, 1) if num_workers else 0,
            **kwargs,
        )
        self.on_error = on_error
        self.patience = timeout
        self.consumed = 0
        self.skipped: dict[str, None] = {}

    def __iter__(self) -> Iterator[LoadedBatch]:  # type: ignore[override]
        batches = super().__iter__()
        unregister_workers(batches)  # _next() notices their deaths
        workers = loader_workers(batches)
        _all_workers.update(workers)
        while (loaded := self._next(batches, workers)) is not None:
            if isinstance(loaded, DataError):
                # Not left to the garbage collector, see close().
                end_loader_workers(self, batches)
                if self.on_error == "raise":
                    loaded.args = (
                        f"{loaded}; to leave out samples that cannot be read: train.on_error=skip",
                    )
                raise loaded
            self.skipped.update(dict.fromkeys(loaded.skipped))
            if loaded.keys:  # otherwise all samples of the batch were dropped
                yield loaded

    def close(self) -> None:
        """End the workers that wait for the next epoch; iterating once more starts new ones.

        The garbage collector may close their queues first: they then never hear that they shall end, and
        PyTorch waits five seconds for each, in the middle of whatever runs then.
        """
        if self._iterator is not None:
            end_loader_workers(self, self._iterator)

    def _next(self, batches: Iterator[Any], workers: Sequence[Any]) -> Any:
        """The next batch, or None after the last; PyTorch's timeout of one second is retried."""
        start = time.monotonic()
        while True:
            try:
                return next(batches, None)
            except Exception as error:  # a worker's death can raise any of a dozen types
                if isinstance(error, (OSError, EOFError)):  # a pipe breaks shortly before its process ends
                    for worker in workers:
                        worker.join(0.1)
                ended = [worker for worker in workers if worker.exitcode]
                timed_out = str(error).startswith(LOADER_TIMED_OUT)
                if not ended and not timed_out:
                    raise
                if not ended and time.monotonic() - start < self.patience:
                    continue
                end_loader_workers(self, batches)
                raise WorkerError(_explain_silence(ended, self.patience)) from error

    def read_again(self, keys: Sequence[SampleKey]) -> Any:
        """Read these samples again, in this process, and collate them to a batch."""
        collate: Any = self.collate_fn
        return collate.collate([self.samples[key] for key in keys])

    def state_dict(self) -> dict[str, int]:
        """Epoch, samples consumed, and samples per round: all that a resumed epoch depends on."""
        return {"epoch": self.sampler.epoch, "consumed": self.consumed, "part": self._round}

    @property
    def samples(self) -> Any:
        """The dataset that was given; `dataset` is what turns its errors into samples."""
        wrapped: Any = self.dataset
        return wrapped.dataset

    @property
    def _round(self) -> int:
        """Samples that all ranks read at a time."""
        return (self.batch_size or 1) * self.sampler.world_size

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the last step of `state`.

        Raises:
            CheckpointError: It is within an epoch, and a round had another number of samples, which would
                break Lightning's count of rounds.
        """
        if 0 < state["consumed"] < self.sampler.total and state["part"] != self._round:
            raise CheckpointError(
                f"the checkpoint is within an epoch, read in parts of {state['part']} samples; here they "
                f"would be of {self._round}: resume with the same processes and train.micro_batch_size"
            )
        self.sampler.epoch, self.consumed = state["epoch"], state["consumed"]
        self.sampler.done = (self.sampler.epoch, self.consumed)


def _explain_silence(ended: Sequence[Any], patience: float) -> str:
    if ended:
        processes = ", ".join(f"{worker.pid} (exit code {worker.exitcode})" for worker in ended)
        return (
            f"a data worker died: {processes}; if it was killed (exit code -9), memory ran out: lower "
            "train.workers"
        )
    return (
        f"no batch from the data workers within {patience:g} s: a worker hangs or the storage does not "
        "answer; raise train.loader_timeout if the data are that slow"
    )


class _ErrorsAsSamples(Dataset[Any]):
    """Yields (key, sample or error, messages of the samples skipped before it)."""

    def __init__(self, dataset: Dataset[Any], on_error: str) -> None:
        self.dataset, self.on_error = dataset, on_error

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: SampleKey) -> tuple[SampleKey, Any, list[str]]:
        skipped: list[str] = []
        replacing = key
        for _ in range(MAX_DAMAGED_IN_A_ROW if self.on_error == "replace" else 1):
            try:
                return replacing, self.dataset[replacing], skipped
            except DataError as error:
                last = error
                skipped.append(str(error))
                step = error.samples if isinstance(error, ShardError) else 1
                replacing = replacing._replace(index=(replacing.index + step) % len(self))
        if self.on_error == "replace":
            last = DataError(f"{MAX_DAMAGED_IN_A_ROW} damaged samples in a row, the last: {last}")
        return key, last, skipped


class _Collate:
    def __init__(self, collate: Callable[[list[Any]], Any], on_error: str) -> None:
        self.collate, self.on_error = collate, on_error

    def __call__(self, samples: list[tuple[SampleKey, Any, list[str]]]) -> LoadedBatch | DataError:
        errors = [sample for _, sample, _ in samples if isinstance(sample, DataError)]
        if errors and self.on_error != "drop":
            return errors[0]
        good = [(key, sample) for key, sample, _ in samples if not isinstance(sample, DataError)]
        return LoadedBatch(
            self.collate([sample for _, sample in good]) if good else None,
            [key for key, _ in good],
            [message for _, _, skipped in samples for message in skipped],
        )


def _start_worker(worker: int) -> None:
    """Ignore signals, which reach the whole process group: the main process alone decides when to stop."""
    end_with_parent()
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):  # Windows lacks the last two
            signal.signal(getattr(signal, name), signal.SIG_IGN)


_all_workers: WeakSet[Any] = WeakSet()
"""Every worker that was started and may be alive."""


@atexit.register
def _kill_all_workers() -> None:
    """Kill workers at exit: Python would send them a signal that they ignore, and wait for their end."""
    kill([worker for worker in _all_workers if worker.is_alive()])
