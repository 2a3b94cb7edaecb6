"""The selective scan: one operator, its routes in a table, and a file for each backend."""

from vmamba.errors import BackendError, UnknownBackendError
from vmamba.ops import chunked, cpu, decomposition, flops, reference, triton  # noqa: F401  (as attributes)
from vmamba.ops._registry import (
    BackendStatus,
    BackendWarning,
    backends,
    default_backend,
    prove_backend,
    register_backend,
    use_backend,
    verdict_on,
)
from vmamba.ops.routes import NAMED_ROUTES, ROUTES, SIZED_ROUTES, cross_merge, cross_scan, register_route
from vmamba.ops.selective_scan import selective_scan, selective_scan_2d

__all__ = [
    "NAMED_ROUTES",
    "ROUTES",
    "SIZED_ROUTES",
    "BackendError",
    "BackendStatus",
    "BackendWarning",
    "UnknownBackendError",
    "backends",
    "cross_merge",
    "cross_scan",
    "default_backend",
    "prove_backend",
    "register_backend",
    "register_route",
    "selective_scan",
    "selective_scan_2d",
    "use_backend",
    "verdict_on",
]
