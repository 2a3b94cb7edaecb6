import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from vmamba._torch_private import loader_workers
from vmamba.data import EpochSampler, ResumableLoader, SampleKey
from vmamba.data.loading import ShardError
from vmamba.errors import DataError


class Numbers(torch.utils.data.Dataset[Any]):
    """0 to 7, some of them damaged."""

    def __init__(self, *damaged: int) -> None:
        self.damaged = damaged

    def __len__(self) -> int:
        return 8

    def __getitem__(self, key: SampleKey) -> torch.Tensor:
        if key.index in self.damaged:
            raise DataError(f"number {key.index} is damaged")
        return torch.tensor(key.index)


def loader(data: Any, **kwargs: Any) -> ResumableLoader:
    return ResumableLoader(data, EpochSampler(8, shuffle=False), batch_size=2, **kwargs)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_is_told_with_what_can_be_done(workers: int) -> None:
    batches = iter(loader(Numbers(5), num_workers=workers))
    assert next(batches).batch.tolist() == [0, 1]
    assert next(batches).batch.tolist() == [2, 3]
    with pytest.raises(DataError) as raised:
        next(batches)
    what = "number 5 is damaged; to leave out samples that cannot be read: train.on_error=skip"
    assert str(raised.value) == what


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_sample_is_replaced_by_the_next(workers: int) -> None:
    damaged = loader(Numbers(3, 4, 7), on_error="replace", num_workers=workers)
    actual = list(damaged)
    assert [loaded.batch.tolist() for loaded in actual] == [[0, 1], [2, 5], [5, 5], [6, 0]]
    assert [loaded.indices for loaded in actual] == [[0, 1], [2, 5], [5, 5], [6, 0]]
    assert list(damaged.skipped) == [f"number {index} is damaged" for index in (3, 4, 7)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_sample_is_dropped(workers: int) -> None:
    damaged = loader(Numbers(1, 4, 5), on_error="drop", num_workers=workers)
    assert [loaded.batch.tolist() for loaded in damaged] == [[0], [2, 3], [6, 7]]
    assert list(damaged.skipped) == [f"number {index} is damaged" for index in (1, 4, 5)]


def test_damaged_throughout() -> None:
    with pytest.raises(DataError, match=r"100 damaged samples in a row, the last: number 3 is damaged$"):
        list(loader(Numbers(*range(8)), on_error="replace"))


class Sharded(Numbers):
    """Four shards of two samples each."""

    def __getitem__(self, key: SampleKey) -> torch.Tensor:
        if key.index // 2 in self.damaged:
            raise ShardError(f"shard {key.index // 2} is damaged", 2)
        return torch.tensor(key.index)


def test_samples_of_a_damaged_shard_are_replaced_by_those_of_the_next() -> None:
    damaged = loader(Sharded(1, 3), on_error="replace")
    assert [loaded.batch.tolist() for loaded in damaged] == [[0, 1], [4, 5], [4, 5], [0, 1]]
    assert list(damaged.skipped) == ["shard 1 is damaged", "shard 3 is damaged"]


def test_a_damaged_shard_is_told_from_a_worker() -> None:
    with pytest.raises(ShardError, match="shard 0 is damaged") as raised:
        list(loader(Sharded(0), num_workers=1))
    assert raised.value.samples == 2


class Dying(Numbers):
    def __getitem__(self, key: SampleKey) -> torch.Tensor:
        if key.index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(key)


class Hanging(Numbers):
    def __getitem__(self, key: SampleKey) -> torch.Tensor:
        if key.index == 5:
            time.sleep(1000)
        return super().__getitem__(key)


def test_a_closed_loader_has_no_workers_and_can_be_read_again() -> None:
    numbers = loader(Numbers(), num_workers=2, persistent_workers=True)
    first = [batch.indices for batch in numbers]
    workers = loader_workers(numbers._iterator)
    assert [worker.is_alive() for worker in workers] == [True, True]
    numbers.close()
    assert [worker.is_alive() for worker in workers] == [False, False]
    assert [batch.indices for batch in numbers] == first
    numbers.close()
    numbers.close()


def test_a_dead_worker_is_told() -> None:
    with pytest.raises(DataError, match=r"a data worker died: \d+ \(exit code -9\); if it was killed"):
        list(loader(Dying(), num_workers=2, persistent_workers=True))


class Slow(Numbers):
    def __getitem__(self, key: SampleKey) -> torch.Tensor:
        if key.index == 2:
            time.sleep(1.5)  # the loader looks for dead workers every second
        return super().__getitem__(key)


def test_a_slow_worker_is_waited_for() -> None:
    actual = [loaded.batch.tolist() for loaded in loader(Slow(), num_workers=1)]
    assert actual == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_a_hanging_worker_is_told_and_put_away() -> None:
    with pytest.raises(DataError, match=r"no batch .* within 1 s: .* train.loader_timeout"):
        list(loader(Hanging(), num_workers=1, timeout=1))


def test_a_worker_that_dies_with_a_lock() -> None:
    """With that of the event by which PyTorch ends workers: who waits for it waits forever."""
    data = loader(Numbers(), num_workers=1, persistent_workers=True, timeout=1)
    batches = iter(data)
    assert next(batches).batch.tolist() == [0, 1]
    lock = data._iterator._workers_done_event._cond  # type: ignore[union-attr]
    holder = threading.Thread(target=lock.acquire)
    holder.start()
    holder.join()
    with pytest.raises(DataError, match="no batch from the data workers within 1 s"):
        list(batches)
    del batches
    gc.collect()


@pytest.mark.skipif(os.name != "posix", reason="sends signals to data workers")
def test_workers_leave_signals_to_their_parent() -> None:
    """Else they die before the step is done."""
    data = loader(Numbers(), num_workers=2, persistent_workers=True)
    batches = iter(data)
    assert [next(batches).batch.tolist() for _ in range(2)] == [[0, 1], [2, 3]]  # both have begun
    for worker in data._iterator._workers:  # type: ignore[union-attr]
        for name in ("TERM", "INT", "USR1"):
            subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    assert [loaded.batch.tolist() for loaded in batches] == [[4, 5], [6, 7]]
    assert next(iter(data)).batch.tolist() == [0, 1]


HOLDING = """
import builtins
from test_loading import Hanging, loader
data = loader(Hanging(), num_workers=2, persistent_workers=True)
batches = iter(data)
next(batches)
builtins.held = data, batches
"""


def test_workers_do_not_keep_a_process_from_ending() -> None:
    """One of them hangs, and the loader is never closed."""
    done = subprocess.run(
        [sys.executable, "-c", HOLDING],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0
    assert done.stderr == ""
