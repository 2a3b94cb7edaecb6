"""Routes beyond the paper's, and channels split over routes, in a model: how it runs and is looked at."""

import copy
from typing import Any

import pytest
import timm
import torch

import vmamba
from vmamba.analysis.attention import AttentionError, scan_attention
from vmamba.analysis.complexity import count
from vmamba.analysis.routes import routes_in
from vmamba.errors import ModelError
from vmamba.models.factory import create_model
from vmamba.ops import NAMED_ROUTES, use_backend

SETTINGS = [
    pytest.param({"routes": "snake"}, id="snake"),
    pytest.param({"routes": ("window_row:3", "diagonal_up"), "d_state": 2}, id="two"),
    pytest.param({"routes": "atrous:2", "split_channels": True, "gate": True}, id="split"),
]


def small(**settings: Any) -> vmamba.VMamba:
    torch.manual_seed(0)
    return vmamba.VMamba(num_classes=5, depths=(1, 1), dims=(8, 16), **settings)


@pytest.mark.parametrize("settings", SETTINGS)
def test_backends_agree(settings: dict[str, Any]) -> None:
    """The fused path of a CPU, with and without gradients, and `chunked`."""
    model, x = small(**settings), torch.randn(2, 3, 40, 56)
    with use_backend("chunked"):
        expected = model(x)
        gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    actual = model(x)
    torch.testing.assert_close(actual, expected)
    for one, two in zip(
        torch.autograd.grad(actual.square().sum(), list(model.parameters())), gradients, strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(x), expected)


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("settings", SETTINGS)
def test_scripted_and_compiled(settings: dict[str, Any]) -> None:
    layer, x = vmamba.SS2D(8, **settings).eval(), torch.randn(2, 5, 6, 8)
    expected = layer(x)
    torch.compiler.reset()
    for other in (torch.jit.script(layer), torch.compile(layer, backend="eager", fullgraph=True)):
        torch.testing.assert_close(other(x), expected)


@pytest.mark.filterwarnings("ignore:.*get_attr. ?[Nn]ode")  # PyTorch 2.7, of its own constants
@pytest.mark.parametrize("settings", SETTINGS)
def test_exported_for_any_size(settings: dict[str, Any]) -> None:
    layer, x = vmamba.SS2D(8, **settings).eval(), torch.randn(2, 5, 6, 8)
    sizes = {axis: torch.export.Dim(name, min=2, max=64) for axis, name in enumerate("bhw")}
    exported = torch.export.export(layer, (x,), dynamic_shapes=(sizes,), strict=False).module()
    for each in (x, torch.randn(3, 9, 7, 8)):
        torch.testing.assert_close(exported(each), layer(each))


def test_multiply_adds() -> None:
    """Other routes cost the same; split channels a quarter of the scan, and their own parameters only."""
    cross, snake, split = (
        count(small(**settings), (3, 64, 64))
        for settings in ({}, {"routes": "snake"}, {"split_channels": True})
    )
    assert cross.macs == snake.macs
    assert cross.parameters == snake.parameters
    positions = [(16 * 16, 16, 1), (8 * 8, 32, 1)]  # l, d, r
    scans = sum(4 * length * d * (9 + 1 + rank) for length, d, rank in positions)
    assert cross.macs - split.macs == pytest.approx(scans * 3 / 4)
    assert cross.parameters - split.parameters == sum(3 * d * (1 + 1 + 1 + rank) for _, d, rank in positions)


def test_what_analyses_say() -> None:
    (routes,) = routes_in(small(routes="window:2", split_channels=True), (3, 32, 48)).values()
    assert [route.name for route in routes] == [f"window_{name}:2" for name in NAMED_ROUTES["cross"]]
    assert routes[0].paths[0][:6].tolist() == [0, 1, 6, 7, 2, 3]
    assert (
        scan_attention(small(routes="snake"), torch.randn(3, 32, 32), stage=1, block=0).routes
        == NAMED_ROUTES["snake"]
    )
    with pytest.raises(AttentionError, match="it scans more than once"):
        scan_attention(small(split_channels=True), torch.randn(3, 32, 32), stage=1, block=0)


def test_a_model_by_name() -> None:
    for routes in ("diagonal", "window:7", ["snake_row", "atrous_row:2x3", "row"]):
        with torch.device("meta"):
            model = timm.create_model("vmamba_pico", routes=routes)
        assert model(torch.empty(1, 3, 32, 32, device="meta")).shape == (1, 1000)
    model = create_model("vmamba_pico", routes="window:4", split_channels=True, num_classes=3).eval()
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    again = copy.deepcopy(model)
    assert again.config.arguments()["split_channels"] is True


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"routes": "window:0"}, "'window' takes a size of 1 to 4096 positions"),
        ({"routes": "spiral"}, "unknown name 'spiral'"),
        ({"routes": ("row",) * 5, "split_channels": True}, "expected a multiple of the 5 routes"),
        ({"routes": "cascade", "split_channels": True}, "the cascade reads all channels"),
        ({"split_channels": "yes"}, "expects bool"),
    ],
)
def test_settings_that_cannot_work(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        create_model("vmamba_pico", **args)
