"""Bytes that the Triton backend's kernels load and store, counted while the interpreter runs them.

    TRITON_INTERPRET=1 python benchmarks/triton_traffic.py [--model NAME] [--batch 128] [--out FILE]

For each scan of a model it runs forward and backward on one image, and multiplies by the batch: the kernels
treat every image alike. Masked lanes do not count; an address that several lanes read at once counts
once. Two counts of loads:

- issued: every load, even if the program has loaded the same address before;
- fetched: repeated loads of an address by a program count once, unless the program stored there. This is the
  traffic beyond the L1 cache if a program hits the cache for addresses it has loaded, and for no others.

What PyTorch does around the kernels (sums over partial gradients, copies) is counted of the whole batch. The
floor is every input read once and every output written once. The authors' chain is by formula: cross-scan,
delta's projection, scan and cross-merge, each reading and writing whole tensors of device memory.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vmamba.models  # noqa: F401  (registers them)
from vmamba.analysis.scans import ScanShape
from vmamba.bench.operator import operands, shapes
from vmamba.environment import environment
from vmamba.ops import ROUTES
from vmamba.ops.operands import Operands
from vmamba.ops.triton import backend as triton

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from interpreter import speed_up

Bytes = dict[str, np.ndarray]
"""By kernel: loaded (issued), loaded (fetched), stored."""


class _Counter(TorchDispatchMode):
    """Counts what runs under it, by kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Bytes = defaultdict(lambda: np.zeros(3, np.int64))
        self.kernel = ""
        self.loaded: list[np.ndarray] = []
        self.stored: list[np.ndarray] = []
        self.size = 0

    def load(self, addresses: np.ndarray, size: int) -> None:
        self.counts[self.kernel][0] += addresses.size * size
        self.loaded.append(addresses.ravel() << 4 | size)

    def store(self, addresses: np.ndarray, size: int) -> None:
        self.counts[self.kernel][2] += addresses.size * size
        self.stored.append(addresses.ravel() << 4 | size)

    def end_of_program(self) -> None:
        """What was loaded, each address once, but each time where the program stored too."""
        if self.loaded:
            loaded = np.concatenate(self.loaded)
            stored_too = (
                np.isin(loaded, np.concatenate(self.stored)) if self.stored else np.zeros(loaded.shape, bool)
            )
            fetched = np.concatenate((loaded[stored_too], np.unique(loaded[~stored_too])))
            self.counts[self.kernel][1] += int((fetched & 15).sum())
        self.loaded, self.stored = [], []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.kernel and not func.is_view and "empty" not in str(func):
            entry = self.counts[f"torch {func.__name__.split('.')[0].strip('_')}"]
            read = sum(t.numel() * t.element_size() for t in tree_leaves(args) if isinstance(t, Tensor))
            entry += [read, read, result.numel() * result.element_size()]
        return result


@contextmanager
def counting() -> Iterator[Bytes]:
    """Count what the backend loads and stores."""
    from triton.runtime import interpreter

    counter = _Counter()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    originals = (
        builder.create_masked_load,
        builder.create_masked_store,
        builder.set_grid_idx,
        executor.__call__,
    )

    def touched(pointers: Any, mask: Any) -> tuple[np.ndarray, int]:
        on = np.broadcast_to(mask.data, pointers.data.shape)
        return pointers.data[on].astype(np.int64), pointers.get_element_ty().primitive_bitwidth // 8

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        counter.load(*touched(pointers, mask))
        return originals[0](self, pointers, mask, *rest)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        counter.store(*touched(pointers, mask))
        return originals[1](self, pointers, value, mask, *rest)

    def set_grid_idx(self: Any, *index: int) -> None:
        counter.end_of_program()
        originals[2](self, *index)

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        if args[0].is_meta:
            return
        counter.kernel = self.fn.__name__
        originals[3](self, *args, **kwargs)
        counter.end_of_program()
        counter.kernel = ""

    builder.create_masked_load, builder.create_masked_store = load, store
    builder.set_grid_idx, executor.__call__ = set_grid_idx, call
    try:
        with counter:
            yield counter.counts
    finally:
        builder.create_masked_load, builder.create_masked_store, builder.set_grid_idx, executor.__call__ = (
            originals
        )


def counted(
    shape: ScanShape, images: int, batch: int, half: torch.dtype | None, device: str
) -> tuple[Bytes, Bytes]:
    """Forward and backward on some images, in a batch's programs; on "meta" PyTorch's part alone."""
    call = operands(shape, images, device)
    if half is not None:
        call |= {name: call[name].to(half) for name in ("x", "delta", "B", "C")}
    tensors = [call[name] for name in ("x", "delta", "A", "B", "C", "D", "delta_bias", "delta_weight")]
    arguments = Operands(*tensors, True, [ROUTES.index(route) for route in shape.routes])
    programs = triton.PROGRAMS
    triton.PROGRAMS = programs * images / batch
    try:
        with counting() as forward:
            y, _, states = triton.forward(arguments)
        grad_y = torch.ones_like(y)
        with counting() as backward:
            triton.backward(grad_y, None, arguments, states)
    finally:
        triton.PROGRAMS = programs
    return forward, backward


