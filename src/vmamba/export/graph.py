"""From a module to an ONNX graph."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import optimizer

from vmamba.errors import ExportError, UserError
from vmamba.export.nodes import tensor
from vmamba.export.scan import Spelling
from vmamba.export.subject import Subject
from vmamba.export.translation import TRANSLATIONS, lower
from vmamba.ops.decomposition import kept_whole

INPUT = "images"
OPSET = 18
_MOST = 2**40
"""A number of elements that no constant has: all that is constant is computed here, once."""

_LEAST_HALVED = 1024
"""Weights of fewer values stay in float32: a file gains nothing by them."""


def write_graph(subject: Subject, spelling: Spelling) -> tuple[ir.Model, tuple[str, ...]]:
    """The graph of a module, and which of batch, height and width may change.

    Args:
        subject: The module.
        spelling: The runtime that shall be fast.

    Raises:
        ExportError: PyTorch can't trace it, or ONNX has no such operation.
    """
    model, sizes = _translated(subject)
    lower(model, spelling)
    _simplify(model)
    _name_sizes(model, sizes)
    model.producer_name = "vmamba"
    model.metadata_props.update(subject.metadata())
    return model, tuple(sizes.values())


def _translated(subject: Subject) -> tuple[ir.Model, dict[int, str]]:
    """The graph in which a scan is one node, and the names of the input's axes whose size may change."""
    exported, sizes = _traced(subject)
    names = list(subject.outputs(subject.example(subject.preprocessing.size, batch=1)))
    try:
        with _quiet():
            program: Any = torch.onnx.export(
                exported,
                (),
                dynamo=True,
                opset_version=OPSET,
                custom_translation_table=TRANSLATIONS,
                input_names=[INPUT],
                output_names=names,
                verbose=False,
            )
    except UserError:
        raise
    except Exception as error:  # of many kinds, which PyTorch keeps to itself
        raise ExportError(f"{subject.name}: ONNX can't express it: {_reason(error)}") from error
    return program.model, sizes


def _simplify(model: ir.Model) -> None:
    """Compute what is constant, and write what occurs twice once.

    Without onnxscript's rewrite rules: they change nothing in what `lower` wrote, and take most of the time.
    """
    optimizer.fold_constants(
        model, onnx_shape_inference=False, input_size_limit=_MOST, output_size_limit=_MOST
    )
    for simplification in (
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.NameFixPass(),
    ):
        simplification(model)


def _traced(subject: Subject) -> tuple[Any, dict[int, str]]:
    """The exported program, and the names of the input's axes whose size may change.

    A model with a scan takes any size. Others may be made for one size of image; then only the batch
    may change.
    """
    rows, columns = (1, 2) if subject.preprocesses else (2, 3)
    every = {0: "batch", rows: "height", columns: "width"}
    try:
        return _trace(subject, every, subject.example_size), every
    except Exception as error:  # of many kinds, which PyTorch keeps to itself
        if subject.scans:
            raise ExportError(f"{subject.name}: PyTorch can't trace it: {_reason(error)}") from error
    try:
        return _trace(subject, {0: "batch"}, subject.preprocessing.size), {0: "batch"}
    except Exception as error:
        raise ExportError(f"{subject.name}: PyTorch can't trace it: {_reason(error)}") from error


def _trace(subject: Subject, sizes: dict[int, str], size: tuple[int, int]) -> Any:
    dynamic = dict.fromkeys(sizes, torch.export.Dim.DYNAMIC)
    example = subject.example(size)
    with torch.no_grad(), kept_whole(), _quiet():
        return torch.export.export(subject.module, (example,), dynamic_shapes=(dynamic,), strict=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without PyTorch's advice to those who write exporters."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """The first line of the error that is at the bottom of it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _name_sizes(model: ir.Model, sizes: dict[int, str]) -> None:
    """Name the symbols of the sizes that may change, wherever they occur."""
    shape: Any = model.graph.inputs[0].shape
    symbols = {str(shape[axis].value): name for axis, name in sizes.items()}
    pattern = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in symbols))

    def named(size: int | ir.SymbolicDim) -> int | str | None:
        if isinstance(size, int):
            return size
        if size.value is None:
            return None
        return pattern.sub(lambda match: symbols[match[0]], str(size.value))

    for value in (*model.graph.inputs, *(output for node in model.graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([named(size) for size in value.shape])


def halve_weights(model: ir.Model) -> None:
    """Keep in float16 what of the weights loses nothing by it, and widen it when the model is loaded."""
    graph = model.graph
    first = graph[0]
    for name, value in list(graph.initializers.items()):
        weight: Any = value.const_value
        if weight is None or weight.dtype != ir.DataType.FLOAT or weight.size < _LEAST_HALVED:
            continue
        values = weight.numpy()
        with np.errstate(over="ignore"):
            halved = values.astype(np.float16)
        if not np.array_equal(halved.astype(np.float32), values):
            continue
        kept = ir.Value(
            name=f"{name}_float16",
            type=ir.TensorType(ir.DataType.FLOAT16),
            shape=ir.Shape(values.shape),
            const_value=tensor(halved, ir.DataType.FLOAT16),
        )
        cast = ir.node("Cast", [kept], {"to": ir.DataType.FLOAT})
        graph.insert_before(first, cast)
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        graph.initializers.pop(name)
        cast.outputs[0].name = name
        graph.register_initializer(kept)
