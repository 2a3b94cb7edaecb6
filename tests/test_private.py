"""The private interfaces of PyTorch in `vmamba._torch_private` do what the library takes them to do."""

import os
import platform
import time
import weakref
from contextlib import nullcontext
from multiprocessing import connection
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from vmamba import _torch_private

# --- vmamba.ops: the operator's own autograd kernel -------------------------------------------------------


pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script")  # PyTorch's own, in forward mode


@pytest.fixture
def doubling() -> tuple[torch._ops.OpOverload, list[tuple[str, bool]]]:
    """An operator with an autograd kernel, and what its kernels saw: which one, and `is_transformed`."""
    with torch.library._scoped_library("vmamba_test", "DEF") as library:
        library.define("doubling(Tensor x) -> Tensor")
        operator, seen = torch.ops.vmamba_test.doubling.default, []

        def above(keys, x):
            seen.append(("above", _torch_private.is_transformed((x, None))))
            if seen[-1][1]:
                return x * 2
            return _torch_private.call_below_autograd(operator, keys, (x,))

        def below(x):
            seen.append(("below", x.requires_grad))
            return x * 2

        library.impl("doubling", above, "Autograd", with_keyset=True)
        library.impl("doubling", below, "CompositeExplicitAutograd")
        yield operator, seen


def test_call_below_autograd(doubling) -> None:
    """The next kernel runs, once, and nothing in it is recorded for backward."""
    operator, seen = doubling
    y = operator(torch.ones(2, requires_grad=True))
    assert seen == [("above", False), ("below", True)]
    assert y.tolist() == [2, 2]
    assert not y.requires_grad


@pytest.mark.parametrize(
    ("transformed", "seen_by_autograd"),
    [
        (lambda f, x: torch.func.grad(lambda x: f(x).sum())(x), [True]),
        (lambda f, x: torch.func.vjp(f, x)[0], [True]),
        (lambda f, x: torch.func.jvp(f, (x,), (x,))[1], [True]),
        (lambda f, x: torch.vmap(torch.func.grad(lambda x: f(x).sum()))(x), [True]),
        (lambda f, x: f(x), [False]),
    ],
)
def test_is_transformed_by_torch_func(doubling, transformed, seen_by_autograd: list[bool]) -> None:
    operator, seen = doubling
    transformed(operator, torch.ones(2))
    assert [value for name, value in seen if name == "above"] == seen_by_autograd


def test_is_transformed_by_forward_mode() -> None:
    """By a tangent, and not by the level alone."""
    x = torch.ones(2)
    assert not _torch_private.is_transformed((x, None))
    with forward_ad.dual_level():
        assert not _torch_private.is_transformed((x, None))
        assert _torch_private.is_transformed((None, x, forward_ad.make_dual(x, x)))
    assert not _torch_private.is_transformed((x, None))


# --- vmamba.ops: what torch.compile traces, and what a verdict on a GPU depends on


