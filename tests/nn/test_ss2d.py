import pytest
import torch
from torch.nn import functional as F

from vmamba.nn import SS2D, CascadeSS2D, MergeDownsample, PatchStem, VSSBlock
from vmamba.ops import selective_scan, use_backend

SETTINGS = [
    {},
    {"d_state": 3, "gate": True, "conv_bias": True},
    {"ssm_ratio": 1.0, "conv": 0, "dt_rank": 2},
    {"routes": ("column", "row_reversed")},
    {"init": "rand"},
    {"init": "zero"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_forward_is_finish_of_scan_of_project(settings: dict) -> None:
    layer = SS2D(8, **settings).double()
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    *operands, z = layer.project(x)
    y = layer(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y, layer.finish(layer.scan(*operands), z))
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_initialisation() -> None:
    layer = SS2D(64, d_state=4)
    dt = F.softplus(layer.dt_bias)
    assert dt.min() >= 0.99e-3
    assert dt.max() <= 0.101
    assert torch.equal(layer.D, torch.ones_like(layer.D))
    torch.testing.assert_close(layer.A(), -torch.arange(1.0, 5).expand(4, 128, 4))
    for weight, bound in ((layer.x_proj_weight, 128**-0.5), (layer.dt_weight, 4**-0.5)):
        assert 0.9 * bound < weight.abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_layer_put_to_half_keeps_a_and_the_scan_in_float32(dtype: torch.dtype) -> None:
    layer = SS2D(16, gate=True).to(dtype)
    assert layer.A().dtype == torch.float32
    x = torch.randn(2, 4, 4, 16, dtype=dtype)
    *operands, _ = layer.project(x)
    assert layer.scan(*operands).dtype == torch.float32
    y = layer(x)
    assert y.dtype == dtype
    wide = SS2D(16, gate=True)
    wide.load_state_dict(layer.state_dict())
    scale = wide(x.float()).abs().max()
    assert (y - wide(x.float())).abs().max() < 16 * torch.finfo(dtype).eps * scale


def test_cascade_reads_rows_then_columns() -> None:
    layer = CascadeSS2D(6, d_state=2).double()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    *operands, z = layer.project(x)
    u = F.layer_norm(layer._expand(x)[0], [12])
    torch.testing.assert_close(operands[0], u)

    def lines(v: torch.Tensor, group: int) -> torch.Tensor:
        """Both ways along dimension 2, in one dimension, by hand."""
        total = 0
        for k, flip in ((group, False), (group + 1, True)):
            delta, B, C = F.linear(v, layer.x_proj_weight[k]).split(layer.splits, -1)
            delta = F.linear(delta, layer.dt_weight[k])
            seq = [t.flatten(0, 1).transpose(1, 2) for t in (v, delta, B, C)]
            seq = [t.flip(2) for t in seq] if flip else seq
            y = selective_scan(
                seq[0],
                seq[1],
                layer.A()[k],
                seq[2],
                seq[3],
                layer.D[k],
                None,
                layer.dt_bias[k],
                True,
                backend="reference",
            )
            total = total + (y.flip(2) if flip else y).transpose(1, 2).unflatten(0, v.shape[:2])
        return total

    rows = lines(u, 0)
    columns = lines(F.layer_norm(rows, [12]).transpose(1, 2), 2).transpose(1, 2)
    torch.testing.assert_close(layer.scan(*operands), columns, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(layer(x), layer.finish(columns, z), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"conv": 2}, "conv: expected 0 or an odd"),
        ({"init": "ones"}, "init: expected 'mamba'"),
        ({"d_state": 0}, "at least 1"),
        ({"routes": "zigzag"}, "unknown name 'zigzag'"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SS2D(8, **settings)


@pytest.mark.parametrize("mlp_ratio", [0.0, 2.0])
@pytest.mark.parametrize("routes", ["cross", "cascade"])
def test_block(mlp_ratio: float, routes: str) -> None:
    block = VSSBlock(8, mlp_ratio=mlp_ratio, routes=routes, drop_path=0.5).eval()
    x = torch.randn(2, 3, 4, 8)
    expected = x + block.op(block.norm1(x))
    if mlp_ratio:
        expected = expected + block.mlp(block.norm2(expected))
    torch.testing.assert_close(block(x), expected)


def test_merge_gathers_in_the_authors_order_and_pads_odd_sizes() -> None:
    merge = MergeDownsample(1, 4)
    merge.norm, merge.reduction = torch.nn.Identity(), torch.nn.Identity()
    x = torch.arange(1.0, 10).view(1, 3, 3, 1)  # rows 1 2 3, 4 5 6, 7 8 9
    assert merge(x)[0].tolist() == [[[1, 4, 2, 5], [3, 6, 0, 0]], [[7, 0, 8, 0], [9, 0, 0, 0]]]


def test_patch_stem_leaves_out_what_is_no_whole_patch() -> None:
    stem = PatchStem(3, 8, 4)
    x = torch.randn(1, 3, 35, 38)
    assert stem(x).shape == (1, 8, 9, 8)
    torch.testing.assert_close(stem(x), stem(x[..., :32, :36]))


def test_engines_agree_through_a_layer() -> None:
    layer = SS2D(8, d_state=2).double()
    x = torch.randn(2, 6, 7, 8, dtype=torch.float64)
    with use_backend("reference"):
        expected = layer(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
