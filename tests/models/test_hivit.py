"""HiViT: the published counts, its mathematics, and the authors' checkpoints."""

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.analysis.complexity import count
from vmamba.models.factory import create_on_meta
from vmamba.models.peers.hivit import HiViT, checkpoint_filter_fn, relative_positions


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    [
        ("hivit_tiny", 19_181_668, 4.6),
        ("hivit_small", 37_526_464, 9.1),
        ("hivit_base", 66_418_952, 15.9),
    ],
)
def test_the_published_counts(name: str, parameters: int, gmacs: float) -> None:
    counts = count(create_on_meta(name), (3, 224, 224))
    assert counts.parameters == parameters
    assert counts.macs / 1e9 == pytest.approx(gmacs, rel=0.01)


def tiny(size: int | tuple[int, int] = (32, 48), **settings: object) -> HiViT:
    settings = {"embed_dim": 32, "depths": (1, 1, 2), "num_heads": 2, "num_classes": 5} | settings
    torch.manual_seed(0)
    return HiViT(size, **settings).double().eval()  # type: ignore[arg-type]


def test_a_bias_for_each_relative_position() -> None:
    index = relative_positions(2, 3)
    assert index[0].tolist() == [7, 6, 5, 2, 1, 0]  # from the first position: 0 back, then further ahead
    assert index.max() == 14
    assert torch.equal(index + index.T, torch.full((6, 6), 14))


def test_attention_is_the_papers() -> None:
    model = tiny()
    block = model.stages[2][2]
    x = torch.randn(2, 2, 3, 32, dtype=torch.float64)
    tokens, attn = block.norm1(x).flatten(1, 2), block.attn
    q, k, v = attn.qkv(tokens).chunk(3, -1)
    heads = []
    for i in range(2):
        part = slice(16 * i, 16 * (i + 1))
        scores = q[..., part] @ k[..., part].transpose(1, 2) / 4 + attn.bias_table[attn.bias_index][..., i]
        heads.append(scores.softmax(-1) @ v[..., part])
    y = x + attn.proj(torch.cat(heads, -1)).unflatten(1, (2, 3))
    torch.testing.assert_close(block(x), y + block.mlp(block.norm2(y)))


def test_a_patch_of_the_first_stages_sees_no_other() -> None:
    """All before the attention stays inside of a patch of 16 pixels."""
    model = tiny()
    x = torch.randn(1, 3, 32, 48, dtype=torch.float64)
    other = x.clone()
    other[:, :, :16, :16] += 1
    (first, second, third), (a, b, c) = (
        model.forward_intermediates(each, intermediates_only=True) for each in (x, other)
    )
    for one, two, side in ((first, a, 4), (second, b, 2)):
        changed = (one != two).any(1)[0]
        assert changed[:side, :side].all()
        assert changed.sum() == side**2
    assert (third != c).any(1).all()


def authors(model: HiViT) -> dict[str, Tensor]:
    """Random weights with the authors' names."""
    state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    places = [f"stages.{i}.{j}." for i, stage in enumerate(model.stages) for j in range(len(stage))]
    places.remove("stages.2.1.")
    named = {}
    for name, value in state.items():
        place = next((p for p in places if name.startswith(p)), None)
        if place:
            name = f"blocks.{places.index(place)}.{name.removeprefix(place)}"
        name = name.replace("bias_table", "relative_position_bias_table")
        name = name.replace("head.norm.", "fc_norm.").replace("head.fc.", "head.")
        if name == "stages.2.1.embedding":
            name, value = "absolute_pos_embed", value.flatten(1, 2)
        named[name] = value
    named["blocks.6.attn.relative_position_index"] = torch.zeros(4, 4)
    return named


def test_the_authors_checkpoints_load() -> None:
    model = tiny(32)
    weights = authors(model)
    assert "blocks.2.reduction.weight" in weights
    assert "blocks.6.attn.qkv.weight" in weights
    model.load_state_dict(checkpoint_filter_fn({"model": weights}, model))
    assert torch.equal(model.stages[1][1].mlp.fc1.weight, weights["blocks.3.mlp.fc1.weight"])
    assert torch.equal(
        model.stages[2][3].attn.bias_table, weights["blocks.7.attn.relative_position_bias_table"]
    )
    assert torch.equal(model.head.norm.weight, weights["fc_norm.weight"])
    assert checkpoint_filter_fn(model.state_dict(), model).keys() == model.state_dict().keys()


def test_a_checkpoint_for_another_size_is_resampled() -> None:
    small, large = tiny(32), tiny((48, 64))
    large.load_state_dict(checkpoint_filter_fn(authors(small), large))
    assert large.stages[2][1].embedding.shape == (1, 3, 4, 32)
    assert large(torch.randn(1, 3, 48, 64, dtype=torch.float64)).shape == (1, 5)


def test_sizes() -> None:
    with pytest.raises(ValueError, match="img_size: expected multiples of 16, got 40x32"):
        HiViT((40, 32))
    with pytest.raises(AssertionError, match="doesn't match model"):
        tiny()(torch.zeros(1, 3, 64, 64, dtype=torch.float64))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model = tiny().train()
    x = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        gradients.append(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


def test_timms_contract() -> None:
    features = timm.create_model("hivit_tiny", features_only=True, img_size=64, embed_dim=32, num_heads=2)
    maps = features(torch.randn(1, 3, 64, 64))
    assert [tuple(each.shape) for each in maps] == [(1, 8, 16, 16), (1, 16, 8, 8), (1, 32, 4, 4)]
    model = tiny().float()
    model.reset_classifier(7)
    assert model(torch.randn(2, 3, 32, 48)).shape == (2, 7)
    assert isinstance(model.get_classifier(), nn.Linear)
    torch.testing.assert_close(
        model.forward_head(model.forward_features(torch.ones(1, 3, 32, 48))), model(torch.ones(1, 3, 32, 48))
    )
    pooled = model.forward_head(torch.ones(1, 32, 2, 3), pre_logits=True)
    torch.testing.assert_close(pooled, F.layer_norm(torch.ones(1, 32), [32]))
    assert {name.rsplit(".", 1)[1] for name in model.no_weight_decay()} == {"embedding", "bias_table"}
