"""Backbones of the paper's tables that timm does not have, against their definitions."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.errors import ModelError
from vmamba.heads import mask_rcnn, upernet
from vmamba.heads.peers import MultiLevelViT, ViTAdapter, create_backbone
from vmamba.heads.peers.vit_adapter import (
    DeformableAttention,
    as_maps,
    as_tokens,
    in_windows,
    places,
)

TINY = {"embed_dim": 24, "depth": 4, "num_heads": 2}


def small(kind: type) -> nn.Module:
    torch.manual_seed(2)
    return kind("deit_tiny_patch16_224", **TINY)


@pytest.mark.parametrize("kind", [MultiLevelViT, ViTAdapter])
def test_maps_and_gradients(kind: type) -> None:
    backbone = small(kind)
    images = torch.randn(2, 3, 64, 96)
    maps = backbone(images)
    assert [tuple(level.shape) for level in maps] == [(2, 24, 64 // s, 96 // s) for s in (4, 8, 16, 32)]
    assert [level.shape[2:] for level in backbone(images[:, :, :50, :90])] == [m.shape[2:] for m in maps]
    sum(level.square().sum() for level in maps).backward()
    assert not [name for name, parameter in backbone.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("kind", [MultiLevelViT, ViTAdapter])
def test_gradient_checkpointing_changes_no_gradient(kind: type) -> None:
    backbone = small(kind).eval()
    images = torch.randn(1, 3, 32, 64)
    results = []
    for enable in (False, True):
        backbone.set_grad_checkpointing(enable)
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(1) or t, lambda t: t
        ):
            loss = sum(level.square().mean() for level in backbone(images))
        results.append((len(saved), torch.autograd.grad(loss, list(backbone.parameters()))))
    (many, expected), (few, gradients) = results
    assert few < many
    torch.testing.assert_close(gradients, expected)


def test_the_neck_resizes_the_map_after_each_quarter() -> None:
    backbone = small(MultiLevelViT).eval()
    images = torch.randn(1, 3, 32, 48)
    maps = backbone(images)
    assert backbone.indices == [0, 1, 2, 3]
    x = backbone.model.patch_embed(images)
    x = backbone.model._pos_embed(x)
    for i, (block, scale) in enumerate(zip(backbone.model.blocks, (4, 2, 1, 0.5), strict=True)):
        x = block(x)
        tokens = x[:, 1:].transpose(1, 2).unflatten(2, (2, 3))
        resized = F.interpolate(backbone.lateral_convs[i](tokens), scale_factor=scale, mode="bilinear")
        torch.testing.assert_close(maps[i], backbone.convs[i](resized))


def sampled(image: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The value (d,) at a place in positions, bilinear, with zeros outside of the image (d, h, w)."""
    total = image.new_zeros(len(image))
    for row in (y.floor().int(), y.floor().int() + 1):
        for column in (x.floor().int(), x.floor().int() + 1):
            if 0 <= row < image.shape[1] and 0 <= column < image.shape[2]:
                weight = (1 - (y - row).abs()) * (1 - (x - column).abs())
                total = total + weight * image[:, row, column]
    return total


def test_deformable_attention_is_its_definition() -> None:
    torch.manual_seed(1)
    sizes, dim = [(4, 6), (2, 3)], 12
    attention = DeformableAttention(dim, levels=2).double()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.7)
    queries, values = torch.randn(2, 5, dim).double(), torch.randn(2, 30, dim).double()
    at = torch.rand(5, 2).double()
    actual = attention(queries, at, values, sizes)
    offsets = attention.sampling_offsets(queries).reshape(2, 5, 6, 2, 4, 2)
    weights = attention.attention_weights(queries).reshape(2, 5, 6, 8).softmax(-1).reshape(2, 5, 6, 2, 4)
    maps = as_maps(attention.value_proj(values), sizes)
    expected = torch.zeros(2, 5, dim).double()
    for b, q, head, level, point in torch.cartesian_prod(*map(torch.arange, offsets.shape[:-1])).tolist():
        height, width = sizes[level]
        x, y = at[q] * torch.tensor([width, height]) + offsets[b, q, head, level, point] - 0.5
        channels = slice(2 * head, 2 * head + 2)
        value = sampled(maps[level][b, channels], x, y)
        expected[b, q, channels] += weights[b, q, head, level, point] * value
    torch.testing.assert_close(actual, attention.output_proj(expected))


def test_attention_at_the_start_looks_along_a_direction_with_each_head() -> None:
    attention = DeformableAttention(12, levels=1)
    offsets = attention.sampling_offsets(torch.randn(1, 1, 12)).reshape(6, 4, 2)
    torch.testing.assert_close(offsets[0], torch.tensor([[1.0, 0], [2, 0], [3, 0], [4, 0]]))
    torch.testing.assert_close(
        offsets[3], torch.tensor([[-1.0, 0], [-2, 0], [-3, 0], [-4, 0]]), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("size", [(14, 28), (3, 5), (15, 9)])
def test_windows_see_only_themselves(size: tuple[int, int]) -> None:
    block = small(ViTAdapter).double().eval().model.blocks[0]
    x = torch.randn(2, size[0] * size[1], 24).double()
    image = x.unflatten(1, size)
    expected = torch.empty_like(image)
    for top in range(0, size[0], 14):
        for left in range(0, size[1], 14):
            window = image[:, top : top + 14, left : left + 14]
            padding = 14 * 14 - window.shape[1] * window.shape[2]
            q, k, v = (
                block.attn.qkv(block.norm1(window.flatten(1, 2)))
                .unflatten(2, (3, 2, 12))
                .permute(2, 0, 3, 1, 4)
            )
            k, v = (F.pad(each, (0, 0, 0, padding)) for each in (k, v))  # zeros take part, as in the original
            mixed = ((q @ k.transpose(2, 3) / 12**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
            y = window.flatten(1, 2) + block.attn.proj(mixed)
            y = y + block.mlp(block.norm2(y))
            expected[:, top : top + 14, left : left + 14] = y.unflatten(1, window.shape[1:3])
    torch.testing.assert_close(in_windows(block, x, size).unflatten(1, size), expected)


def test_tokens_and_their_places() -> None:
    maps = [torch.randn(2, 3, 4, 6), torch.randn(2, 3, 2, 3)]
    again = as_maps(as_tokens(maps), [(4, 6), (2, 3)])
    assert all(torch.equal(a, b) for a, b in zip(again, maps, strict=True))
    at = places([(4, 6), (2, 3)], maps[0])
    torch.testing.assert_close(at[1], torch.tensor([1.5 / 6, 0.5 / 4]))
    torch.testing.assert_close(at[24 + 3], torch.tensor([0.5 / 3, 1.5 / 2]))


def test_the_transformer_is_alone_at_first() -> None:
    """The injectors add nothing before training, so that pretrained weights do what they did."""
    backbone = small(ViTAdapter).eval()
    assert all(not injector.gamma.any() for injector in backbone.injectors)


def test_heads_take_them_by_name() -> None:
    with torch.device("meta"):
        detector, segmenter = mask_rcnn("vit_adapter_small"), upernet("deit_small_mln")
        assert isinstance(detector.backbone.body, ViTAdapter)
        assert segmenter.eval()(torch.empty(1, 3, 64, 64)).shape == (1, 150, 64, 64)
    with pytest.raises(ModelError, match="nonsense"):
        create_backbone("deit_small_mln", nonsense=1)
