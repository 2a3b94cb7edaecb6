import pytest
import timm
import torch
from torch import nn

import vmamba
from vmamba import SS2D, VMamba
from vmamba.analysis import activation
from vmamba.analysis.activation import ActivationError, activation_maps, draw, scaled

ROUTES = ("column", "row", "row_reversed", "column_reversed", "column")


@pytest.fixture
def model() -> VMamba:
    torch.manual_seed(3)
    return VMamba(num_classes=0, depths=(1, 2), dims=(8, 16), d_state=3, routes=ROUTES).train()


IMAGE = torch.randn(3, 40, 60, generator=torch.Generator().manual_seed(0))
LAST = {"stage": 1, "block": 1}  # 5×8 positions


class Alone(nn.Module):
    """An SS2D in a network of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8, 8)
        self.layer = SS2D(8, d_state=2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(self.patches(images).permute(0, 2, 3, 1))


def test_any_model_with_an_ss2d(model: VMamba) -> None:
    expected = activation_maps(model, IMAGE, **LAST)
    wrapped = activation_maps(nn.Sequential(model), IMAGE, **LAST)
    torch.testing.assert_close(wrapped.maps, expected.maps)
    features = timm.create_model("vmamba_pico", features_only=True, out_indices=(0, 1))
    assert activation_maps(features, IMAGE, stage=1, block=1).size == (10, 15)
    named = activation_maps(nn.Sequential(model), IMAGE, module="0.stages.1.blocks.1")
    torch.testing.assert_close(named.maps, expected.maps)
    alone = activation_maps(Alone(), IMAGE, module="layer")
    assert (alone.maps.shape, alone.size) == ((4, 35, 35), (5, 7))
    assert torch.equal(activation_maps(Alone(), IMAGE, module="").orders, alone.orders)


@pytest.mark.parametrize("values_at_once", [1, 2**23])
def test_a_map_is_what_the_scan_does(
    model: VMamba, values_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an input that is the same in all channels, the scan's mean over channels is the merged map's."""
    monkeypatch.setattr(activation, "_VALUES_AT_ONCE", values_at_once)
    maps = activation_maps(model, IMAGE, **LAST, with_delta=True)
    assert maps.size == (5, 8)
    assert maps.routes == ROUTES

    layer, taken = model.stages[1].blocks[1].op, []
    hook = layer.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    with torch.no_grad():
        model.eval()(IMAGE[None])
        hook.remove()
        _, delta, B, C, _ = layer.project(taken[0])
        v = torch.randn(1, 5, 8, 1)
        x = v.expand(-1, -1, -1, layer.D.shape[1])
        weights = {"delta_bias": layer.dt_bias, "delta_weight": layer.dt_weight}
        y = vmamba.ops.selective_scan_2d(x, delta, layer.A(), B, C, **weights, routes=ROUTES)
    torch.testing.assert_close((maps.merged() @ v.flatten()).view(5, 8), y.mean(-1)[0])


def test_the_parts_of_a_map(model: VMamba) -> None:
    actual = {kind: activation_maps(model, IMAGE, **LAST, kind=kind).maps for kind in activation.KINDS}
    for maps in actual.values():
        assert maps.shape == (5, 40, 40)
        torch.testing.assert_close(maps, maps.tril())
    keeps = actual["ww"].diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(keeps, torch.full_like(keeps, 3.0))  # a state that keeps all, N of them
    falls = actual["ww"].diff(dim=2).tril(-1)  # the further back, the less is left
    assert (falls >= 0).all()
    assert (falls > 0).any()
    torch.testing.assert_close(actual["CB"].diagonal(dim1=1, dim2=2), actual["CwBw"].diagonal(dim1=1, dim2=2))
    with_delta = activation_maps(model, IMAGE, **LAST, kind="CB", with_delta=True).maps
    shares = (with_delta / actual["CB"])[0].tril().nan_to_num()
    torch.testing.assert_close(shares[-1].expand_as(shares).tril(), shares)  # one δ to a column


def test_heat_maps(model: VMamba) -> None:
    maps = activation_maps(model, IMAGE, **LAST)
    heat = maps.from_query((0.5, 0.99))
    assert heat.shape == (5, 5, 8)
    position = 4 * 8 + 4
    torch.testing.assert_close(heat.sum(0).flatten(), maps.merged()[position])
    assert heat[1].flatten()[position + 1 :].count_nonzero() == 0  # by rows it sees what is before it
    assert heat[2].flatten()[:position].count_nonzero() == 0
    assert maps.diagonal()[4, 4] == maps.merged()[position, position]
    each = maps.merged(scale_each=True)
    assert 0 <= each.min() <= each.max() <= 1
    assert scaled(torch.ones(3)).tolist() == [0, 0, 0]
    with pytest.raises(ActivationError, match=r"query: expected x and y in \[0, 1\)"):
        maps.from_query((0.2, 1.0))


def test_the_model_is_left_as_it_was(model: VMamba) -> None:
    half = activation_maps(model.bfloat16(), IMAGE, **LAST)
    assert half.maps.dtype == torch.float32
    assert half.maps.isfinite().all()
    assert model.training
    assert not model.stages[1].blocks[1].op._forward_pre_hooks
    assert all(p.grad is None for p in model.parameters())


def test_a_long_decay_stays_finite(model: VMamba) -> None:
    torch.nn.init.constant_(model.stages[1].blocks[1].op.dt_bias, 1e3)
    decay = activation_maps(model, IMAGE, **LAST, kind="ww").maps
    torch.testing.assert_close(decay, 3 * torch.eye(40).expand(5, -1, -1))


def test_what_has_no_map_is_an_error(model: VMamba) -> None:
    with pytest.raises(ActivationError, match=r"no block 2 in stage 1 with a scan; the stages have \[1, 2\]"):
        activation_maps(model, IMAGE, stage=1, block=2)
    with pytest.raises(ActivationError, match="kind: expected one of 'CB', 'CwBw', 'ww', got 'QK'"):
        activation_maps(model, IMAGE, **LAST, kind="QK")
    with pytest.raises(ActivationError, match="expected one with selective scans, ResNet has none"):
        activation_maps(timm.create_model("test_resnet"), IMAGE)
    with pytest.raises(ActivationError, match=r"module: .* 'stages.1' has 2; the SS2Ds are 'stages.0.blocks"):
        activation_maps(model, IMAGE, module="stages.1")
    alone = Alone()
    with pytest.raises(ActivationError, match="the model has no stages; give module, one of 'layer'"):
        activation_maps(alone, IMAGE)
    with pytest.raises(ActivationError, match=r"image: expected .* got shape \(1, 3, 40, 60\)"):
        activation_maps(model, IMAGE[None], **LAST)
    cascade = VMamba(num_classes=0, depths=(1,), dims=(8,), routes="cascade")
    with pytest.raises(ActivationError, match="cascade"):
        activation_maps(cascade, IMAGE, stage=0, block=0)


def test_the_picture(model: VMamba, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    draw(activation_maps(model, IMAGE, **LAST), IMAGE.sigmoid(), (0.3, 0.7), tmp_path / "maps.png")
    assert (tmp_path / "maps.png").read_bytes().startswith(b"\x89PNG")
