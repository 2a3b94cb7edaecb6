"""A data loader that can go on in the middle of an epoch, and that tells errors of the data as they are."""

import atexit
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
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


class WorkerError(DataError):
    """A process that reads data died or hangs."""


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
            timeout=min(timeout, 1) if num_workers else 0,
            **kwargs,
        )
        self.patience = timeout
        self.consumed = 0
        self.skipped: dict[str, None] = {}

    def __iter__(self) -> Iterator[Loaded]:  # type: ignore[override]
        with _handler_kept():
            batches = super().__iter__()
        workers = getattr(batches, "_workers", [])
        _workers.update(workers)
        while (loaded := self._next(batches, workers)) is not None:
            if isinstance(loaded, DataError):
                self._put_away(batches)  # else they may be waited for, seconds each, by the garbage collector
                raise loaded
            self.skipped.update(dict.fromkeys(loaded.skipped))
            if loaded.indices:  # else all of it was dropped
                yield loaded

    def _next(self, batches: Iterator[Any], workers: Sequence[Any]) -> Any:
        """The next batch, or None behind the last; PyTorch waits for it a second at a time."""
        start = time.monotonic()
        while True:
            try:
                return next(batches, None)
            except Exception as error:  # a death shows as any of a dozen
                if isinstance(error, (OSError, EOFError)):  # a pipe is gone a moment before its process
                    for worker in workers:
                        worker.join(0.1)
                ended = [worker for worker in workers if worker.exitcode]
                silent = str(error).startswith("DataLoader timed out")
                if not ended and not silent:
                    raise
                if not ended and time.monotonic() - start < self.patience:
                    continue
                dead = ", ".join(f"{worker.pid} (exit code {worker.exitcode})" for worker in ended)
                self._put_away(batches)
                raise WorkerError(
                    f"a data worker died: {dead}; if it was killed (exit code -9), memory ran out: lower "
                    "train.workers"
                    if dead
                    else f"no batch from the data workers within {self.patience:g} s: a worker hangs or the "
                    "storage does not answer; raise train.loader_timeout if the data are that slow"
                ) from error

    def _put_away(self, batches: Any) -> None:
        """End the workers of an iteration, also those that hang."""
        if workers := getattr(batches, "_workers", []):
            batches._workers_done_event = _Kill(workers)
            batches._shutdown_workers()
        self._iterator = None  # the next iteration starts new ones

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
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):  # Windows lacks the last two
            signal.signal(getattr(signal, name), signal.SIG_IGN)


@contextmanager
def _handler_kept() -> Iterator[None]:
    """Leave out PyTorch's handler of a child's death: it raises wherever the process happens to be."""
    # Windows has no such handler, and the main thread alone can set one.
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


_workers: WeakSet[Any] = WeakSet()
"""All that may be alive."""


def _kill(workers: Iterable[Any]) -> None:
    """End workers, also those that hang."""
    for worker in workers:
        worker.kill()
        worker.join()


class _Kill:
    """In place of the event by which PyTorch tells workers to end.

    One that was killed may have held the event's lock, and whoever sets it then waits forever.
    """

    def __init__(self, workers: Iterable[Any]) -> None:
        self._workers = workers

    def set(self) -> None:
        _kill(self._workers)

    def is_set(self) -> bool:
        return True


@atexit.register
def _kill_all() -> None:
    """Python's own end would send a signal that they ignore, and wait for them."""
    _kill([worker for worker in _workers if worker.is_alive()])
