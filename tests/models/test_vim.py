"""Vim: its counts, its mathematics by the reference scan, and the authors' checkpoints."""

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from vmamba.analysis.complexity import count
from vmamba.models.factory import create_on_meta
from vmamba.models.peers.vim import Vim, VimBlock, checkpoint_filter_fn
from vmamba.ops import selective_scan


@pytest.mark.parametrize(
    ("name", "millions", "parameters"), [("vim_tiny", 7, 7_148_008), ("vim_small", 26, 25_796_584)]
)
def test_the_counts(name: str, millions: int, parameters: int) -> None:
    """The paper gives millions; to the digit it is what the settings give."""
    model = create_on_meta(name)
    assert count(model, (3, 224, 224)).parameters == parameters
    assert round(parameters / 1e6) == millions
    block = 192 * 768 + 384 * 192 + 192 + 2 * (384 * 5 + 384 * 44 + 13 * 384 + 384 * 17)
    if name == "vim_tiny":
        assert parameters == 24 * block + 192 * 769 + 198 * 192 + 192 + 193_000


def tiny(size: int | tuple[int, int] = (32, 48), **settings: object) -> Vim:
    settings = {"embed_dim": 32, "depth": 2, "d_state": 3, "num_classes": 5} | settings
    torch.manual_seed(0)
    return Vim(size, **settings).double().eval()  # type: ignore[arg-type]


def written_out(block: VimBlock, x: Tensor) -> Tensor:
    """The block by the reference scan, with the sequence turned round for the second direction."""
    u, z = block.in_proj(block.norm(x)).transpose(1, 2).chunk(2, 1)
    sums: list[Tensor] = []
    for direction, turn in ((block.forwards, lambda t: t), (block.backwards, lambda t: t.flip(2))):
        v = direction.conv1d(F.pad(turn(u), (3, 0)))
        v = F.silu(v)
        delta, B, C = direction.x_proj(v.transpose(1, 2)).split(direction.splits, -1)
        y = selective_scan(
            v,
            (delta @ direction.dt_proj.weight.T).transpose(1, 2),
            -direction.A_log.exp(),
            B.transpose(1, 2),
            C.transpose(1, 2),
            direction.D,
            turn(z),
            direction.dt_proj.bias,
            delta_softplus=True,
            backend="reference",
        )
        sums.append(turn(y))
    return x + block.out_proj(((sums[0] + sums[1]) / 2).transpose(1, 2))


def test_a_block_is_the_papers() -> None:
    """Value and every gradient."""
    block = tiny().stages[1]
    x = torch.randn(2, 7, 32, dtype=torch.float64, requires_grad=True)
    inputs = [x, *block.parameters()]
    results = [block(x), written_out(block, x)]
    torch.testing.assert_close(*results)
    gradients = [torch.autograd.grad(y.square().sum(), inputs) for y in results]
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


def test_turning_the_sequence_is_exchanging_the_directions() -> None:
    block = tiny().stages[0]
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    y = block(x)
    block.forwards, block.backwards = block.backwards, block.forwards
    for direction in (block.forwards, block.backwards):
        direction.reverse = not direction.reverse
        direction.routes = [2 - direction.routes[0]]  # row and row_reversed are 0 and 2
    torch.testing.assert_close(block(x.flip(1)).flip(1), y)


def test_the_class_token_is_in_the_middle() -> None:
    model = tiny()
    torch.nn.init.zeros_(model.pos_embed)
    x = torch.randn(1, 3, 32, 48, dtype=torch.float64)
    tokens = model.embed(x)
    assert tokens.shape == (1, 7, 32)
    assert torch.equal(tokens[0, 3], model.cls_token[0, 0])
    patches = model.patch_embed(x)
    assert torch.equal(model.as_map(tokens).flatten(1, 2), patches)
    features = model.forward_features(x)
    torch.testing.assert_close(model.head(features, pre_logits=True), features[:, 3])
    model.reset_classifier(0, "avg")
    torch.testing.assert_close(model(x), model.as_map(features).mean((1, 2)))


def authors(model: Vim) -> dict[str, Tensor]:
    """Random weights with the authors' names."""
    named = {}
    for name, value in model.state_dict().items():
        if name.startswith("stages."):
            _, number, rest = name.split(".", 2)
            for direction, end in (("forwards.", ""), ("backwards.", "_b")):
                if rest.startswith(direction):
                    parameter, *more = rest.removeprefix(direction).split(".")
                    parameter = f"A{end}_log" if parameter == "A_log" else parameter + end
                    rest = ".".join((parameter, *more))
            name = f"layers.{number}." + (rest if rest == "norm.weight" else f"mixer.{rest}")
        name = {"norm.weight": "norm_f.weight"}.get(name, name).replace("head.fc.", "head.")
        named[name] = torch.randn_like(value)
    return named


def test_the_authors_checkpoints_load() -> None:
    model = tiny(32)
    weights = authors(model)
    for name in ("A_b_log", "D_b", "conv1d_b.weight", "dt_proj_b.bias", "x_proj.weight", "in_proj.weight"):
        assert f"layers.1.mixer.{name}" in weights
    model.load_state_dict(checkpoint_filter_fn({"model": weights}, model))
    assert torch.equal(model.stages[1].backwards.A_log, weights["layers.1.mixer.A_b_log"])
    assert torch.equal(model.stages[0].forwards.D, weights["layers.0.mixer.D"])
    assert checkpoint_filter_fn(model.state_dict(), model).keys() == model.state_dict().keys()


def test_a_checkpoint_for_another_size_is_resampled() -> None:
    weights, large = authors(tiny(32)), tiny((48, 64))
    large.load_state_dict(checkpoint_filter_fn(weights, large))
    assert torch.equal(large.pos_embed[:, 6], weights["pos_embed"][:, 2])


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="img_size: expected multiples of 16, got 40x32"):
        Vim((40, 32))
    with pytest.raises(ValueError, match="global_pool: expected 'token', 'avg' or '', got 'max'"):
        Vim(global_pool="max")


def test_timms_contract() -> None:
    features = timm.create_model("vim_tiny", features_only=True, img_size=(32, 48), embed_dim=32, depth=4)
    assert [tuple(each.shape) for each in features(torch.randn(1, 3, 32, 48))] == [(1, 32, 2, 3)] * 3
    model = tiny().train()
    x = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        gradients.append(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)
    assert "stages.1.backwards.D" in model.no_weight_decay()
    assert "stages.1.backwards.dt_proj.weight" not in model.no_weight_decay()
