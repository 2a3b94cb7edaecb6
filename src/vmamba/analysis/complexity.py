"""Parameters, multiply-adds, activations and memory by module, of any timm model.

One multiply-add of a convolution or matrix product counts 1, layer norm 5 for each value, average pooling 1,
and a selective scan as `vmamba.ops.flops.scan_macs` says: the counting of the paper's tables, and fvcore's. A
Fourier transform, which fvcore does not count, counts 2.5·m·log₂ m for m real values, 5·m·log₂ m for complex.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import log2, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from vmamba._torch_private import DispatchMode
from vmamba.errors import ModelError
from vmamba.nn.modes import evaluating
from vmamba.ops.flops import COUNTINGS, scan_macs


@dataclass(frozen=True)
class Complexity:
    """Counts of one forward pass of one image.

    Attributes:
        parameters: Parameters of the model.
        macs: Multiply-adds, with 9·l·d·n for each route of a scan, as in the authors' tables.
        macs_for_loop: The same with 3.5·l·d·n for each route of a scan.
        macs_torch: Half the operations that `torch.utils.flop_counter` counts: without norms and pooling, and
            a scan as a for-loop.
        activations: Values that convolutions and matrix products give, as fvcore counts them.
        peak_memory: Most bytes of the image and intermediate results at once, beside the weights, in
            inference without fused kernels.
    """

    parameters: int
    macs: float
    macs_for_loop: float
    macs_torch: float
    activations: int
    peak_memory: int


@dataclass(frozen=True)
class ModuleComplexity:
    """The counts of a module, with all that is inside it.

    Attributes:
        name: In the module around it; "" for the model.
        kind: The name of its class.
        counts: Of all its calls. The peak is that of the whole model's memory while the module runs.
        children: The modules in it.
    """

    name: str
    kind: str
    counts: Complexity
    children: tuple["ModuleComplexity", ...]


def parse_size(text: str, name: str = "input size", examples: str = "384 or 512x2048") -> tuple[int, int]:
    """Read (height, width) from "384" or "512x2048" (height x width).

    Args:
        text: What the user gave.
        name: What the size is of, for the error.
        examples: For the error.

    Raises:
        ModelError: The text has neither form.
    """
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise ModelError(f"{name} {text!r}: expected {examples} (height x width)")
    return int(sides[0]), int(sides[-1])


def count(model: nn.Module, input_size: tuple[int, ...]) -> Complexity:
    """Count one forward pass of a batch of one, on the meta device: nothing is computed.

    Args:
        model: On any device.
        input_size: (channels, height, width).

    Raises:
        ModelError: The model does not take that size.
    """
    return count_modules(model, input_size).counts


def count_modules(model: nn.Module, input_size: tuple[int, ...]) -> ModuleComplexity:
    """As `count`, for every module of the model.

    Args:
        model: On any device.
        input_size: (channels, height, width).

    Raises:
        ModelError: The model does not take that size.
    """
    weights = _meta_weights(model)
    meter = _Meter(weights.values())
    with meter.watching(model):
        _evaluate(model, partial(functional_call, model, weights), input_size)
    return _tree("", model, meter)


def gradient_memory(model: nn.Module, input_size: tuple[int, ...]) -> int:
    """Most bytes of the image and intermediate results at once, until the gradient by the image is there.

    As `Complexity.peak_memory` it is beside the weights, for one image, without fused kernels.

    Args:
        model: On any device.
        input_size: (channels, height, width).

    Raises:
        ModelError: The model does not take that size.
    """
    weights = _meta_weights(model)
    for name, parameter in model.named_parameters():  # what their gradients would need is kept, too
        weights[name].requires_grad_(parameter.requires_grad)
    results = _Results(weights.values())

    def differentiate(image: Tensor) -> None:
        with torch.enable_grad():
            output = functional_call(model, weights, image.requires_grad_())
            torch.autograd.grad(output.sum(), image)

    with results:
        _evaluate(model, differentiate, input_size)
    return results.peak


def _meta_weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers on the meta device, without gradients."""
    return {name: t.detach().to("meta") for name, t in [*model.named_parameters(), *model.named_buffers()]}


def _tree(name: str, module: nn.Module, meter: "_Meter") -> ModuleComplexity:
    """The counts of a module that ran; of one that did not, as of a list, those of its children."""
    children = tuple(_tree(child_name, child, meter) for child_name, child in module.named_children())
    sums, peak = meter.sums.get(module), meter.peaks.get(module)
    if sums is None or peak is None:
        each = [child.counts for child in children]
        sums = _Sums(
            sum(counts.macs for counts in each),
            sum(counts.macs - counts.macs_for_loop for counts in each),
            sum(counts.macs_torch for counts in each),
            sum(counts.activations for counts in each),
        )
        peak = max((counts.peak_memory for counts in each), default=0)
    macs, excess, macs_torch, activations = sums
    parameters = sum(p.numel() for p in module.parameters())
    counts = Complexity(parameters, macs, macs - excess, macs_torch, activations, peak)
    return ModuleComplexity(name, type(module).__name__, counts, children)


class _Sums(NamedTuple):
    """What adds up over a forward pass; `excess` is MACs by the paper's minus by the for-loop counting."""

    macs: float
    excess: float
    macs_torch: float
    activations: int


