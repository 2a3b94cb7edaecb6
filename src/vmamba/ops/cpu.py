"""Engine `cpu`: the compiled kernel of csrc/, fused over routes, loaded with ctypes.

B batch, H height, W width, L = H·W, D channels, K routes, N state size, R rank of delta.

The library is looked for beside this file. It is built against neither Python nor PyTorch; on Linux it shares
the OpenMP threads of PyTorch, which must be loaded first, and is told their number with each call.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from vmamba.ops._registry import Backend, Gradients, register, state_stride
from vmamba.ops._validate import state_dtype

MOST_STATES = 64
"""The largest N; beyond it `chunked` serves."""

_TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_FILES = ("libvmamba_cpu.so", "libvmamba_cpu.dylib", "libvmamba_cpu.dll")


class _Image(ctypes.Structure):
    """`vmamba_image` of csrc/selective_scan.h."""

    _fields_ = (("data", ctypes.c_void_p), ("type", ctypes.c_int64), ("stride", ctypes.c_int64 * 4))


class _Scan(ctypes.Structure):
    """`vmamba_scan` of csrc/selective_scan.h."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in (
                *("batch", "height", "width", "channels", "n_routes", "n_state"),
                *("rank", "softplus", "state_stride", "state_type", "threads"),
            )
        ),
        ("routes", ctypes.c_void_p),
        *((name, _Image) for name in ("x", "delta", "B", "C")),
        *((name, ctypes.c_void_p) for name in ("A", "D", "bias", "weight", "initial")),
    )


class _Gradients(ctypes.Structure):
    """`vmamba_gradients` of csrc/selective_scan.h."""

    _fields_ = (
        ("y", _Image),
        *(
            (name, ctypes.c_void_p)
            for name in ("last", "states", "x", "delta", "A", "B", "C", "D", "bias", "weight", "initial")
        ),
    )


@cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    import vmamba.ops  # an editable install has this folder in two places

    found = [
        file for folder in vmamba.ops.__path__ for name in _FILES if (file := Path(folder) / name).is_file()
    ]
    if not found:
        return (
            "this installation has no compiled kernel; install vmamba where a C++ compiler works "
            "(GCC 12 or Clang), or a wheel for this platform"
        )
    try:
        library = ctypes.CDLL(str(found[0]))
    except OSError as error:
        return f"its library does not load: {error}"
    _keep_freed_memory()
    pointers = ctypes.c_void_p
    library.vmamba_scan_forward.argtypes = (ctypes.POINTER(_Scan), pointers, pointers, pointers)
    library.vmamba_scan_backward.argtypes = (ctypes.POINTER(_Scan), ctypes.POINTER(_Gradients))
    library.vmamba_instruction_set.restype = ctypes.c_char_p
    return library


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next call instead of giving it back to the system.

    It maps a block above a threshold on its own, and gives back what is free at the heap's end above twice
    that; the threshold is the size of the largest block freed so far, up to 32 MiB. Models whose activations
    are smaller otherwise have every page of them mapped and zeroed anew in each call, which takes as long as
    all else at batch 1. An explicit MALLOC_TRIM_THRESHOLD_ or MALLOC_MMAP_THRESHOLD_, or another allocator,
    is left as it is.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


def _library() -> ctypes.CDLL:
    library = _load()
    assert not isinstance(library, str), library  # why_not_here was asked first
    return library


def instruction_set() -> str | None:
    """What the kernel uses here: "avx512", "avx2" or "baseline"; None where there is no kernel."""
    library = _load()
    return None if isinstance(library, str) else library.vmamba_instruction_set().decode()


def _image(t: Tensor) -> tuple[_Image, Tensor]:
    """An operand as the kernel addresses it, and the tensor that holds its memory."""
    if t.stride(-1) != 1 and t.shape[-1] != 1:
        t = t.contiguous()
    batch, height, width, *route, _ = t.stride()
    stride = (batch, height, width, route[0] if route else 0)
    return _Image(t.data_ptr(), _TYPES[t.dtype], (ctypes.c_int64 * 4)(*stride)), t


