"""Triton's interpreter, made fast enough for tests."""

import functools
from typing import Any

import numpy as np


def _generic_scan(self: Any, inputs: list[Any]) -> list[Any]:
    """As Triton's, which calls the combination once an element; here once a slice along the axis."""
    data = [np.moveaxis(t.handle.data, self.axis, 0) for t in inputs]
    outputs = [np.empty_like(t) for t in data]
    before: list[Any] = []
    for i in range(len(data[0])):
        now = [
            self.to_tensor(np.ascontiguousarray(t[i]), source.dtype)
            for t, source in zip(data, inputs, strict=True)
        ]
        before = list(self.combine_fn.fn(*before, *now)) if before else now
        for output, t in zip(outputs, before, strict=True):
            output[i] = t.handle.data
    return [
        self.to_tensor(np.ascontiguousarray(np.moveaxis(output, 0, self.axis)), source.dtype)
        for output, source in zip(outputs, inputs, strict=True)
    ]


@functools.cache
def speed_up() -> Any:
    """Replace the interpreter's scan for the rest of the process; returns Triton's own."""
    import triton.runtime.interpreter as interpreter

    original = interpreter.ScanOps.generic_scan
    interpreter.ScanOps.generic_scan = _generic_scan
    return original
