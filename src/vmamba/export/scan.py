"""The 2D selective scan in ONNX operations.

Sizes: b batch, h height, w width, d channels, k routes, n state size, r rank of delta; t steps along a line.

Form of the graph. A route along rows visits each row from end to end, then the next row. All rows take step t
at once: the operands are turned to (t, b, lines, ·), and one `Scan` over t serves both directions, since a
Scan may read one operand forwards and another backwards. Three Scans give every position its state:

1. `ends`: from zero at the start of each line, keep only the state at its end, (b, lines, d).
2. `carry`: from line to line, h ← exp(A Σδ) h + end: the state with which each line begins.
3. `outputs`: along the lines again, each from the state with which it begins; gives y = C h.

There is no division, no padding and no gather, so an image of any size is read in 3·(h + w) steps
(rows, then columns) instead of k·h·w. Routes along columns swap the axes. In an image of one row (sequences,
and each of the cascade's lines) only step 3 is left. A route given as a permutation is gathered, read as
one line of h·w steps, and scattered back.

A step costs OpenVINO more than the large operations around the Scans, so for it two Scans do, if n = 1:

1. `from_zero`: from zero at the start of each line, keep the state of every step, and the product of the
   decays up to it, from which a state at the line's start would be left.
2. `carry`, as above. Then y = C (state + product · begin).

With n = 1 the decays and drives of all positions are computed before the Scans, by large operations. With
n > 1 these would take n times the memory of x, so they are computed inside the Scans' bodies, step by step.
The state is (b, lines, d), or (b, lines, n, d): d last, so that broadcasting runs along contiguous memory.

Traps of runtimes:
- OpenVINO counts what a Scan's body takes from outside among its states; so A is handed in as a state.
- OpenVINO computes `Mul(a, h)` inside a Scan wrongly if h is the state; `Mul(h, a)` is right.
- ONNX Runtime turns operands of a Scan that does not run along their first axis; here only the small ones of
  `carry` are turned.
- ONNX Runtime wants the rank of every output of a Scan's body declared.
- OpenVINO reads along the second axis as fast as along the first, so columns are not turned; along the third
  it is slow.
- ONNX Runtime's `Softplus` takes three times as long as the logarithm written out; OpenVINO's is the faster.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import onnx_ir as ir

from vmamba.export.nodes import Nodes
from vmamba.ops.routes import CROSS, GIVEN, route_codes

OPERANDS = ("x", "delta", "A", "B", "C", "D", "delta_bias", "delta_weight", "initial_state", "orders")
"""The operands in the order of the operator's node; all after C may be absent."""

Spelling = Literal["onnxruntime", "openvino"]
"""The runtime for which operations are spelled; the other computes the same, only slower."""

_ROW, _COLUMN, _ROW_REVERSED, _COLUMN_REVERSED = route_codes(CROSS)
ALONG_LINES = {
    _ROW: (False, False),
    _COLUMN: (True, False),
    _ROW_REVERSED: (False, True),
    _COLUMN_REVERSED: (True, True),
}
"""Code of a route → (along columns, backwards)."""


@dataclass(frozen=True)
class ScanForm:
    """All that decides the nodes of a scan.

    Attributes:
        routes: k codes; `GIVEN` for a permutation. No other route can be written.
        n_state: n.
        operands: Those of `OPERANDS` that are there, and their types.
        delta_softplus: Whether delta passes through softplus.
        one_row: Whether images have one row.
        channels: d.
        spelling: For which runtime.
    """

    routes: tuple[int, ...]
    n_state: int
    operands: tuple[tuple[str, ir.DataType], ...]
    delta_softplus: bool
    one_row: bool
    channels: int
    spelling: Spelling = "onnxruntime"

    @property
    def state_dtype(self) -> ir.DataType:
        """The type of the state, as in PyTorch."""
        wide = dict(self.operands)["x"] == ir.DataType.DOUBLE
        return ir.DataType.DOUBLE if wide else ir.DataType.FLOAT


