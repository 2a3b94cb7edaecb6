"""The backends that run here, and the check that one is near enough to the truth."""

from typing import Any

import pytest
import torch

from vmamba.ops import backends
from vmamba.ops.accuracy import TENSORS, cast, given, judge, operands, value_and_gradients

__all__ = [
    "BACKENDS",
    "FAST",
    "PYTORCH_2_7",
    "TENSORS",
    "assert_accurate",
    "cast",
    "given",
    "operands",
    "value_and_gradients",
]

BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}"))
    for name, reason in ((status.name, status.reason) for status in backends())
]
"""Every backend that can run here."""
FAST = [backend for backend in BACKENDS if backend.values != ("reference",)]

PYTORCH_2_7 = torch.__version__.startswith("2.7.")
"""The lowest version that is served; what docs/guides/deploy.md says of it."""


def assert_accurate(*calls: dict[str, Any], backend: str, **kwargs: Any) -> None:
    """Forward and gradients of float32 (or half) calls are as near to float64 as the contract asks.

    The error of a small call is luck: give several calls of the same shape, they are judged together.
    """
    for deviation in judge(*calls, backend=backend, **kwargs):
        assert deviation.within, str(deviation)
