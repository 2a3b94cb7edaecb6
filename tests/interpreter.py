"""Triton's interpreter, made fast enough for tests."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np


def _generic_scan(self: Any, inputs: list[Any]) -> list[Any]:
    """As Triton's, which combines one element at a time; here in log₂ steps over whole arrays, as a GPU does.

    The combinations are arithmetic alone, which numpy's arrays have too.
    """
    data = [np.moveaxis(t.handle.data, self.axis, 0) for t in inputs]
    step = 1
    with np.errstate(all="ignore"):
        while step < len(data[0]):
            joined = self.combine_fn.fn(*(t[:-step] for t in data), *(t[step:] for t in data))
            data = [np.concatenate((t[:step], new)) for t, new in zip(data, joined, strict=True)]
            step *= 2
    return [
        self.to_tensor(np.ascontiguousarray(np.moveaxis(t, 0, self.axis)), source.dtype)
        for t, source in zip(data, inputs, strict=True)
    ]


_ADAPTED: set[str] = set()


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A function's call from a kernel, as Triton's, which adapts its whole language anew each time."""
    from triton.runtime import interpreter

    if self.fn.__module__ not in _ADAPTED:
        _ADAPTED.add(self.fn.__module__)
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


def _by_name(type_in_numpy: Callable[[Any], np.dtype]) -> Callable[[Any], np.dtype]:
    """Triton's function, which makes its table of types at each call, asked once for each name."""
    known: dict[str, np.dtype] = {}

    def of(dtype: Any) -> np.dtype:
        name = dtype.scalar.name
        if name not in known:
            known[name] = type_in_numpy(dtype)
        return known[name]

    return of


@functools.cache
def speed_up() -> Any:
    """Replace the interpreter's scan and calls for the rest of the process; returns Triton's own scan.

    Sums and products of integers are not computed again in 64 bits to look for an overflow: tests have few
    positions, and a GPU does not look either.
    """
    import triton.runtime.interpreter as interpreter

    original = interpreter.ScanOps.generic_scan
    interpreter.ScanOps.generic_scan = _generic_scan
    interpreter.InterpretedFunction.__call__ = _call
    interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    return original