class _Meter:
    """Counts the operations and the memory of a forward pass, of every module.

    Args:
        weights: Of the model, whose memory does not count.

    Attributes:
        sums: Of every module that ran, over its calls.
        peaks: Most bytes of the model's intermediate results while the module ran.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self.sums: dict[nn.Module, _Sums] = {}
        self.peaks: dict[nn.Module, int] = {}
        self._excess = 0.0
        formulas = {**_FORMULAS, torch.ops.vmamba.selective_scan_2d: self._scan}
        self._paper = FlopCounterMode(display=False, custom_mapping=formulas)
        self._torch = FlopCounterMode(display=False)
        self._results = _Results(weights)
        self._running: list[tuple[_Sums, int]] = []  # of each running module: sums and peak before it

    def _scan(self, *shapes: Any, **_: Any) -> int:
        x, _delta, A, _B, _C, D, _bias, weight, *_rest = shapes
        rank = None if weight is None else weight[2]
        paper, for_loop = (
            scan_macs(tuple(x), A[0], A[2], rank=rank, skip=D is not None, counting=counting)
            for counting in COUNTINGS
        )
        self._excess += paper - for_loop
        return int(2 * paper)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Count all that runs in the `with` block, by the modules of the model."""
        with ExitStack() as stack:
            for module in model.modules():
                stack.callback(module.register_forward_pre_hook(self._enter).remove)
                stack.callback(module.register_forward_hook(self._leave, always_call=True).remove)
            for mode in (self._paper, self._torch, self._results):
                stack.enter_context(mode)
            yield

    def _now(self) -> _Sums:
        macs, macs_torch = (mode.get_total_flops() / 2 for mode in (self._paper, self._torch))
        return _Sums(macs, self._excess, macs_torch, self._results.activations)

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        self._running.append((self._now(), self._results.peak))
        self._results.peak = self._results.live

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        before, peak = self._running.pop()
        earlier = self.sums.get(module, _Sums(0, 0, 0, 0))
        self.sums[module] = _Sums._make(
            total + now - then for total, now, then in zip(earlier, self._now(), before, strict=True)
        )
        self.peaks[module] = max(self.peaks.get(module, 0), self._results.peak)
        self._results.peak = max(peak, self._results.peak)


class _Results(DispatchMode):
    """Follows the memory of what operators give, and counts the values of products and convolutions.

    Args:
        weights: Whose memory does not count.

    Attributes:
        activations: Values of products and convolutions so far.
        live: Bytes in use.
        peak: Most bytes in use; may be set back to `live`.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.activations = self.live = self.peak = 0
        self._followed = {id(t.untyped_storage()) for t in weights}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [
            t for t in (result if isinstance(result, tuple | list) else [result]) if isinstance(t, Tensor)
        ]
        if func.overloadpacket in _PRODUCTS:
            self.activations += tensors[0].numel()
        for tensor in tensors:
            self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: Any) -> None:
        """Count a tensor's memory until it is freed; views and results in place have one that is known."""
        if id(storage) not in self._followed:
            self._followed.add(id(storage))
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, id(storage), storage.nbytes()).atexit = False

    def _free(self, identity: int, size: int) -> None:
        self._followed.discard(identity)
        self.live -= size


def feature_shapes(model: Any, input_size: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The shapes (c, h, w) of a timm model's feature maps, by the name of the module that computes them.

    Args:
        model: From `create_on_meta`.
        input_size: (channels, height, width).

    Raises:
        ModelError: The model does not take that size.
    """
    maps = _evaluate(model, partial(model.forward_intermediates, intermediates_only=True), input_size)
    names = [info["module"] for info in model.feature_info]
    return {name: tuple(feature.shape[1:]) for name, feature in zip(names, maps, strict=True)}


def _evaluate(model: nn.Module, call: Callable[[Tensor], Any], input_size: tuple[int, ...]) -> Any:
    """The result of a call with one image on the meta device, with the model in evaluation mode."""
    try:
        image = torch.empty(1, *input_size, device="meta", dtype=next(model.parameters()).dtype)
        with evaluating(model), torch.no_grad():
            return call(image)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ModelError(f"the model does not take an input of {tuple(input_size)}: {error}") from error


def _per_value(macs: int, shape: Any, *_: Any, **__: Any) -> int:
    return 2 * macs * prod(shape)


def _fft(operations: float, shape: Any, dims: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    """Twice `operations`·m·log₂ m for each transform over m points."""
    sizes = max(shape, out_shape, key=prod)  # of a real transform one side has half the values
    points = prod(sizes[dim] for dim in dims)
    return int(2 * operations * prod(sizes) * log2(max(points, 1)))


_FORMULAS: dict[Any, Any] = {
    torch.ops.aten._fft_c2c: partial(_fft, 5),
    torch.ops.aten._fft_r2c: partial(_fft, 2.5),
    torch.ops.aten._fft_c2r: partial(_fft, 2.5),
    torch.ops.aten.native_layer_norm: partial(_per_value, 5),
    torch.ops.aten.mean: partial(_per_value, 1),
    torch.ops.aten._adaptive_avg_pool2d: partial(_per_value, 1),
    torch.ops.aten.avg_pool2d: partial(_per_value, 1),
}

_PRODUCTS = {
    torch.ops.aten.convolution,
    torch.ops.aten.mm,
    torch.ops.aten.addmm,
    torch.ops.aten.bmm,
    torch.ops.aten.baddbmm,
}
