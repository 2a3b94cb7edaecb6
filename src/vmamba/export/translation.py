"""What PyTorch's exporter does not know, in ONNX: one node while it works, plain operations afterwards.

`TRANSLATIONS` is for `torch.onnx.export(…, custom_translation_table=TRANSLATIONS)`. It makes of each scan a
node `vmamba::SelectiveScan2D`, which no optimisation takes apart. `lower` then writes it out. A runtime
with a kernel for that node could take the graph before this step.
"""

from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript import opset18
from onnxscript.values import Op, Opset

from vmamba.errors import ModelError
from vmamba.export.pixels import PIXELS, write_pixels
from vmamba.export.scan import ALONG_LINES, OPERANDS, ScanForm, Spelling, write_scan
from vmamba.ops.routes import GIVEN, names_of

_DOMAIN, _SCAN, _PIXELS = "vmamba", "SelectiveScan2D", "Pixels"
_ROUTES, _SOFTPLUS, _SETTINGS = "routes", "delta_softplus", "settings"
_FLOATS = [f"tensor({name})" for name in ("float16", "bfloat16", "float", "double")]


def _scan_node() -> Op:
    schema = onnx.defs.OpSchema
    kinds = schema.FormalParameterOption
    letters = {name: f"T{name}" for name in OPERANDS}  # one each: their types may differ
    return _node(
        _SCAN,
        [
            # x, delta, A, B and C are always there
            schema.FormalParameter(name, letter, param_option=kinds.Single if i < 5 else kinds.Optional)
            for i, (name, letter) in enumerate(letters.items())
        ],
        [schema.FormalParameter(name, "TState") for name in ("y", "last_state")],
        {
            **{
                letter: ["tensor(int64)"] if name == "orders" else _FLOATS for name, letter in letters.items()
            },
            "TState": ["tensor(float)", "tensor(double)"],
        },
        {_ROUTES: schema.AttrType.INTS, _SOFTPLUS: schema.AttrType.INT},
    )


def _pixels_node() -> Op:
    schema = onnx.defs.OpSchema
    images, pixels = schema.FormalParameter("images", "TImages"), schema.FormalParameter("pixels", "TPixels")
    types = {"TImages": ["tensor(uint8)"], "TPixels": ["tensor(float)"]}
    return _node(_PIXELS, [images], [pixels], types, {_SETTINGS: schema.AttrType.STRING})


def _node(
    name: str, inputs: Any, outputs: Any, types: dict[str, list[str]], attributes: dict[str, Any]
) -> Op:
    schema = onnx.defs.OpSchema(
        name,
        _DOMAIN,
        1,
        inputs=inputs,
        outputs=outputs,
        type_constraints=[(letter, allowed, "") for letter, allowed in types.items()],
        attributes=[onnx.defs.OpSchema.Attribute(key, kind, "") for key, kind in attributes.items()],
    )
    return Op(Opset(_DOMAIN, 1), name, schema)


_scan, _pixels = _scan_node(), _pixels_node()


def _selective_scan_2d(*arguments: Any) -> tuple[Any, Any, Any]:
    """`vmamba::selective_scan_2d` for PyTorch's exporter, with the arguments of its schema by position."""
    names = [argument.name for argument in torch.ops.vmamba.selective_scan_2d.default._schema.arguments]
    given = dict(zip(names, arguments, strict=False))
    routes = list(given["routes"])
    for code in routes:
        if code != GIVEN and code not in ALONG_LINES:
            raise ModelError(
                f"routes: {names_of([code])[0]!r} is a route of register_route, which ONNX does not know; "
                "give the operator its permutation, as SS2D does by itself"
            )
    operands = [given.get(name) for name in OPERANDS]
    y, last_state = _scan(*operands, **{_ROUTES: routes, _SOFTPLUS: int(given["delta_softplus"])})
    if given.get("out_dtype") is not None:
        y = opset18.Cast(y, to=given["out_dtype"])
    # The saved states are for backward alone: nothing reads them in an exported graph.
    return y, last_state, opset18.Constant(value_float=0.0)


