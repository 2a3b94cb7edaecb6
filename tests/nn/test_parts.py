"""Work in parts: the same values as all at once, and nobody sees the parts."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.nn import VSSBlock, parts
from vmamba.nn.embed import ConvStem
from vmamba.nn.linear import convolved_silu


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "HIDDEN_AT_ONCE", 2**10)
    monkeypatch.setattr(parts, "GROUP", 2**11)


BLOCKS = [{}, {"gate": True, "mlp_ratio": 0}, {"routes": "cascade"}, {"ssm_conv": 0}, {"drop_path": 0.5}]


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("kwargs", BLOCKS)
def test_block(kwargs: dict[str, object]) -> None:
    block, x = VSSBlock(8, **kwargs).eval(), torch.randn(5, 9, 7, 8)
    seen = []
    handle = block.norm1.register_forward_hook(lambda layer, args, out: seen.append(len(out)))
    expected = block(x)  # with gradients: all at once
    with torch.no_grad():
        close(block(x), expected)
        assert seen == [5, 5]  # whoever looks sees the batch
        handle.remove()
        block.norm1.forward = lambda t: seen.append(len(t)) or nn.LayerNorm.forward(block.norm1, t)
        close(block(x), expected)
    assert sum(seen[2:]) == 5
    assert len(seen) > 3


@pytest.mark.usefixtures("small_parts")
def test_a_block_with_random_numbers_stays_whole() -> None:
    block, x = VSSBlock(8, drop_path=0.5).train(), torch.randn(5, 9, 7, 8)
    found = []
    for grad in (True, False):
        torch.manual_seed(0)
        with torch.set_grad_enabled(grad):
            found.append(block(x))
    close(found[1], found[0].detach())


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("size", [(16, 16), (15, 17)])
def test_stem(stride: int, size: tuple[int, int]) -> None:
    stem, images = ConvStem(3, 8, stride).eval(), torch.randn(5, 3, *size)
    with torch.no_grad():
        found = stem(images)
    assert found.is_contiguous()
    close(found, stem(images))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
        nn.Conv2d(6, 6, 5, padding=2, groups=6),
        nn.Conv2d(6, 6, 3, padding="same", groups=6),
        nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect", groups=6),
        nn.Identity(),
        nn.Sequential(nn.Conv2d(6, 4, 1), nn.Tanh()),
    ],
    ids=str,
)
def test_convolved_silu(conv: nn.Module) -> None:
    x = torch.randn(2, 5, 7, 6, requires_grad=True)
    expected = F.silu(conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    found, grad, inputs = convolved_silu(x, conv), torch.randn_like(expected), (x, *conv.parameters())
    close(found, expected)
    gradients = [torch.autograd.grad(y, inputs, grad, create_graph=True) for y in (found, expected)]
    for first, true in zip(*gradients, strict=True):
        close(first, true)
    first = torch.autograd.grad(found, x, grad, retain_graph=True)[0]
    close(first, gradients[1][0])
    second = [torch.autograd.grad(g[0].square().sum(), inputs) for g in gradients]
    for gradient, true in zip(*second, strict=True):
        torch.testing.assert_close(gradient, true, rtol=1e-4, atol=1e-4)
    x, expected = x.detach(), expected.detach()
    with torch.no_grad():
        close(convolved_silu(x, conv), expected)
        assert convolved_silu(x.double(), conv.double()).dtype == torch.float64
        conv.float()
        with torch.autocast("cpu", torch.bfloat16):
            half = convolved_silu(x, conv)
        torch.testing.assert_close(half.float(), expected, rtol=0.02, atol=0.02)
        seen = []
        conv.register_forward_hook(lambda *_: seen.append(True))
        close(convolved_silu(x, conv), expected)
        assert seen


def test_an_empty_batch() -> None:
    block = VSSBlock(8).eval()
    with torch.no_grad():
        assert block(torch.empty(0, 4, 4, 8)).shape == (0, 4, 4, 8)
        assert ConvStem(3, 8)(torch.empty(0, 3, 16, 16)).shape == (0, 4, 4, 8)
