"""Exports in tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def traced_once() -> Iterator[None]:
    """Inside the block a model, known by its name, is traced by PyTorch once: that takes seconds."""
    import onnx_ir as ir

    from vmamba.export import graph

    translated: dict[Any, Any] = {}
    original = graph._translated

    def remembered(subject: Any) -> Any:
        key = subject.name, subject.preprocesses
        if key not in translated:
            model, sizes = original(subject)
            translated[key] = ir.to_proto(model), sizes
        model, sizes = translated[key]
        return ir.from_proto(model), sizes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "_translated", remembered)
        yield
