"""Let the processes of a run end with the one that started them, from their very beginning.

With train.devices=2 Lightning starts this command again, for the second process. If the first is killed
before both have found each other, the second would wait for it for half an hour.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

STARTER = "VMAMBA_STARTER"
"""The environment variable with the process id of the command that started this one."""

GRACE = 5.0
"""Seconds for a process to end by itself, with its own message, once the one that started it is gone."""


@contextmanager
def ends_with_its_starter() -> Iterator[None]:
    """End this process when the command that started it is gone, and let those that it starts do likewise.

    Of the processes that the command starts only those are meant that share its run: they have a LOCAL_RANK.
    """
    starter = os.environ.get(STARTER)
    if starter is not None and "LOCAL_RANK" in os.environ:
        watch = threading.Thread(target=_watch, args=(int(starter),), name="vmamba: end with the starter")
        watch.daemon = True
        watch.start()
    os.environ[STARTER] = str(os.getpid())
    try:
        yield
    finally:
        if starter is None:
            del os.environ[STARTER]
        else:
            os.environ[STARTER] = starter


def _watch(starter: int) -> None:
    while os.getppid() == starter:
        time.sleep(1)
    time.sleep(GRACE)
    print(f"vmamba: process {starter}, which started this one, is gone; this one ends too", file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)