def test_tensors_of_a_graph_that_is_made() -> None:
    kinds = []

    def above(keys: Any, x: torch.Tensor) -> torch.Tensor:
        kinds.append(isinstance(x, _torch_private.FunctionalTensor))
        return _torch_private.call_below_autograd(torch.ops.vmamba_test.kind.default, keys, (x,))

    with torch.library._scoped_library("vmamba_test", "DEF") as library:
        library.define("kind(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl("kind", above, "Autograd", with_keyset=True)
        library.impl("kind", torch.clone, "CompositeExplicitAutograd")
        torch.library.register_fake("vmamba_test::kind", torch.empty_like, lib=library)
        x = torch.ones(2)
        torch.ops.vmamba_test.kind(x)
        assert kinds == [False]
        torch.compiler.reset()
        torch.compile(lambda x: torch.ops.vmamba_test.kind(x), backend="aot_eager", fullgraph=True)(x)
    assert True in kinds[1:]


def test_the_drivers_version() -> None:
    assert (_torch_private.cuda_driver_version() > 0) == torch.cuda.is_available()


class Which(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if _torch_private.is_exporting() else x - 1


@pytest.mark.parametrize("strict", [False, True])
def test_whether_torch_export_is_at_work(strict: bool) -> None:
    one = torch.ones(2)
    exported = torch.export.export(Which(), (one,), strict=strict).module()
    if not strict or torch.__version__ >= (2, 8):
        assert torch.equal(exported(one), one + 1)
    assert torch.equal(torch.compile(Which(), backend="eager", fullgraph=True)(one), one - 1)
    assert torch.equal(Which()(one), one - 1)


# --- vmamba.data.loading: the workers of a DataLoader


def slowly(index: int) -> int:
    """What a dataset of eight samples does that hangs at the sixth."""
    time.sleep(1000 if index == 5 else 0)
    return index


class Hanging:
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        return slowly(index)


def loader(**kwargs: Any) -> Any:
    return DataLoader(Hanging(), num_workers=2, batch_size=2, **kwargs)  # type: ignore[arg-type]


def test_the_workers_of_a_loader() -> None:
    assert _torch_private.loader_workers(iter(DataLoader(Hanging()))) == []  # type: ignore[arg-type]
    data = loader()
    batches = iter(data)
    workers = _torch_private.loader_workers(batches)
    assert len(workers) == 2
    assert all(worker.pid and worker.is_alive() for worker in workers)
    _torch_private.end_loader_workers(data, batches)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_that_hang_are_ended_at_once(persistent: bool) -> None:
    data = loader(timeout=1, persistent_workers=persistent)
    batches = iter(data)
    workers = _torch_private.loader_workers(batches)
    with pytest.raises(RuntimeError) as raised:
        list(batches)
    assert str(raised.value).startswith(_torch_private.LOADER_TIMED_OUT)
    _torch_private.end_loader_workers(data, batches)
    del batches
    assert not any(worker.is_alive() for worker in workers)
    again = iter(data)  # by new workers
    assert next(again).tolist() == [0, 1]
    assert not set(workers) & set(_torch_private.loader_workers(again))
    _torch_private.end_loader_workers(data, again)


@pytest.mark.skipif(os.name != "posix", reason="there is no SIGCHLD")
@pytest.mark.parametrize("watched", [True, False])
def test_a_death_of_a_worker_raises_anywhere_only_where_pytorch_watches(watched: bool) -> None:
    data = loader()
    batches = iter(data)
    assert batches._worker_pids_set
    if not watched:
        _torch_private.unregister_workers(batches)
    worker, *_ = _torch_private.loader_workers(batches)
    with pytest.raises(RuntimeError, match="killed by signal") if watched else nullcontext():
        worker.kill()
        connection.wait([worker.sentinel])
        time.sleep(0.1)  # the handler runs here
    _torch_private.end_loader_workers(data, batches)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="oneDNN is on x86 everywhere")
@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_what_the_cpu_computes_in(kind: str) -> None:
    found = getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported")()
    assert isinstance(found, bool)
    assert _torch_private.cpu_computes_in(kind) is found


# --- vmamba.nn.fused: does anything watch, record or transform what a layer calls?


onednn = pytest.mark.skipif(
    not _torch_private.HAS_ONEDNN_POINTWISE, reason="oneDNN's joined operators are on x86 alone"
)


@pytest.mark.parametrize(
    "register",
    [
        module_hooks.register_module_forward_hook,
        module_hooks.register_module_forward_pre_hook,
        module_hooks.register_module_full_backward_hook,
        module_hooks.register_module_full_backward_pre_hook,
    ],
)
def test_global_hooks(register) -> None:
    assert not _torch_private.has_global_hook()
    handle = register(lambda *_: None)
    assert _torch_private.has_global_hook()
    handle.remove()
    assert not _torch_private.has_global_hook()


@pytest.mark.parametrize(
    "watch",
    [
        lambda m: m.register_forward_hook(print),
        lambda m: m.register_forward_hook(print, with_kwargs=True, always_call=True),
        lambda m: m.register_forward_pre_hook(print),
        lambda m: m.register_full_backward_hook(print),
        lambda m: m.register_full_backward_pre_hook(print),
        lambda m: m.compile(),
        lambda m: setattr(m, "forward", lambda x: x),
    ],
)
def test_a_watched_module(watch) -> None:
    module = nn.Linear(2, 2)
    assert not _torch_private.is_watched(vars(module))
    watch(module)
    assert _torch_private.is_watched(vars(module))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")  # PyTorch's own, by its first jvp
def test_transforms_and_modes() -> None:
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(_torch_private.is_transformed_or_recorded())
        return x.sum()

    x = torch.randn(3)
    look(x)
    assert seen == [False]
    torch.func.grad(look)(x)
    torch.vmap(look)(x)
    torch.func.jvp(look, (x,), (x,))
    with forward_ad.dual_level():
        look(x)
    with TorchDispatchMode():
        seen.append(_torch_private.is_transformed_or_recorded())
    with TorchDispatchMode():
        assert _torch_private.is_in_transform()
    with TorchFunctionMode():
        seen.append(_torch_private.is_transformed_or_recorded())
        assert not _torch_private.is_in_transform()
    assert all(seen[1:])
    assert len(seen) == 7
    assert not _torch_private.is_transformed_or_recorded()


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated")
def test_tracing() -> None:
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(_torch_private.is_transformed_or_recorded())
        return x + 1

    torch.jit.trace(look, torch.ones(1), check_trace=False)
    assert seen == [True]


def test_a_batch_of_gradients() -> None:
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            seen.append(_torch_private.is_legacy_batch(grad) or _torch_private.is_transformed_or_recorded())
            return grad

    x = torch.ones(2, requires_grad=True)
    torch.autograd.grad(Look.apply(x), x, torch.eye(2), is_grads_batched=True)
    torch.autograd.grad(Look.apply(x), x, torch.ones(2))
    assert seen == [True, False]


@onednn
def test_onednn_linear() -> None:
    x, weight, bias = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    for b in (bias, None):
        expected = F.linear(x, weight, b)
        torch.testing.assert_close(_torch_private.onednn_linear(x, weight, b, False), expected)
        joined = _torch_private.onednn_linear(x, weight, b, True)
        torch.testing.assert_close(joined, F.gelu(expected), rtol=1e-5, atol=1e-5)


@onednn
def test_onednn_conv() -> None:
    x = torch.randn(2, 4, 5, 6).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(4, 1, 3, 3), torch.randn(4)
    expected = F.conv2d(x, weight, bias, stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=4)
    geometry = ((1, 2), (2, 1), (1, 2), 4)
    plain = _torch_private.onednn_conv(x, weight, bias, geometry, silu=False)
    torch.testing.assert_close(plain, expected, rtol=1e-5, atol=1e-5)
    joined = _torch_private.onednn_conv(x, weight, bias, geometry, silu=True)
    torch.testing.assert_close(joined, F.silu(expected), rtol=1e-5, atol=1e-5)
    assert isinstance(_torch_private.onednn_has_bfloat16(), bool)


# --- vmamba.analysis.complexity -----------------------------------------------------------------------------


def test_a_dispatch_mode_sees_every_operator() -> None:
    seen = []

    class Mode(_torch_private.DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    with Mode(), torch.no_grad():
        F.linear(torch.empty(2, 3, device="meta"), torch.empty(4, 3, device="meta"))
    assert torch.ops.aten.mm in seen


def test_a_storage_is_one_object_until_it_is_freed() -> None:
    tensor, freed = torch.empty(3, 4, device="meta"), []
    storage = tensor.untyped_storage()
    assert storage is tensor.view(12).untyped_storage()
    assert storage.nbytes() == 48
    weakref.finalize(storage, freed.append, True)
    del storage
    assert not freed
    del tensor
    assert freed