def _widened(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_weight: Tensor | None,
    delta_softplus: bool,
    routes: list[int],
    initial_state: Tensor | None,
) -> tuple[_Scan, list[object]]:
    """A call as the kernel takes it, and what must live as long."""
    dtype = state_dtype(x)
    # Rows of few values are read faster where nothing is left to convert.
    few = (delta if delta_weight is None else _widened(delta), _widened(B), _widened(C))
    images, kept = zip(*(_image(t) for t in (x, *few)), strict=True)
    arrays = [
        None if t is None else t.to(dtype).contiguous()
        for t in (A, D, delta_bias, delta_weight, initial_state)
    ]
    codes = (ctypes.c_int64 * len(routes))(*routes)
    call = _Scan(
        *x.shape,
        len(routes),
        A.shape[2],
        0 if delta_weight is None else delta_weight.shape[2],
        delta_softplus,
        state_stride(A.shape[2]),
        _TYPES[dtype],
        torch.get_num_threads(),
        ctypes.cast(codes, ctypes.c_void_p),
        *images,
        *(None if t is None else t.data_ptr() for t in arrays),
    )
    return call, [kept, arrays, codes]


def _check(status: int) -> None:
    if status:
        raise MemoryError("the selective scan: out of memory")


def forward(
    x: Tensor,  # (B, H, W, D)
    delta: Tensor,  # (B, H, W, K, D), or (B, H, W, K, R) with delta_weight
    A: Tensor,  # (K, D, N)
    B: Tensor,  # (B, H, W, K, N)
    C: Tensor,  # (B, H, W, K, N)
    D: Tensor | None,  # (K, D)
    delta_bias: Tensor | None,  # (K, D)
    delta_weight: Tensor | None,  # (K, D, R)
    delta_softplus: bool,
    routes: list[int],
    initial_state: Tensor | None,  # (B, K, D, N)
) -> tuple[Tensor, Tensor, Tensor]:
    """As `Backend.forward`."""
    batch, height, width, channels = x.shape
    n_routes, n_state, dtype = len(routes), A.shape[2], state_dtype(x)
    call, kept = _scan(x, delta, A, B, C, D, delta_bias, delta_weight, delta_softplus, routes, initial_state)
    y = x.new_empty((batch, height, width, channels), dtype=dtype)
    last = x.new_empty((batch, n_routes, channels, n_state), dtype=dtype)
    slots = -(-height * width // state_stride(n_state))
    states = x.new_empty((batch, n_routes, slots, n_state, channels), dtype=dtype)
    _check(
        _library().vmamba_scan_forward(ctypes.byref(call), y.data_ptr(), last.data_ptr(), states.data_ptr())
    )
    del kept
    return y, last, states


def backward(
    grad_y: Tensor,  # (B, H, W, D)
    grad_last_state: Tensor | None,  # (B, K, D, N)
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_weight: Tensor | None,
    delta_softplus: bool,
    routes: list[int],
    initial_state: Tensor | None,
    states: Tensor,
) -> Gradients:
    """As `Backend.backward`."""
    dtype = state_dtype(x)
    operands = (x, delta, A, B, C, D, delta_bias, delta_weight, initial_state)
    call, kept = _scan(x, delta, A, B, C, D, delta_bias, delta_weight, delta_softplus, routes, initial_state)
    image, grad_y = _image(grad_y)
    grad_last_state = None if grad_last_state is None else grad_last_state.to(dtype).contiguous()
    states = states.contiguous()
    gradients = tuple(None if t is None else t.new_empty(t.shape, dtype=dtype) for t in operands)
    pointers = (None if t is None else t.data_ptr() for t in (grad_last_state, states, *gradients))
    _check(_library().vmamba_scan_backward(ctypes.byref(call), ctypes.byref(_Gradients(image, *pointers))))
    del kept
    return gradients  # type: ignore[return-value]


def _why_not_here() -> str | None:
    library = _load()
    return library if isinstance(library, str) else None


def _why_not(device: torch.device, n_state: int) -> str | None:
    if device.type != "cpu":
        return f"it runs on a CPU, the operands are on {device}"
    if n_state > MOST_STATES:
        return f"it takes a state size N of at most {MOST_STATES}, got {n_state}"
    return None


register(
    Backend(
        "cpu",
        "compiled for CPUs, fused over routes",
        forward,
        backward,
        _why_not_here,
        _why_not,
        fast_on=("cpu",),
    )
)