def floors(shape: ScanShape, batch: int, half: torch.dtype | None) -> tuple[int, int]:
    """Bytes of inputs and outputs, forward and backward."""
    size = 4 if half is None else 2
    routes, values = len(shape.routes), batch * shape.height * shape.width * shape.channels
    rows = batch * shape.height * shape.width * routes * (shape.rank + 2 * shape.n_state) * size
    parameters = routes * shape.channels * (shape.rank + shape.n_state + 2) * 4
    return values * (size + 4) + rows + parameters, values * (size + 4 + size) + 2 * rows + 2 * parameters


def authors(shape: ScanShape, batch: int, half: torch.dtype | None) -> tuple[int, int]:
    """Bytes of the authors' chain, its four sequences float32 (half: of that type but for y)."""
    size = 4 if half is None else 2
    values, routes = batch * shape.height * shape.width * shape.channels, len(shape.routes)
    rows = batch * shape.height * shape.width * routes * (shape.rank + 2 * shape.n_state) * size
    cross_scan = (1 + routes) * values * size
    projection = routes * values * size + rows
    scan = routes * values * (2 * size + 4) + rows
    cross_merge = (routes + 1) * values * 4
    # Backward: merge's is a cross-scan; the scan reads u, delta, dy and writes du, ddelta; the projection's
    # two products read ddelta each; the cross-scan's is a merge.
    merge_backward = (1 + routes) * values * 4
    scan_backward = routes * values * (2 * size + 4 + 2 * size) + 2 * rows
    projection_backward = 2 * (routes * values * size + rows)
    cross_scan_backward = (routes + 1) * values * size
    backward = merge_backward + scan_backward + projection_backward + cross_scan_backward
    return cross_scan + projection + scan + cross_merge, backward


def row(shape: ScanShape, batch: int, half: torch.dtype | None) -> list[dict[str, Any]]:
    """What was counted of one shape, as JSON holds it."""
    one, batched = counted(shape, 1, batch, half, "cpu"), counted(shape, batch, batch, half, "meta")
    directions = []
    for i, direction in enumerate(("forward", "backward")):
        kernels = batched[i] | {name: k * batch for name, k in one[i].items() if name.endswith("_kernel")}
        issued = int(sum(k[0] + k[2] for k in kernels.values()))
        fetched = int(sum(k[1] + k[2] for k in kernels.values()))
        floor, chain = floors(shape, batch, half)[i], authors(shape, batch, half)[i]
        directions.append(
            {
                "height": shape.height,
                "width": shape.width,
                "channels": shape.channels,
                "rank": shape.rank,
                "n_state": shape.n_state,
                "batch": batch,
                "direction": direction,
                "floor": floor,
                "authors": chain,
                "issued": issued,
                "fetched": fetched,
                "kernels": {
                    name: dict(zip(("issued", "fetched", "stored"), map(int, k), strict=True))
                    for name, k in kernels.items()
                },
            }
        )
    return directions


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="vmamba_tiny")
    parser.add_argument("--input", type=int, default=224)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument(
        "--half", action="store_true", help="x, delta, B and C in bfloat16, as under autocast"
    )
    parser.add_argument("--stage", type=int, nargs="*", help="only these shapes, from 0")
    parser.add_argument("--kernels", action="store_true", help="print each kernel too")
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args()
    if not triton.interpreted():
        parser.error("set TRITON_INTERPRET=1 in the environment")
    speed_up()
    half = torch.bfloat16 if options.half else None
    rows = []
    print("MB; the ratios are to the floor")
    for i, shape in enumerate(shapes(options.model, options.input)):
        if options.stage and i not in options.stage:
            continue
        for counts in row(shape, options.batch, half):
            rows.append(counts)
            mb = {key: counts[key] / 1e6 for key in ("floor", "fetched", "issued", "authors")}
            print(
                f"{shape.height}x{shape.width}x{shape.channels} R {shape.rank} {counts['direction']:8}"
                f" floor {mb['floor']:7.0f}"
                f"  fetched {mb['fetched']:7.0f} ({mb['fetched'] / mb['floor']:.2f} x)"
                f"  issued {mb['issued']:7.0f} ({mb['issued'] / mb['floor']:.2f} x)"
                f"  authors {mb['authors']:7.0f} ({mb['authors'] / mb['floor']:.2f} x)",
                flush=True,
            )
            if options.kernels:
                for name, k in counts["kernels"].items():
                    per = counts["floor"]
                    print(
                        f"    {name:24} issued {k['issued'] / per:5.2f}  fetched {k['fetched'] / per:5.2f}"
                        f"  stored {k['stored'] / per:5.2f} x"
                    )
    if options.out is not None:
        options.out.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
