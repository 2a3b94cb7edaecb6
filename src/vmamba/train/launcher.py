"""The start of the other processes of a run, and what follows if one of them fails.

Lightning's launcher and its methods are private; `tests/train/test_launcher.py` fails if they change.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

GRACE = 60.0
"""Seconds for the first process to end by itself, with its own message, once another has failed."""


class PatientLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher, which leaves the first process time to explain and to save.

    Lightning kills the first process at most 5 s after another one failed: before it has said what
    happened, or while it writes a checkpoint. Here it has `GRACE` seconds to end by itself, which on a CPU
    it does at once. On GPUs it may wait in a collective operation for the lost one, so it is ended then.
    """

    def _call_children_scripts(self) -> None:
        super()._call_children_scripts()
        self._others: list[subprocess.Popen[bytes]] = self.procs
        self.procs = []  # those that Lightning watches; without any it stops
        threading.Thread(
            target=_end_after_another, args=(self._others,), name="vmamba: the other processes", daemon=True
        ).start()

    def kill(self, signum: Any) -> None:
        """Send a signal to the processes that were started."""
        for process in getattr(self, "_others", []):
            process.send_signal(signum)


def _end_after_another(others: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait for the others to end; if one fails, end them all and this process after `GRACE` seconds."""
    while not any(process.poll() for process in others):
        if all(process.returncode == 0 for process in others):
            return
        time.sleep(0.5)
    time.sleep(GRACE)
    for rank, process in enumerate(others, 1):
        if process.poll():
            print(
                f"vmamba: process {rank} of {len(others) + 1} ended with status {process.returncode}, "
                f"and the first did not end by itself within {GRACE:g} s; it ends now",
                file=sys.stderr,
                flush=True,
            )
        else:
            process.kill()
    os._exit(2)


class PatientDDP(DDPStrategy):
    """Lightning's data-parallel training, started by `PatientLauncher`."""

    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        _make_patient(self)


class PatientFSDP(ModelParallelStrategy):
    """Lightning's sharded training, started by `PatientLauncher`."""

    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        _make_patient(self)


def _make_patient(strategy: DDPStrategy | ModelParallelStrategy) -> None:
    """Exchange the launcher, unless there is none because torchrun or SLURM starts the processes."""
    if strategy._launcher is not None:
        assert strategy.cluster_environment is not None  # Lightning has just used it
        strategy._launcher = PatientLauncher(
            strategy.cluster_environment, strategy.num_processes, strategy.num_nodes
        )
