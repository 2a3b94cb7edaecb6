import pytest
import torch
from torch import nn

from vmamba import VMamba
from vmamba.analysis.receptive_field import (
    SHARES,
    ReceptiveFieldError,
    draw,
    high_contribution_ratio,
    receptive_field,
)


class Convolution(nn.Module):
    """A model whose receptive field is known: one 3×3 convolution of ones."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1, bias=False)
        nn.init.constant_(self.conv.weight, scale)

    def forward_intermediates(self, x: torch.Tensor, **_) -> list[torch.Tensor]:
        return [self.conv(x)]


def test_of_one_convolution() -> None:
    field = receptive_field(Convolution(), [torch.ones(2, 8, 10)] * 2)
    expected = torch.zeros(8, 10)
    expected[3:6, 4:7] = 6.0  # 2 channels in, 3 out
    torch.testing.assert_close(field, expected)
    assert high_contribution_ratio(field, 1.0) == 9 / 80
    assert high_contribution_ratio(field, 0.1) == 1 / 80


class Stack(nn.Sequential):
    """Layers in a row, whose last result is the feature map."""

    def forward_intermediates(self, x: torch.Tensor, **_) -> list[torch.Tensor]:
        return [self(x)]


def positive(kernel: int, **settings: int) -> nn.Conv2d:
    padding = settings.get("dilation", 1) * (kernel // 2)
    conv = nn.Conv2d(3, 3, kernel, padding=padding, bias=False, **settings)
    nn.init.uniform_(conv.weight, 0.1, 1)
    return conv


@pytest.mark.parametrize(
    ("layers", "reach"),
    [
        ([(3, {}), (3, {})], 2),
        ([(3, {}), (5, {}), (3, {"dilation": 3})], 1 + 2 + 3),
        ([(3, {"stride": 2}), (5, {})], 1 + 2 * 2),
    ],
    ids=["two of 3x3", "dilated", "strided"],
)
def test_a_stack_of_convolutions_sees_its_support(layers: list[tuple[int, dict]], reach: int) -> None:
    torch.manual_seed(0)
    model = Stack(*(positive(kernel, **settings) for kernel, settings in layers))
    field = receptive_field(model, [torch.rand(3, 32, 40) for _ in range(2)])
    expected = torch.zeros(32, 40, dtype=torch.bool)
    expected[16 - reach : 16 + reach + 1, 20 - reach : 20 + reach + 1] = True
    assert torch.equal(field > 0, expected)
    side = 2 * reach + 1
    assert high_contribution_ratio(field, 1.0) == pytest.approx(side**2 / field.numel())


def test_a_global_average_sees_all_alike() -> None:
    torch.manual_seed(0)
    model = Stack(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 8, 1))
    nn.init.uniform_(model[1].weight, 0.1, 1)
    field = receptive_field(model, [torch.rand(3, 31, 31)])
    torch.testing.assert_close(field, field[0, 0].expand(31, 31))
    assert field[0, 0] > 0
    for share in SHARES:
        side = next(side for side in range(1, 33, 2) if side**2 >= share * 31**2 - 1e-3)
        assert high_contribution_ratio(field, share) == pytest.approx(side**2 / 31**2)


def test_the_scan_reaches_every_pixel() -> None:
    model = VMamba(num_classes=0, depths=(1, 1), dims=(8, 16)).train()
    field = receptive_field(model, [torch.randn(3, 48, 32) for _ in range(3)])
    assert field.shape == (48, 32)
    assert (field > 0).float().mean() > 0.95
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_nan_is_left_out_and_nothing_left_is_an_error() -> None:
    model = Convolution()
    good, bad = torch.ones(2, 8, 8), torch.full((2, 8, 8), float("nan"))
    nan = Convolution(float("nan"))
    torch.testing.assert_close(receptive_field(model, [good, bad]).isnan().any(), torch.tensor(False))
    for broken, images in ((model, []), (nan, [good])):
        with pytest.raises(ReceptiveFieldError, match="no image gave a map without NaN"):
            receptive_field(broken, images)
    with pytest.raises(ValueError, match="share: expected"):
        high_contribution_ratio(good[0], 0.0)


def test_the_picture(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    for columns in (None, 1, 2):
        draw({"a": torch.rand(8, 9), "b": torch.zeros(8, 9)}, tmp_path / "field.png", columns)
        assert (tmp_path / "field.png").read_bytes().startswith(b"\x89PNG")
