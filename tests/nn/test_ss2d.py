import copy

import pytest
import torch
from torch.nn import functional as F

from vmamba.nn import (
    SS2D,
    CascadeSS2D,
    ConvDownsample,
    MergeDownsample,
    PatchStem,
    SS2DConfig,
    VSSBlock,
)
from vmamba.ops import selective_scan, use_backend

SETTINGS = [
    {},
    {"d_state": 3, "gate": True, "ssm_conv_bias": True},
    {"ssm_ratio": 1.0, "ssm_conv": 0, "dt_rank": 2},
    {"routes": ("column", "row_reversed")},
    {"routes": "window:2"},
    {"routes": ("snake_row", "atrous_column:2"), "split_channels": True},
    {"ssm_init": "rand"},
    {"ssm_init": "zero"},
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


REPLACEMENTS = {
    "a subclass that doubles": lambda: _Doubling(32),
    "GroupNorm": lambda: _GroupNorm(4, 32),
    "RMSNorm": lambda: torch.nn.RMSNorm(32),
    "nothing": lambda: torch.nn.Identity(),
    "no affine": lambda: torch.nn.LayerNorm(32, elementwise_affine=False),
    "no bias": lambda: torch.nn.LayerNorm(32, bias=False),
}


class _Doubling(torch.nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class _GroupNorm(torch.nn.GroupNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", REPLACEMENTS)
def test_out_norm_may_be_replaced(name: str, dtype: torch.dtype, gate: bool) -> None:
    layer = SS2D(16, gate=gate)
    layer.out_norm = REPLACEMENTS[name]()
    layer.to(dtype)
    x = torch.randn(2, 3, 4, 16, dtype=dtype)
    *operands, z = layer.project(x)
    y = layer.scan(*operands)
    normed = layer.out_norm.to(y.dtype)(y)
    if z is not None:
        normed = normed * F.silu(z)
    expected = layer.out_proj(normed.to(dtype))
    layer.to(dtype)
    tolerance = {"rtol": 0.05, "atol": 0.02} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(layer(x), expected, **tolerance)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, **tolerance)


class _Tripled(torch.nn.Module):
    def __init__(self, wrapped: torch.nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * self.wrapped(x)


@pytest.mark.parametrize("grad", [True, False])
def test_every_submodule_of_a_block_may_be_replaced(grad: bool) -> None:
    x = torch.randn(2, 3, 4, 8)
    names = [name for name, _ in VSSBlock(8, gate=True, drop_path=0.1).named_modules() if name]
    assert len(names) == 15
    for name in names:
        block = VSSBlock(8, gate=True, drop_path=0.1).eval()
        hooked = copy.deepcopy(block)
        owner, _, attribute = name.rpartition(".")
        setattr(block.get_submodule(owner), attribute, _Tripled(block.get_submodule(name)))
        hooked.get_submodule(name).register_forward_hook(lambda module, inputs, output: 3 * output)
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(block(x), hooked(x), msg=lambda text, name=name: f"{name}: {text}")


def test_settings_travel_as_one_object() -> None:
    config = SS2DConfig(d_state=4, gate=True)
    for layer in (SS2D(8, config), SS2D(8, d_state=4, gate=True), SS2D(8, SS2DConfig(gate=True), d_state=4)):
        assert layer.config == config
    assert VSSBlock(8, config, mlp_ratio=0.0).op.config == config
    assert VSSBlock(8, d_state=16, mlp_ratio=0.0).op.config == SS2DConfig(d_state=16)
    cascade = VSSBlock(8, routes="cascade").op
    assert type(cascade) is CascadeSS2D
    assert cascade.config.routes == "cascade"
    for build in (SS2D, VSSBlock, CascadeSS2D):
        with pytest.raises(TypeError, match="unknown setting 'd_stat'; expected one of d_state, "):
            build(8, d_stat=4)
        with pytest.raises(TypeError, match="config: expected an SS2DConfig, got 16"):
            build(8, 16)


@pytest.mark.parametrize("kind", [ConvDownsample, MergeDownsample])
@pytest.mark.parametrize("dilation", [1, 2])
def test_a_downsampling_of_stride_1_gives_what_stride_2_gives_between_too(kind: type, dilation: int) -> None:
    dense, strided = kind(4, 6, stride=1, dilation=dilation), kind(4, 6)
    dense.load_state_dict(strided.state_dict())
    x = torch.randn(2, 10, 12, 4)
    y = dense(x)
    assert y.shape == (2, 10, 12, 6)
    # Pixels that are `dilation` apart are the image that the strided form sees.
    torch.testing.assert_close(
        y[:, :: 2 * dilation, :: 2 * dilation], strided(x[:, ::dilation, ::dilation]), rtol=1e-4, atol=1e-5
    )


def test_a_dilated_convolution_keeps_the_size() -> None:
    layer = SS2D(8, ssm_conv=5, ssm_conv_dilation=2)
    assert layer.conv.padding == (4, 4)
    assert layer(torch.randn(1, 5, 6, 8)).shape == (1, 5, 6, 8)


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
        ({"ssm_conv": 2}, "ssm_conv: expected 0 or an odd"),
        ({"ssm_init": "ones"}, "ssm_init: expected one of 'mamba'"),
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


def test_backends_agree_through_a_layer() -> None:
    layer = SS2D(8, d_state=2).double()
    x = torch.randn(2, 6, 7, 8, dtype=torch.float64)
    with use_backend("reference"):
        expected = layer(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("routes", [(torch.arange(25),), ([0, 1, 2],), torch.arange(25), 5, None, ("row", 3)])
def test_routes_that_are_no_names_are_refused(routes: object) -> None:
    with pytest.raises(ValueError, match=r"a permutation gets a name by vmamba\.ops\.register_route"):
        SS2D(8, routes=routes)
