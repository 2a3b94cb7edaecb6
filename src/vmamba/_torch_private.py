"""Every private interface of PyTorch that the library uses, and why no public one serves.

`tests/test_private.py` fails when one of them changes.
"""

import platform
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor as _FunctionalTensor
from torch.autograd import forward_ad
from torch.nn.modules import module as _module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data._utils import signal_handling

# --- vmamba.ops: the operator's own autograd kernel -------------------------------------------------------
# The public way would be `torch.library.register_autograd`. Its kernel silently drops the tangents of
# forward-mode derivatives and fails under torch.func, and one cannot check for either first.


_BelowAutograd = torch._C._AutoDispatchBelowAutograd
_KEYS_AFTER_AUTOGRAD = torch._C._after_autograd_keyset


def call_below_autograd(op: Any, keys: Any, arguments: tuple[Any, ...]) -> Any:
    """Call an operator's kernel below autograd, from within its autograd kernel.

    Args:
        op: The overload, `torch.ops.<library>.<name>.default`.
        keys: The dispatch keys that the autograd kernel got (`with_keyset=True`).
        arguments: The operator's arguments.
    """
    with _BelowAutograd():
        return op.redispatch(keys & _KEYS_AFTER_AUTOGRAD, *arguments)


def is_exporting() -> bool:
    """Whether torch.export is at work. In PyTorch 2.7 the public function says so in torch.compile too.

    In 2.7 nothing says so of an export with strict=True; there it is as in torch.compile.
    """
    return torch.compiler._is_exporting_flag


def is_transformed(arguments: tuple[Any, ...]) -> bool:
    """Whether an operator's autograd kernel runs for torch.func, or for a tensor with a tangent.

    Of torch.func's transforms only `grad`, `vjp`, `jvp` and those built on them reach an autograd kernel;
    `vmap` has a separate rule. PyTorch has no public function for either question.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    if forward_ad._current_level < 0:  # unpack_dual would say the same, but slowly, for each tensor
        return False
    tensors = (t for t in arguments if isinstance(t, Tensor))
    return any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


# --- vmamba.ops: what torch.compile traces ------------------------------------------------------------------
# While it makes a graph its tensors are of this class; `torch.compiler.is_compiling()` is not always true.

FunctionalTensor = _FunctionalTensor

# --- vmamba.ops.verdicts: what a verdict on a GPU depends on ------------------------------------------------
# The driver's version is public for XPU alone; `torch.version.cuda` is what PyTorch was built with.


def cuda_driver_version() -> int:
    """The newest CUDA that the driver knows, such as 13000; 0 where PyTorch cannot tell."""
    version = getattr(torch._C, "_cuda_getDriverVersion", None)
    return 0 if version is None else int(version())


# --- vmamba.data.loading: the workers of a DataLoader ------------------------------------------------------
# Its public interface gives no access to its workers and cannot end one that hangs: it waits for a batch
# forever, or raises after a timeout and leaves the process running.

LOADER_TIMED_OUT = "DataLoader timed out"
"""Start of the message of a loader's timeout, by which to recognise it: it raises a plain RuntimeError."""


def loader_workers(batches: Any) -> list[Any]:
    """The worker processes behind an iterator of a `DataLoader`; none where the loader reads by itself."""
    return list(getattr(batches, "_workers", []))


def end_loader_workers(loader: Any, batches: Any) -> None:
    """End the workers of a loader's iterator, even if they hang; its next iterator starts new ones."""
    if workers := loader_workers(batches):
        batches._workers_done_event = _KillInsteadOfEvent(workers)
        batches._shutdown_workers()
    loader._iterator = None


def kill(workers: Iterable[Any]) -> None:
    """End processes, even if they hang."""
    for worker in workers:
        worker.kill()
        worker.join()


class _KillInsteadOfEvent:
    """Replaces the event by which PyTorch asks workers to end.

    A worker that was killed may have held the event's lock; setting the event would then wait forever.
    """

    def __init__(self, workers: Iterable[Any]) -> None:
        self._workers = list(workers)

    def set(self) -> None:
        kill(self._workers)

    def is_set(self) -> bool:
        return True


