"""The selective scan: one operator, an engine a file."""

from vmamba.ops import (  # noqa: F401  (they register themselves)
    chunked,
    cpu,
    decomposition,
    flops,
    reference,
    triton,
)
from vmamba.ops._registry import BackendStatus, BackendWarning, backends, engine_of, use_backend
from vmamba.ops._routes import NAMED_ROUTES, ROUTES, cross_merge, cross_scan
from vmamba.ops.selective_scan import selective_scan, selective_scan_2d

__all__ = [
    "NAMED_ROUTES",
    "ROUTES",
    "BackendStatus",
    "BackendWarning",
    "backends",
    "cross_merge",
    "cross_scan",
    "engine_of",
    "selective_scan",
    "selective_scan_2d",
    "use_backend",
]
