"""The private interfaces of PyTorch that this library uses, each with the reason.

tests/test_private.py fails when one of them changes its meaning.
"""

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

# --- vmamba.data.loading: the workers of a DataLoader ------------------------------------------------------
# Its public face can neither name its workers nor end one that hangs: it waits for a batch forever, or raises
# after a timeout and leaves the process behind.

LOADER_TIMED_OUT = "DataLoader timed out"
"""How the message of the error begins that a loader raises when no batch came in time; it has no class."""


def loader_workers(batches: Any) -> list[Any]:
    """The worker processes behind an iterator of a `DataLoader`; none where the loader reads by itself."""
    return list(getattr(batches, "_workers", []))


def end_loader_workers(loader: Any, batches: Any) -> None:
    """End the workers of a loader's iterator, also those that hang; its next iterator starts new ones."""
    if workers := loader_workers(batches):
        batches._workers_done_event = _KillInsteadOfEvent(workers)
        batches._shutdown_workers()
    loader._iterator = None


def kill(workers: Iterable[Any]) -> None:
    """End processes, also those that hang."""
    for worker in workers:
        worker.kill()
        worker.join()


class _KillInsteadOfEvent:
    """In place of the event by which PyTorch tells workers to end.

    A worker that was killed may have held the event's lock, and whoever sets the event then waits forever.
    """

    def __init__(self, workers: Iterable[Any]) -> None:
        self._workers = list(workers)

    def set(self) -> None:
        kill(self._workers)

    def is_set(self) -> bool:
        return True


@contextmanager
def no_worker_death_handler() -> Iterator[None]:
    """Within the block an iterator of a `DataLoader` may be made without PyTorch's handler of SIGCHLD.

    The handler raises wherever the process happens to be when a worker dies, be it in the middle of a step.
    """
    # Windows has no such signal, and only the main thread can set a handler.
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)
