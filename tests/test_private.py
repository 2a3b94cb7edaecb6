"""What of PyTorch is private and used here still means what it meant."""

import os
import signal
import time
from typing import Any

import pytest
from torch.utils.data import DataLoader

from vmamba import _torch_private as private


def slowly(index: int) -> int:
    """What a dataset of eight samples does that hangs at the sixth."""
    time.sleep(1000 if index == 5 else 0)
    return index


class Hanging:
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        return slowly(index)


def loader(**kwargs: Any) -> Any:
    return DataLoader(Hanging(), num_workers=2, batch_size=2, **kwargs)  # type: ignore[arg-type]


def test_the_workers_of_a_loader() -> None:
    assert private.loader_workers(iter(DataLoader(Hanging()))) == []  # type: ignore[arg-type]
    data = loader()
    batches = iter(data)
    workers = private.loader_workers(batches)
    assert len(workers) == 2
    assert all(worker.pid and worker.is_alive() for worker in workers)
    private.end_loader_workers(data, batches)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_that_hang_are_ended_at_once(persistent: bool) -> None:
    data = loader(timeout=1, persistent_workers=persistent)
    batches = iter(data)
    workers = private.loader_workers(batches)
    with pytest.raises(RuntimeError) as raised:
        list(batches)
    assert str(raised.value).startswith(private.LOADER_TIMED_OUT)
    start = time.monotonic()
    private.end_loader_workers(data, batches)
    del batches
    assert time.monotonic() - start < 4  # PyTorch waits 5 seconds for each
    assert not any(worker.is_alive() for worker in workers)
    again = iter(data)  # by new workers
    assert next(again).tolist() == [0, 1]
    assert not set(workers) & set(private.loader_workers(again))
    private.end_loader_workers(data, again)


@pytest.mark.skipif(os.name != "posix", reason="there is no SIGCHLD")
def test_the_handler_of_a_workers_death_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    # PyTorch sets it once in a process, be it in another test.
    monkeypatch.setattr("torch.utils.data._utils.signal_handling._SIGCHLD_handler_set", False)

    def mine(number: int, frame: Any) -> None: ...

    before = signal.signal(signal.SIGCHLD, mine)
    try:
        with private.no_worker_death_handler():
            data = loader()
            batches = iter(data)
            assert signal.getsignal(signal.SIGCHLD) is not mine  # it is PyTorch's
        assert signal.getsignal(signal.SIGCHLD) is mine
        private.end_loader_workers(data, batches)
    finally:
        signal.signal(signal.SIGCHLD, before)