def write_scan(
    form: ScanForm, operands: Sequence[ir.Value], prefix: str
) -> tuple[Sequence[ir.Node], ir.Value, ir.Value]:
    """The nodes of one call of the operator, y (b, h, w, d) and the last state (b, k, d, n).

    Args:
        form: Of the call.
        operands: As in `form.operands`.
        prefix: Of names inside the Scans' bodies, different for each call in a graph.
    """
    writer = _Writer(form, operands, prefix)
    y, last_state = writer.write()
    return writer.op.tape.nodes, y, last_state


_GIVEN = {"ends": 0, "carry": 1, "outputs": 1, "from_zero": 2}
"""What a step of a Scan of this kind gives, of each route."""


@dataclass
class _Route:
    """A route's operands in the state's type, with the t steps along a line first, or second if `axis` is 1.

    Attributes:
        k: Its place.
        backwards: Whether it goes from the last step to the first.
        axis: Of the steps.
        delta: The step sizes, (t, b, lines, d).
        drive: delta · x, (t, b, lines, d).
        B: (t, b, lines, n).
        C: (t, b, lines, n).
        A: (1, d) for n = 1, else (n, d).
    """

    k: int
    backwards: bool
    axis: int
    delta: ir.Value
    drive: ir.Value
    B: ir.Value
    C: ir.Value
    A: ir.Value


