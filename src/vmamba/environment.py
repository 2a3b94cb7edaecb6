"""The software and hardware that a result was made with."""

import platform
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import timm
import torch

import vmamba


def environment() -> dict[str, Any]:
    """Date, command, versions, hardware and backends, to be written beside a result."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "vmamba": vmamba.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "backends": {status.name: status.reason or "available" for status in vmamba.ops.backends()},
        "cpu kernel": vmamba.ops.cpu.instruction_set(),
    }


def _processor() -> str:
    """The processor's name; on Linux from /proc, because the platform module does not have it."""
    file = Path("/proc/cpuinfo")
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