def unregister_workers(batches: Any) -> None:
    """Take the workers of a loader's iterator out of those that PyTorch watches by a SIGCHLD handler.

    When a worker dies that handler raises wherever the process happens to be, even in the middle of a step.
    """
    if getattr(batches, "_worker_pids_set", False):
        signal_handling._remove_worker_pids(id(batches))
        batches._worker_pids_set = False


# --- vmamba.nn.fused: does anything watch, record or transform what a layer calls? -------------------------

# No public function says whether a global module hook is registered. PyTorch changes these dictionaries in
# place and never replaces them, so references to them stay valid.
_GLOBAL_HOOKS = (
    _module._global_forward_hooks,
    _module._global_forward_pre_hooks,
    _module._global_backward_hooks,
    _module._global_backward_pre_hooks,
)


def has_global_hook() -> bool:
    """Whether a hook is registered for every module."""
    forward, forward_pre, backward, backward_pre = _GLOBAL_HOOKS
    return bool(forward or forward_pre or backward or backward_pre)


def is_in_transform() -> bool:
    """Whether a torch.func transform, a dual level, a dispatch mode or torch.jit.trace is active here.

    None of these can be asked through a public function. An operator's kernel is called outside of a dispatch
    mode and of torch.jit.trace, and so does not see those.
    """
    return bool(
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state()
        or forward_ad._current_level >= 0
    )


def is_transformed_or_recorded() -> bool:
    """Whether `is_in_transform`, or a mode is active that sees PyTorch's functions.

    `torch.device` as a context and `torch.set_default_device` are such modes.
    """
    return bool(is_in_transform() or torch._C._len_torch_function_stack())


def is_legacy_batch(t: Tensor) -> bool:
    """Whether a tensor is a batched one of `torch.autograd.grad(is_grads_batched=True)`.

    That call uses an older form of torch.func.vmap, which `is_transformed_or_recorded` does not detect.
    """
    return torch._C._functorch.is_legacy_batchedtensor(t)


def is_watched(attributes: dict[str, Any]) -> bool:
    """Whether calling a module does more than its class's `forward`.

    That is: a hook is registered on it, the instance has an attribute `forward`, or `module.compile()` was
    called. No public method says so.

    Args:
        attributes: The module's `__dict__`.
    """
    return bool(
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
        or "forward" in attributes
        or attributes.get("_compiled_call_impl") is not None
    )


# --- vmamba.nn.fused: products and convolutions of oneDNN fused with an activation --------------------------

HAS_ONEDNN_POINTWISE = (
    platform.machine() in ("x86_64", "AMD64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
"""Whether oneDNN's fused operators are available. They are not public; torch.compile uses them."""


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """x·weightᵀ + bias, then GELU if asked for."""
    activation, algorithm = ("gelu", "none") if gelu else ("none", "")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)


def onednn_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: tuple[Any, ...],
    silu: bool,
) -> Tensor:
    """A convolution of (padding, stride, dilation, groups), then SiLU if asked for."""
    activation = "swish" if silu else "none"
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *geometry, activation, [], "")


def onednn_has_bfloat16() -> bool:
    """Whether oneDNN computes in bfloat16 on this processor."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


# --- vmamba.train: half precision on a CPU ------------------------------------------------------------------
# Whether a CPU has half-precision instructions can only be read from PyTorch's oneDNN, and not publicly.


def cpu_computes_in(kind: str) -> bool:
    """Whether this CPU has instructions for "bf16" or "fp16", so that products need not be emulated.

    True if PyTorch cannot tell.
    """
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported", None)
    return True if supported is None else bool(supported())


# --- vmamba.train: the layers whose statistics are of a batch --------------------------------------------
# PyTorch names no public class that BatchNorm1d, 2d, 3d and SyncBatchNorm share.

AnyBatchNorm = _BatchNorm

# --- vmamba.analysis.complexity: every operator that runs ---------------------------------------------------
# PyTorch documents the mode for extenders, but has it in a private module. The public TorchFunctionMode sees
# only what Python calls, not the operators of which that consists, nor what they give.

DispatchMode = TorchDispatchMode
