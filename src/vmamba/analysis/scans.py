"""Record the selective scans that a model runs: the arguments and results of each.

b batch, h height, w width, d channels, k routes, n state size, r rank of delta.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vmamba.nn.modes import evaluating
from vmamba.ops.operands import Operands
from vmamba.ops.routes import names_of


@dataclass(frozen=True)
class Scan:
    """One call of `torch.ops.vmamba.selective_scan_2d`, its tensors detached, and the results.

    Attributes:
        call: The operands.
        out_dtype: Of y, as given; None is the state's type.
        backend: As given; None where the operator chose.
        y: (b, h, w, d).
        last_state: (b, k, d, n).
    """

    call: Operands
    out_dtype: torch.dtype | None
    backend: str | None
    y: Tensor = field(repr=False)
    last_state: Tensor = field(repr=False)

    @property
    def route_names(self) -> tuple[str, ...]:
        """The name of each route."""
        return names_of(self.call.routes)


_ARGUMENTS = (
    "x",
    "delta",
    "A",
    "B",
    "C",
    "D",
    "delta_bias",
    "delta_weight",
    "delta_softplus",
    "routes",
    "initial_state",
    "out_dtype",
    "backend",
    "orders",
)
"""The operator's arguments, in the order of its schema."""


@dataclass(frozen=True)
class ScanShape:
    """The sizes of a model's scan for one image, and how often it occurs in the model.

    Attributes:
        height: h.
        width: w.
        channels: d.
        n_state: n.
        rank: r; 0 where delta is given whole.
        routes: The name of each route.
        lines: How many images of this size the scan has for one image of the model: 1 for an SS2D. The
            cascade scans each line as an image of height 1.
        times: How many scans of one forward pass have this shape.
    """

    height: int
    width: int
    channels: int
    n_state: int
    rank: int
    routes: tuple[str, ...]
    lines: int = 1
    times: int = 1


class _OperatorCalls(TorchFunctionMode):
    """Hands every call of the operator to a function, with its outputs."""

    def __init__(self, notify: Callable[[dict[str, Any], tuple[Tensor, ...]], None]) -> None:
        super().__init__()
        self.notify = notify

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        operator = torch.ops.vmamba.selective_scan_2d
        if func is operator or func is operator.default:
            self.notify({**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}, outputs)
        return outputs


@contextmanager
def watching_scans(model: nn.Module, callback: Callable[[str, Scan], None]) -> Iterator[None]:
    """Call a function after every scan that the model runs inside the `with` block.

    The model may be any module, in any mode, with or without gradients; its parameters and modes stay as they
    are. So do its outputs, except that layers do not use their fused forms inside the block, which may round
    differently. A scan that runs outside of the model's modules is not reported, nor one that a compiled or
    scripted model runs without Python.

    Args:
        model: The model that runs the scans.
        callback: Called with the name of the innermost running module ("" for the model itself) and the scan.
            An exception that it raises ends the forward pass.
    """
    running: list[str] = []

    def report(arguments: dict[str, Any], outputs: tuple[Tensor, ...]) -> None:
        if not running:
            return
        values: dict[str, Any] = {
            name: t.detach() if isinstance(t, Tensor) else t for name, t in arguments.items()
        }
        out_dtype, backend = values.pop("out_dtype"), values.pop("backend")
        y, last_state, _ = (output.detach() for output in outputs)
        callback(running[-1], Scan(Operands(**values), out_dtype, backend, y, last_state))

    handles = []
    for name, module in model.named_modules():

        def enter(module: nn.Module, inputs: Any, name: str = name) -> None:
            running.append(name)

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            running.pop()

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        with _OperatorCalls(report):
            yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def record_scans(model: nn.Module, images: Tensor) -> dict[str, list[Scan]]:
    """The scans of one forward pass in evaluation mode, without gradients.

    Args:
        model: Any module that takes images.
        images: As the model takes them, on its device.

    Returns:
        The scans by the name of the module that runs them, in the order in which modules first ran: one for
        an SS2D, two (along rows, then along columns) for the cascade. Empty if the model has no scan.
    """
    scans: dict[str, list[Scan]] = {}
    with evaluating(model), watching_scans(model, lambda name, scan: scans.setdefault(name, []).append(scan)):
        model(images)
    return scans


def scan_shapes(model: nn.Module, input_size: tuple[int, ...]) -> list[ScanShape]:
    """The different shapes of a model's scans, in the order in which they run, from one forward pass.

    Args:
        model: On any device; on the meta device nothing is computed.
        input_size: (channels, height, width).
    """
    parameter = next(model.parameters())
    image = torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype)
    counts: Counter[ScanShape] = Counter()
    for scans in record_scans(model, image).values():
        for scan in scans:
            call = scan.call
            lines, height, width, channels = call.x.shape
            shape = ScanShape(height, width, channels, call.n_state, call.rank, scan.route_names, lines)
            counts[shape] += 1
    return [replace(shape, times=times) for shape, times in counts.items()]