class _Writer:
    """Writes the nodes of one scan."""

    def __init__(self, form: ScanForm, operands: Sequence[ir.Value], prefix: str) -> None:
        self.form = form
        self.prefix = prefix
        self.scans = 0
        self.op = Nodes()
        self.dtype = form.state_dtype
        self.operands = {
            name: value if name == "orders" or dtype == self.dtype else self.op.Cast(value, to=self.dtype)
            for (name, dtype), value in zip(form.operands, operands, strict=True)
        }

    def write(self) -> tuple[ir.Value, ir.Value]:
        last_states: dict[int, ir.Value] = {}
        sums = [self._along_axis(columns, last_states) for columns in (False, True)]
        sums += [
            self._along_order(k, last_states) for k, code in enumerate(self.form.routes) if code == GIVEN
        ]
        terms = [y for y in sums if y is not None]
        if "D" in self.operands:
            skip = self.op.ReduceSum(self.operands["D"], self.op.vector(0), keepdims=0)
            terms.append(self._times(self.operands["x"], skip))
        states = [self.op.unsqueeze(last_states[k], 1) for k in range(len(self.form.routes))]
        return self.op.sum(terms), self.op.Concat(*states, axis=1)

    # --- the routes ---------------------------------------------------------------------------------------

    def _along_axis(self, columns: bool, last_states: dict[int, ir.Value]) -> ir.Value | None:
        """The sum of the routes along rows, or along columns, (b, h, w, d); None without such routes."""
        routes = [
            (k, ALONG_LINES[code][1])
            for k, code in enumerate(self.form.routes)
            if code != GIVEN and ALONG_LINES[code][0] == columns
        ]
        if not routes:
            return None
        axis = 1 if columns and self.form.spelling == "openvino" else 0
        there, back = ([1, 0, 2, 3], [1, 0, 2, 3]) if columns else ([2, 0, 1, 3], [1, 2, 0, 3])

        def turned(operand: ir.Value) -> ir.Value:
            return operand if axis else self.op.Transpose(operand, perm=there)

        x = turned(self.operands["x"])
        prepared = [self._prepare(k, backwards, x, turned, axis) for k, backwards in routes]
        y = self.op.sum(self._scanned(prepared, last_states, one_line=self.form.one_row and not columns))
        return y if axis else self.op.Transpose(y, perm=back)

    def _along_order(self, k: int, last_states: dict[int, ir.Value]) -> ir.Value:
        """The route k, a permutation in `orders`, (b, h, w, d)."""
        place = sum(code == GIVEN for code in self.form.routes[:k])
        order = self.op.Gather(self.operands["orders"], self.op.number(place), axis=0)

        def visited(operand: ir.Value) -> ir.Value:
            """(b, h, w, ·) → (l, b, 1, ·)."""
            shape = self.op.Shape(operand)
            batch, channels = self._part(shape, 0, 1), self._part(shape, 3, 4)
            flat = self.op.Reshape(operand, self.op.Concat(batch, self.op.vector(-1), channels, axis=0))
            return self.op.unsqueeze(
                self.op.Transpose(self.op.Gather(flat, order, axis=1), perm=[1, 0, 2]), 2
            )

        x = self.operands["x"]
        (y,) = self._scanned([self._prepare(k, False, visited(x), visited, 0)], last_states, one_line=True)
        y = self.op.squeeze(y, 2)
        image = self.op.ScatterND(
            self.op.full(self.op.Shape(y), 0, self.dtype), self.op.unsqueeze(order, 1), y
        )
        return self.op.Reshape(self.op.Transpose(image, perm=[1, 0, 2]), self.op.Shape(x))

    def _prepare(self, k: int, backwards: bool, x: ir.Value, turned: Any, axis: int) -> _Route:
        z = turned(self._of_route("delta", k, axis=3))
        if "delta_weight" in self.operands:
            weight = self._of_route("delta_weight", k, axis=0)
            z = self.op.MatMul(z, self.op.Transpose(weight, perm=[1, 0]))
        if "delta_bias" in self.operands:
            z = self.op.Add(z, self._of_route("delta_bias", k, axis=0))
        delta = self._softplus(z) if self.form.delta_softplus else z
        B, C = (turned(self._of_route(name, k, axis=3)) for name in ("B", "C"))
        A = self.op.Transpose(self._of_route("A", k, axis=0), perm=[1, 0])
        return _Route(k, backwards, axis, delta, self._times(x, delta), B, C, A)

    def _scanned(
        self, routes: Sequence[_Route], last_states: dict[int, ir.Value], one_line: bool
    ) -> list[ir.Value]:
        """y of each route, laid out as its operands; its state after the last step goes to `last_states`."""
        forwards = [not route.backwards for route in routes]
        steps = [self._steps(route) for route in routes]
        shape = self.op.Shape(self.op.Gather(routes[0].drive, self.op.number(0), axis=routes[0].axis))
        starts = [self._initial_state(route.k, shape) for route in routes]  # (b, [n,] d)
        if one_line:
            begins = [self.op.unsqueeze(start, 1) for start in starts]
            ends, ys = self._scan("outputs", begins, steps, routes, forwards)
            finals = [self.op.squeeze(end, 1) for end in ends]
        elif self.form.n_state == 1 and self.form.spelling == "openvino":
            finals, ys = self._by_two_scans(routes, shape, starts, steps, forwards)
        else:
            finals, ys = self._by_three_scans(routes, shape, starts, steps, forwards)
        for route, final in zip(routes, finals, strict=True):
            last_states[route.k] = (
                self.op.unsqueeze(final, 2)
                if self.form.n_state == 1
                else self.op.Transpose(final, perm=[0, 2, 1])
            )
        return ys

    def _by_three_scans(
        self,
        routes: Sequence[_Route],
        shape: ir.Value,
        starts: Sequence[ir.Value],
        steps: Sequence[Sequence[ir.Value]],
        forwards: Sequence[bool],
    ) -> tuple[list[ir.Value], list[ir.Value]]:
        """The last states, and y; `shape` is that of the state of all lines."""
        zeros = [self.op.full(self._state_shape(shape), 0, self.dtype) for _ in routes]
        ends, _ = self._scan("ends", zeros, [step[:-1] for step in steps], routes, forwards)
        pairs = [[self._decay_of_line(route), end] for route, end in zip(routes, ends, strict=True)]
        finals, begins = self._scan("carry", starts, pairs, routes, forwards)
        _, ys = self._scan("outputs", begins, steps, routes, forwards)
        return finals, ys

    def _by_two_scans(
        self,
        routes: Sequence[_Route],
        shape: ir.Value,
        starts: Sequence[ir.Value],
        steps: Sequence[Sequence[ir.Value]],
        forwards: Sequence[bool],
    ) -> tuple[list[ir.Value], list[ir.Value]]:
        """As `_by_three_scans`, for n = 1."""
        before = [self.op.full(shape, value, self.dtype) for _ in routes for value in (0, 1)]
        after, kept = self._scan("from_zero", before, [step[:-1] for step in steps], routes, forwards)
        pairs = [[product, end] for end, product in zip(after[::2], after[1::2], strict=True)]
        finals, begins = self._scan("carry", starts, pairs, routes, forwards)
        ys = []
        for route, begin, state, product in zip(routes, begins, kept[::2], kept[1::2], strict=True):
            left = self.op.Mul(product, self.op.unsqueeze(begin, route.axis))
            ys.append(self.op.Mul(self.op.Add(state, left), route.C))
        return finals, ys

    # --- the Scans ----------------------------------------------------------------------------------------

    def _steps(self, route: _Route) -> list[ir.Value]:
        """What the Scans along the lines read of a route: if n = 1 decay, drive · B and C, else operands."""
        if self.form.n_state == 1:
            decay = self.op.Exp(self.op.Mul(route.delta, route.A))
            return [decay, self.op.Mul(route.drive, route.B), route.C]
        return [route.delta, route.drive, route.B, route.C]

    def _decay_of_line(self, route: _Route) -> ir.Value:
        """The product of a line's decays, (b, lines, [n,] d)."""
        total = self.op.ReduceSum(route.delta, self.op.vector(route.axis), keepdims=0)
        if self.form.n_state > 1:
            total = self.op.unsqueeze(total, 2)
        return self.op.Exp(self.op.Mul(total, route.A))

    def _scan(
        self,
        kind: str,
        states: Sequence[ir.Value],
        reads: Sequence[Sequence[ir.Value]],
        routes: Sequence[_Route],
        forwards: Sequence[bool],
    ) -> tuple[list[ir.Value], list[ir.Value]]:
        """A Scan of several routes at once.

        Args:
            kind: "ends", "carry", "outputs" or "from_zero".
            states: The first state of each route; for "from_zero" also the first product of decays.
            reads: What a step reads, of each route, along its axis; a step of "carry" along the second.
            routes: The routes.
            forwards: Whether each reads from the first step on.

        Returns:
            The last states, and what the steps gave, in the order of the axis: nothing for "ends", for
            "from_zero" state and product.
        """
        self.scans += 1
        body = self._body(kind, routes, len(reads[0]))
        number = len(states)
        if self._decays_inside(kind):
            states = [*states, *(route.A for route in routes)]
        backwards = [int(not each) for each in forwards]
        given = [each for each in backwards for _ in range(_GIVEN[kind])]
        ports = [read for of_route in reads for read in of_route]
        axis = 1 if kind == "carry" else routes[0].axis
        outputs = self.op.of_many(
            "Scan",
            *states,
            *ports,
            outputs=len(states) + len(given),
            body=body,
            num_scan_inputs=len(ports),
            scan_input_axes=[axis] * len(ports),
            scan_input_directions=[each for each in backwards for _ in reads[0]],
            scan_output_axes=[axis] * len(given) or None,
            scan_output_directions=given or None,
        )
        return list(outputs[:number]), list(outputs[len(states) :])

    def _decays_inside(self, kind: str) -> bool:
        """Whether a Scan's body computes the decays; then it carries A along as a state."""
        return self.form.n_state > 1 and kind != "carry"

    def _body(self, kind: str, routes: Sequence[_Route], n_reads: int) -> ir.Graph:
        """The step of a Scan. Its names are unique in the graph, as ONNX asks for."""
        op, prefix = Nodes(), f"{self.prefix}_scan{self.scans}_"
        rank = (2 if kind == "carry" else 3) + (self.form.n_state > 1)
        inputs, reads, new_states, given = [], [], [], []
        A = {route.k: self._declared(f"{prefix}A{route.k}", 2) for route in routes}
        for route in routes:
            state = self._declared(f"{prefix}h{route.k}", rank)
            step = [
                ir.Value(name=f"{prefix}step{route.k}_{i}", type=ir.TensorType(self.dtype))
                for i in range(n_reads)
            ]
            inputs.append(state)
            reads += step
            if self._decays_inside(kind):
                delta, source, B = step[:3]
                decay = op.Exp(op.Mul(op.unsqueeze(delta, 2), A[route.k]))
                drive = op.Mul(op.unsqueeze(source, 2), op.unsqueeze(B, 3))
            else:
                decay, drive = step[:2]
            new = op.Add(op.Mul(state, decay), drive)  # the state first: OpenVINO is wrong otherwise
            new_states.append(new)
            if kind == "from_zero":
                inputs.append(self._declared(f"{prefix}p{route.k}", rank))
                product = op.Mul(inputs[-1], decay)
                new_states.append(product)
                given += [op.Identity(new), op.Identity(product)]
            elif kind == "carry":
                given.append(op.Identity(state))
            elif kind == "outputs" and self.form.n_state == 1:
                given.append(op.Mul(new, step[-1]))
            elif kind == "outputs":
                weighted = op.Mul(new, op.unsqueeze(step[-1], 3))
                given.append(op.ReduceSum(weighted, op.vector(2), keepdims=0))
        if self._decays_inside(kind):
            inputs += A.values()
            unchanged = [op.Identity(value) for value in A.values()]
        else:
            unchanged = []
        for i, node in enumerate(op.tape.nodes):
            for output in node.outputs:
                output.name = f"{prefix}v{i}"
        for value in new_states:
            self._declare(value, rank)
        for value in unchanged:
            self._declare(value, 2)
        for value in given:
            self._declare(value, rank if kind == "carry" else 3)
        return ir.Graph(
            [*inputs, *reads], [*new_states, *unchanged, *given], nodes=op.tape.nodes, name=f"{prefix}{kind}"
        )

    def _declared(self, name: str, rank: int) -> ir.Value:
        value = ir.Value(name=name)
        self._declare(value, rank)
        return value

    def _declare(self, value: ir.Value, rank: int) -> None:
        """Give a state or an output its rank, type and channels."""
        value.type = ir.TensorType(self.dtype)
        value.shape = ir.Shape([*[None] * (rank - 1), self.form.channels])

    # --- the state ----------------------------------------------------------------------------------------

    def _state_shape(self, shape: ir.Value) -> ir.Value:
        """(b, lines, d) → the shape of the state of all lines."""
        if self.form.n_state == 1:
            return shape
        return self.op.Concat(
            self._part(shape, 0, 2), self.op.vector(self.form.n_state), self._part(shape, 2, 3), axis=0
        )

    def _initial_state(self, k: int, shape: ir.Value) -> ir.Value:
        """The state before the first position, (b, [n,] d); `shape` holds b, lines and d."""
        n = self.form.n_state
        if "initial_state" in self.operands:
            state = self.op.Gather(self.operands["initial_state"], self.op.number(k), axis=1)  # (b, d, n)
            return self.op.squeeze(state, 2) if n == 1 else self.op.Transpose(state, perm=[0, 2, 1])
        inner = [] if n == 1 else [self.op.vector(n)]
        return self.op.full(
            self.op.Concat(self._part(shape, 0, 1), *inner, self._part(shape, 2, 3), axis=0), 0, self.dtype
        )

    # --- small pieces -------------------------------------------------------------------------------------

    def _softplus(self, z: ir.Value) -> ir.Value:
        """log(1 + e^z), exact to rounding."""
        op = self.op
        if self.form.spelling == "openvino":
            return op.Softplus(z)
        # max(z, 0) + log1p(u), u = e^-|z|; log1p(u) = log(v) + (u - (v - 1)) / v with v = 1 + u rounded.
        one = op.constant(1.0, self.dtype)
        u = op.Exp(op.Neg(op.Abs(z)))
        v = op.Add(u, one)
        rest = op.Div(op.Sub(u, op.Sub(v, one)), v)
        return op.Add(op.Relu(z), op.Add(op.Log(v), rest))

    def _times(self, x: ir.Value, factor: ir.Value) -> ir.Value:
        """x · factor, which is (d) or of x's shape."""
        op = self.op
        if self.form.spelling != "openvino":
            return op.Mul(x, factor)
        # As matrices: for rank 4 OpenVINO takes over x's layout, in which the innermost axis is not d.
        rows = op.vector(-1, self.form.channels)
        return op.Reshape(op.Mul(op.Reshape(x, rows), op.Reshape(factor, rows)), op.Shape(x))

    def _of_route(self, name: str, k: int, axis: int) -> ir.Value:
        return self.op.Gather(self.operands[name], self.op.number(k), axis=axis)

    def _part(self, shape: ir.Value, start: int, stop: int) -> ir.Value:
        return self.op.Slice(shape, self.op.vector(start), self.op.vector(stop))
