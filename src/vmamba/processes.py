"""Processes that other processes start."""

import multiprocessing
import os
import threading
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
