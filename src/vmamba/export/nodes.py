"""Writing ONNX nodes: an operation is a method of its name, `nodes.Add(a, b)`."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir


class Nodes:
    """The nodes of a graph or function in the order in which they are written, with each constant once."""

    def __init__(self) -> None:
        self.tape = ir.tape.Tape()
        self._constants: dict[tuple[Any, ir.DataType], ir.Value] = {}

    def __getattr__(self, operation: str) -> Callable[..., ir.Value]:
        """A function of the operation's inputs, with attributes by keyword, which gives its first output."""
        if not operation[0].isupper():
            raise AttributeError(operation)
        return lambda *inputs, **attributes: self.tape.op(operation, inputs, attributes)

    def of_many(
        self, operation: str, *inputs: ir.Value, outputs: int, **attributes: Any
    ) -> Sequence[ir.Value]:
        """An operation with several outputs."""
        return self.tape.op_multi_out(operation, inputs, attributes, num_outputs=outputs)

    def constant(self, value: Any, dtype: ir.DataType) -> ir.Value:
        """A number, or a tuple of numbers as a vector."""
        key = value, dtype
        if key not in self._constants:
            self._constants[key] = self.Constant(value=tensor(value, dtype))
        return self._constants[key]

    def number(self, value: int) -> ir.Value:
        """A whole number."""
        return self.constant(value, ir.DataType.INT64)

    def vector(self, *values: int) -> ir.Value:
        """A vector of whole numbers."""
        return self.constant(values, ir.DataType.INT64)

    def unsqueeze(self, value: ir.Value, axis: int) -> ir.Value:
        return self.Unsqueeze(value, self.vector(axis))

    def squeeze(self, value: ir.Value, axis: int) -> ir.Value:
        return self.Squeeze(value, self.vector(axis))

    def full(self, shape: ir.Value, value: int, dtype: ir.DataType) -> ir.Value:
        """A tensor of a shape, filled with a number."""
        return self.ConstantOfShape(shape, value=tensor((value,), dtype))

    def sum(self, values: Sequence[ir.Value]) -> ir.Value:
        """The sum of one or several."""
        total = values[0]
        for value in values[1:]:
            total = self.Add(total, value)
        return total


def tensor(value: Any, dtype: ir.DataType) -> ir.TensorProtocol:
    """A tensor of plain values."""
    return ir.tensor(np.asarray(value, dtype.numpy()))
