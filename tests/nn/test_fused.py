"""The fused forms: the same values as the layers' own `forward`, and entered only where nobody could tell."""

import copy
import pickle
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import vmamba
from vmamba.nn import (
    SS2D,
    CascadeSS2D,
    ConvDownsample,
    ConvStem,
    MergeDownsample,
    Mlp,
    VSSBlock,
)
from vmamba.nn.fused import blocking, entry

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "block": (lambda: VSSBlock(8), (5, 9, 7, 8)),
    "block with gate, without MLP": (lambda: VSSBlock(8, gate=True, mlp_ratio=0), (5, 9, 7, 8)),
    "block with cascade": (lambda: VSSBlock(8, routes="cascade"), (5, 9, 7, 8)),
    "block without convolution": (lambda: VSSBlock(8, ssm_conv=0), (5, 9, 7, 8)),
    "block with drop path": (lambda: VSSBlock(8, drop_path=0.5), (5, 9, 7, 8)),
    "SS2D": (lambda: SS2D(8), (2, 5, 3, 8)),
    "CascadeSS2D": (lambda: CascadeSS2D(8, gate=True), (2, 5, 3, 8)),
    "MLP": (lambda: Mlp(8, 16), (3, 4, 8)),
    "stem": (lambda: ConvStem(3, 8), (5, 3, 15, 17)),
    "stem of stride 1": (lambda: ConvStem(3, 8, 1), (5, 3, 16, 16)),
    "downsampling": (lambda: ConvDownsample(128, 6), (1, 6, 7, 128)),
    "merging": (lambda: MergeDownsample(8, 6), (2, 5, 7, 8)),
}
layers = pytest.mark.parametrize("name", LAYERS)


def made(name: str) -> tuple[nn.Module, Tensor]:
    build, shape = LAYERS[name]
    return build(), torch.randn(shape)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocking, "CACHED_VALUES", 2**10)
    monkeypatch.setattr(blocking, "GROUP_VALUES", 2**11)


@layers
@pytest.mark.usefixtures("small_blocks")
def test_values_and_gradients_of_the_plain_path(name: str) -> None:
    layer, x = made(name)
    x.requires_grad_()
    for training in (False, True):
        layer.train(training)
        assert entry.fused_form(layer, x) is not None
        results = []
        for enabled in (True, False):
            torch.manual_seed(1)  # of drop path
            with vmamba.nn.fused(enabled):
                y = layer(x)
                gradients = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
                torch.manual_seed(1)
                with torch.no_grad():
                    results.append([y, layer(x), *gradients])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@layers
