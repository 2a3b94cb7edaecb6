"""Backend `cpu`: the compiled kernel of csrc/, fused over routes, loaded with ctypes.

Sizes: b batch, h height, w width, l = h·w positions, d channels, k routes, n state size, r rank of delta.

The library lies beside this file. It is built against neither Python nor PyTorch; on Linux it shares the
OpenMP threads of PyTorch, which must be loaded first, and gets their number with each call.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmamba.ops.backend import Backend, Gradients, saved_every_stride, state_stride, why_not_kernel
from vmamba.ops.operands import Operands
from vmamba.ops.routes import CROSS, GIVEN, check_orders, scan_order

MOST_STATES = 64
"""The largest state size; beyond it `chunked` serves."""

GRAIN = 2**15
"""Values (positions, channels, routes and states) worth a thread. On a quiet AMD EPYC (Zen 3, two cores,
2026-11-26) two threads took 1.01 of one thread's time for 2^15.6 values and 0.91 for 2^16.6. For less, waking
a thread takes as long as its work, and on a loaded machine the call waits until it gets a processor."""

_TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_FILES = ("libvmamba_cpu.so", "libvmamba_cpu.dylib", "libvmamba_cpu.dll")


class _Image(ctypes.Structure):
    """`vmamba_image` of csrc/selective_scan.h."""

    _fields_ = (("data", ctypes.c_void_p), ("type", ctypes.c_int64), ("stride", ctypes.c_int64 * 4))


def _fields(names: str, type_: Any) -> tuple[tuple[str, Any], ...]:
    return tuple((name, type_) for name in names.split())


class _Scan(ctypes.Structure):
    """`vmamba_scan` of csrc/selective_scan.h."""

    _fields_ = (
        *_fields("batch height width channels n_routes n_state", ctypes.c_int64),
        *_fields("rank softplus state_stride state_type threads", ctypes.c_int64),
        *_fields("routes orders", ctypes.c_void_p),
        *_fields("x delta B C", _Image),
        *_fields("A D bias weight initial", ctypes.c_void_p),
    )


class _Gradients(ctypes.Structure):
    """`vmamba_gradients` of csrc/selective_scan.h."""

    _fields_ = (
        ("y", _Image),
        *_fields("last states x delta A B C D bias weight initial", ctypes.c_void_p),
    )


@cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    import vmamba.ops  # an editable install has this folder in two places

    files = [
        file for folder in vmamba.ops.__path__ for name in _FILES if (file := Path(folder) / name).is_file()
    ]
    if not files:
        return (
            "this installation has no compiled kernel; install vmamba where a C++ compiler works "
            "(GCC 12 or Clang), or a wheel for this platform"
        )
    try:
        library = ctypes.CDLL(str(files[0]))
    except OSError as error:
        return f"its library does not load: {error}"
    _keep_freed_memory()
    pointers = ctypes.c_void_p
    library.vmamba_scan_forward.argtypes = (ctypes.POINTER(_Scan), pointers, pointers, pointers)
    library.vmamba_scan_backward.argtypes = (ctypes.POINTER(_Scan), ctypes.POINTER(_Gradients))
    library.vmamba_instruction_set.restype = ctypes.c_char_p
    return library


def _keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next call instead of returning it to the system.

    glibc returns every freed block above a threshold. If a model's activations are larger, all of their pages
    are mapped and zeroed again in each call, which at batch 1 takes as long as the rest of the forward. The
    threshold rises to the size of the largest block freed so far, up to 32 MiB, so this frees one of that
    size once. It has no effect where MALLOC_TRIM_THRESHOLD_ or MALLOC_MMAP_THRESHOLD_ is set, or with another
    allocator.
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


def _scan(call: Operands) -> tuple[_Scan, list[object]]:
    """The call as the kernel's struct, and the objects that own the memory it points to."""
    dtype, k, n = call.state_dtype, call.n_routes, call.n_state
    # The kernel reads the short rows (B, C, low-rank delta) faster when it need not convert them.
    delta = call.delta if call.delta_weight is None else _widened(call.delta)
    images, holders = zip(
        *(_image(t) for t in (call.x, delta, _widened(call.B), _widened(call.C))), strict=True
    )
    arrays = [
        None if t is None else t.to(dtype).contiguous()
        for t in (call.A, call.D, call.delta_bias, call.delta_weight, call.initial_state)
    ]
    codes = (ctypes.c_int64 * k)(*call.routes)
    orders = _orders(call)
    pointers = (ctypes.c_void_p * k)(*(None if order is None else order.data_ptr() for order in orders))
    scan = _Scan(
        *call.x.shape,
        k,
        n,
        call.rank,
        call.delta_softplus,
        state_stride(n),
        _TYPES[dtype],
        # The number of threads does not change a bit of the result.
        max(1, min(torch.get_num_threads(), call.x.numel() * k * n // GRAIN)),
        ctypes.cast(codes, ctypes.c_void_p),
        ctypes.cast(pointers, ctypes.c_void_p),
        *images,
        *(None if t is None else t.data_ptr() for t in arrays),
    )
    return scan, [holders, arrays, codes, orders, pointers]


def _orders(call: Operands) -> list[Tensor | None]:
    """The positions of each route, (l,) int64; None for one that the kernel walks by its code."""
    if all(0 <= code < len(CROSS) for code in call.routes):
        return [None] * call.n_routes
    given = iter(() if call.orders is None else call.orders)
    _, height, width, _ = call.x.shape
    return [
        None
        if 0 <= code < len(CROSS)
        else (next(given) if code == GIVEN else scan_order((code,), height, width)[0]).contiguous()
        for code in call.routes
    ]


def _check(status: int) -> None:
    if status:
        raise MemoryError("the selective scan: out of memory")


def forward(call: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """As `Backend.forward`."""
    x, k, n, dtype = call.x, call.n_routes, call.n_state, call.state_dtype
    b, height, width, d = x.shape
    scan, holders = _scan(call)
    y = x.new_empty((b, height, width, d), dtype=dtype)
    last_state = x.new_empty((b, k, d, n), dtype=dtype)
    states = x.new_empty((b, k, saved_every_stride(call), n, d), dtype=dtype)
    pointers = (t.data_ptr() for t in (y, last_state, states))
    _check(_library().vmamba_scan_forward(ctypes.byref(scan), *pointers))
    del holders
    return y, last_state, states


def backward(grad_y: Tensor, grad_last_state: Tensor | None, call: Operands, states: Tensor) -> Gradients:
    """As `Backend.backward`."""
    dtype = call.state_dtype
    if call.orders is not None:
        # The backward operator may be called by itself, and the kernel writes where the orders point.
        check_orders(call.orders)
    scan, holders = _scan(call)
    image, grad_y = _image(grad_y)
    grad_last_state = None if grad_last_state is None else grad_last_state.to(dtype).contiguous()
    states = states.contiguous()
    gradients = tuple(None if t is None else t.new_empty(t.shape, dtype=dtype) for t in call.tensors)
    pointers = (None if t is None else t.data_ptr() for t in (grad_last_state, states, *gradients))
    _check(_library().vmamba_scan_backward(ctypes.byref(scan), ctypes.byref(_Gradients(image, *pointers))))
    del holders
    return gradients  # type: ignore[return-value]


def _why_not_here() -> str | None:
    library = _load()
    return library if isinstance(library, str) else None


BACKEND = Backend(
    "cpu",
    "compiled for CPUs, fused over routes",
    forward,
    backward,
    why_not_here=_why_not_here,
    why_not=lambda call: why_not_kernel(call, ("cpu",), MOST_STATES, any_route=True),
    preferred_on=("cpu",),
)
