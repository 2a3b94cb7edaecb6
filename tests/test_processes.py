"""No process outlives the one that started it, even if that is killed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Kills itself when it has started `number` processes. Those forked are held for a second where they begin.
KILLED = """
import multiprocessing, os, signal, sys, time
from multiprocessing.process import BaseProcess
import torch
from vmamba.data import EpochSampler, ResumableLoader

class Numbers:
    def __len__(self):
        return 100

    def __getitem__(self, key):
        return key.index

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def start_and_die(self, start=BaseProcess.start, started=[]):
    start(self)
    started.append(self)
    if len(started) == number:
        die()

if __name__ == "__main__":
    number = int(sys.argv[2])
    multiprocessing.set_start_method(sys.argv[1])
    torch.set_num_threads = lambda number: time.sleep(1)
    BaseProcess.start = start_and_die
    next(iter(ResumableLoader(Numbers(), EpochSampler(100), batch_size=2, num_workers=2)))
    die()
"""


def alive_in(session: int) -> list[int]:
    """The processes of a session that have not ended."""
    alive = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            alive.append(int(folder.name))
    return alive


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
@pytest.mark.parametrize("number", [1, 2, 3], ids=["at the first", "at the last", "at work"])
def test_workers_end_with_the_process_that_started_them(method: str, number: int, tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), method, str(number)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    assert process.wait(timeout=100) == -9
    deadline = time.monotonic() + 60  # a worker that is spawned imports PyTorch first
    while alive := alive_in(process.pid):
        if time.monotonic() > deadline:
            for pid in alive:
                os.kill(pid, 9)
            pytest.fail(f"{len(alive)} processes are left")
        time.sleep(0.05)