def test_the_plain_path_is_what_pytorch_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit: with the fused forms off, no call but those of `forward` is made."""
    layer, x = made(name)
    layer.eval()
    with vmamba.nn.fused(False), torch.no_grad():
        switched_off = layer(x)
    monkeypatch.setattr(entry, "_FORMS", {})
    with torch.no_grad():
        assert torch.equal(layer(x), switched_off)


def test_the_switch() -> None:
    layer, x = made("MLP")

    def enters() -> bool:
        return entry.fused_form(layer, x) is not None

    assert enters()
    with vmamba.nn.fused(False):
        assert not enters()
        with vmamba.nn.fused(True):
            assert enters()
        assert not enters()
        in_thread: list[bool] = []
        thread = threading.Thread(target=lambda: in_thread.append(enters()))
        thread.start()
        thread.join()
        assert in_thread == [True]
    assert enters()
    vmamba.nn.fused(False)
    try:
        assert not enters()
    finally:
        vmamba.nn.fused(True)


class _Subclass(Tensor):
    pass


class _Linear(nn.Linear):
    pass


class _Function(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def _set(path: str, value: object) -> Callable[[nn.Module], None]:
    owner, _, name = path.rpartition(".")
    return lambda block: setattr(block.get_submodule(owner), name, value)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a subclass of Linear": _set("mlp.fc1", _Linear(8, 32)),
    "another norm": _set("op.out_norm", nn.RMSNorm(16)),
    "a norm of other dimensions": _set("norm2", nn.LayerNorm((7, 8))),
    "a convolution that reflects": _set(
        "op.conv", nn.Conv2d(16, 16, 3, padding=1, groups=16, padding_mode="reflect")
    ),
    "a convolution with padding by name": _set("op.conv", nn.Conv2d(16, 16, 3, padding="same", groups=16)),
    "GELU by tanh": _set("mlp.act", nn.GELU("tanh")),
    "another activation": _set("op.act", nn.ReLU()),
    "a forward of the instance": _set("mlp.fc2.forward", lambda x: x),
    "a compiled submodule": lambda block: block.norm1.compile(backend="eager"),
    "a parametrization": lambda block: parametrizations.weight_norm(block.op.in_proj),
    "pruning": lambda block: prune.l1_unstructured(block.mlp.fc1, "weight", 0.5),
    "a parameter of another type": lambda block: setattr(
        block.op.in_proj, "weight", nn.Parameter(block.op.in_proj.weight.detach().as_subclass(_Subclass))
    ),
    "a subclass of the block": lambda block: setattr(
        block, "__class__", type("Mine", (VSSBlock,), {"forward": lambda self, x: x})
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_not_entered_by_a_layer_that_was_changed(change: str) -> None:
    block, x = made("block")
    assert entry.fused_form(block, x) is not None
    CHANGES[change](block)
    assert entry.fused_form(block, x) is None


@pytest.mark.parametrize(
    "context",
    [
        lambda: _Function(),
        lambda: _Dispatch(),
        lambda: torch.device("cpu"),
        lambda: torch.autograd.forward_ad.dual_level(),
    ],
    ids=["function mode", "dispatch mode", "default device", "dual level"],
)
def test_not_entered_in_a_mode(context: Callable[[], AbstractContextManager[object]]) -> None:
    block, x = made("block")
    with context():
        assert entry.fused_form(block, x) is None
    assert entry.fused_form(block, x) is not None


def test_not_entered_for_other_inputs() -> None:
    block, x = made("block")
    for other in (x.as_subclass(_Subclass), x[:0], x.to("meta"), nn.Parameter(x), None):
        assert entry.fused_form(block, other) is None


@pytest.mark.parametrize(
    ("owner", "name"),
    [(F, "linear"), (nn.Linear, "forward"), (nn.Module, "__call__"), (SS2D, "finish"), (SS2D, "forward")],
    ids=str,
)
def test_not_entered_where_pytorch_or_a_layer_is_patched(
    owner: object, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, x = made("block")
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: original(*args, **kwargs))
    assert entry.fused_form(block, x) is None


@pytest.mark.usefixtures("small_blocks")
def test_methods_of_an_instance_are_called() -> None:
    """A recorder of scans may put its own `scan` or `finish` on one layer."""
    for name in ("scan", "project", "finish"):
        block, x = VSSBlock(8).eval(), torch.randn(2, 3, 4, 8)
        method, seen = getattr(block.op, name), []
        setattr(block.op, name, lambda *args, m=method, s=seen: s.append(args) or m(*args))
        with torch.no_grad():
            block(x)
        assert seen, name


def test_an_empty_batch() -> None:
    block = VSSBlock(8).eval()
    with torch.no_grad():
        assert block(torch.empty(0, 4, 4, 8)).shape == (0, 4, 4, 8)
        assert ConvStem(3, 8)(torch.empty(0, 3, 16, 16)).shape == (0, 4, 4, 8)


@pytest.mark.usefixtures("small_blocks")
def test_random_numbers_are_drawn_for_the_whole_batch() -> None:
    for train in (lambda block: block.train(), lambda block: block.eval().drop_path1.train()):
        block, x = VSSBlock(8, drop_path=0.5).eval(), torch.randn(5, 9, 7, 8)
        assert isinstance(block.drop_path1, DropPath)
        train(block)
        results = []
        for enabled in (True, False):
            torch.manual_seed(0)
            with torch.no_grad(), vmamba.nn.fused(enabled):
                results.append(block(x))
        close(*results)
        assert not torch.equal(results[0], x)


def test_copies_and_pickles() -> None:
    block, x = made("block with drop path")
    block.eval()
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(other(x), block(x))
        assert entry.fused_form(other, x) is not None


@pytest.mark.parametrize("watched", ["nothing", "forward", "backward"])
def test_checkpointing_takes_the_same_path_twice(watched: str) -> None:
    """Also where something watches the forward or the backward pass alone."""
    block, x = VSSBlock(8, drop_path=0.3).train(), torch.randn(3, 4, 5, 8)
    results = []
    for checkpointing in (False, True):
        block.grad_checkpointing = checkpointing
        torch.manual_seed(3)
        with _Dispatch() if watched == "forward" else nullcontext():
            y = block(x)
        with _Dispatch() if watched == "backward" else nullcontext():
            results.append(torch.autograd.grad(y.square().sum(), list(block.parameters())))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