def _preprocessed(images: Any, settings: Any) -> Any:
    """`vmamba_export::pixels` for PyTorch's exporter."""
    return _pixels(images, **{_SETTINGS: settings})


def _adaptive_avg_pool2d(x: Any, output_size: Any) -> Any:
    """Means over equal shares of an image of any size; PyTorch's exporter fixes the size of the example's."""
    height, width = (
        _means(opset18.Shape(x, start=axis, end=axis + 1), size)
        for axis, size in zip((2, 3), output_size, strict=True)
    )
    return opset18.MatMul(opset18.MatMul(height, x), opset18.Transpose(width, perm=[1, 0]))


def _means(side: Any, size: int) -> Any:
    """A matrix (size, side): row i is the mean of the positions ⌊i·side/size⌋ … ⌈(i + 1)·side/size⌉ - 1."""
    op = opset18

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    first = op.Div(op.Mul(ints(*range(size)), side), ints(size))
    end = op.Div(op.Add(op.Mul(ints(*range(1, size + 1)), side), ints(size - 1)), ints(size))
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    places = op.Unsqueeze(op.Range(zero, op.Squeeze(side), one), ints(0))
    first, end = op.Unsqueeze(first, ints(1)), op.Unsqueeze(end, ints(1))
    inside: Any = op.Cast(
        op.And(op.GreaterOrEqual(places, first), op.Less(places, end)), to=ir.DataType.FLOAT
    )
    return op.Div(inside, op.Cast(op.Sub(end, first), to=ir.DataType.FLOAT))


TRANSLATIONS: dict[Any, Any] = {
    torch.ops.vmamba.selective_scan_2d.default: _selective_scan_2d,
    torch.ops.vmamba_export.pixels.default: _preprocessed,
    torch.ops.aten.adaptive_avg_pool2d.default: _adaptive_avg_pool2d,
    torch.ops.aten._adaptive_avg_pool2d.default: _adaptive_avg_pool2d,
}
"""What `torch.onnx.export` needs for models with a scan."""


def lower(model: ir.Model, spelling: Spelling) -> None:
    """Write the nodes of `TRANSLATIONS` out in plain operations.

    They stand in the graph itself: OpenVINO does not take functions of a model.

    Args:
        model: It is changed.
        spelling: The runtime that shall be fast.
    """
    ours = [node for node in model.graph if node.domain == _DOMAIN]
    for number, node in enumerate(ours):
        if node.op_type == _PIXELS:
            nodes, *outputs = write_pixels(_present(node)[0], node.attributes[_SETTINGS].as_string())
        else:
            nodes, *outputs = write_scan(_form(node, spelling), _present(node), f"ss2d{number}")
        if node.op_type == _PIXELS:
            node.outputs[0].name = PIXELS  # the new value gets it; a check asks for it
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], nodes, node.outputs, outputs)
    model.graph.opset_imports.pop(_DOMAIN, None)


def _present(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs if value is not None]


def _form(node: ir.Node, spelling: Spelling) -> ScanForm:
    operands = [(name, v.dtype) for name, v in zip(OPERANDS, node.inputs, strict=False) if v is not None]
    x, A = _shape(node.inputs[0]), _shape(node.inputs[2])
    return ScanForm(
        routes=tuple(node.attributes[_ROUTES].as_ints()),
        n_state=int(A[2]),
        operands=tuple((name, dtype or ir.DataType.FLOAT) for name, dtype in operands),
        delta_softplus=bool(node.attributes[_SOFTPLUS].as_int()),
        one_row=x[1] == 1,
        channels=int(x[3]),
        spelling=spelling,
    )


def _shape(value: ir.Value | None) -> Any:
    assert value is not None
    assert value.shape is not None
    return value.shape
