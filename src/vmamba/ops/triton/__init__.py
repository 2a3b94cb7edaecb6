"""Backend `triton`: Triton kernels for GPUs (docs/gpu.md). Triton itself is imported with the first call."""

from vmamba.ops.triton.backend import BACKEND, interpreted

__all__ = ["BACKEND", "interpreted"]
