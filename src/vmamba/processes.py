"""Processes that other processes start."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any


def end_with_parent() -> None:
    """End this process, which `multiprocessing` started, as soon as the process that started it is gone.

    Call it first in the new process. A process that is killed cannot end those it started, and PyTorch's
    data workers look whether their parent's number changes: they miss a parent that dies while they start,
    and any parent under "forkserver", where another process is their parent. Here a thread waits for the
    parent instead, and returns at once if that is dead already.
    """
    parent: Any = multiprocessing.parent_process()

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="vmamba: end with the parent", daemon=True).start()


def end_within(seconds: float, starter: int) -> None:
    """End this process and those it starts when the time is up, or when the process that started it is gone.

    For a process that leads a process group (`start_new_session=True`): all of the group is killed.

    Args:
        seconds: From now.
        starter: The id of the process that started this one.
    """
    end = time.monotonic() + seconds

    def watch() -> None:
        while time.monotonic() < end and (sys.platform == "win32" or os.getppid() == starter):
            time.sleep(0.2)
        if sys.platform != "win32":
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name="vmamba: end in time", daemon=True).start()


def kill_group(process: subprocess.Popen[Any]) -> None:
    """Kill a process that was started with `start_new_session=True`, and all that it started."""
    if sys.platform == "win32":
        command = ["taskkill", "/F", "/T", "/PID", str(process.pid)]
        subprocess.run(command, capture_output=True, check=False)
    else:
        with suppress(ProcessLookupError):  # all of it has ended
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
