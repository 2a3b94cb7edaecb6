"""Whether something fits into this machine's memory, asked before the work on it."""

import os
from pathlib import Path


def lacking_memory(needed: int) -> str | None:
    """None if so many bytes are free, or nobody knows; else both numbers, to be put after "takes".

    Args:
        needed: Bytes of the CPU's memory.
    """
    available = _available_memory()
    if available is None or needed <= available:
        return None
    return f"{needed / 2**30:.1f} GiB, and {available / 2**30:.1f} GiB are free"


def _available_memory() -> int | None:
    """Bytes that this process can still take: what Linux says is free, within the container's limit."""
    limits = []
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        limits.append(1024 * int(lines["MemAvailable"].split()[0]))
    except (OSError, KeyError):
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    try:
        group = Path("/sys/fs/cgroup")
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no limit: no such file, or "max" in it
        pass
    return min(limits, default=None)
