"""S4ND: its counts, its convolution against the recurrence written out, and timm's contract."""

from functools import partial
from math import log2, prod
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from vmamba.analysis.complexity import count
from vmamba.errors import ModelError
from vmamba.models.factory import create_on_meta
from vmamba.models.peers.s4nd import S4ND, Kernel, S4NDMixer, S4NDStem


@pytest.mark.parametrize(
    ("name", "millions", "gmacs"), [("s4nd_convnext_tiny", 30.007, 4.971), ("s4nd_vit_base", 91.157, 17.349)]
)
def test_the_counts(name: str, millions: float, gmacs: float) -> None:
    """Parameters as published, to 1 %; multiply-adds as `complexity` counts Fourier transforms."""
    counts = count(create_on_meta(name), (3, 224, 224))
    assert counts.parameters / 1e6 == pytest.approx(millions, rel=0.01)
    assert counts.macs / 1e9 == pytest.approx(gmacs, rel=0.001)


@pytest.mark.parametrize(
    ("name", "quoted", "within"), [("s4nd_convnext_tiny", 5.162, 0.003), ("s4nd_vit_base", 17.069, 0.022)]
)
def test_the_quoted_multiply_adds(
    name: str, quoted: float, within: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VMamba's authors count a transform's input before padding, times log₂ of each side, times 4 if complex.

    Of ViT-B 2 % stay unexplained.
    """
    counted = []

    def transform(dims: int, dtype: torch.dtype, x: Tensor, n: Any = None) -> Tensor:
        """The shape alone: nothing that `count` would count too."""
        sides = x.shape[-dims:]
        counted.append(prod(x.shape) * prod(map(log2, sides)) * (4 if x.is_complex() else 1))
        size = list(sides) if n is None else [n] if dims == 1 else list(n)
        return torch.empty(*x.shape[:-dims], *size, dtype=dtype, device=x.device)

    def half(dims: int, x: Tensor, n: Any = None) -> Tensor:
        whole = transform(dims, torch.complex64, x, n)
        return whole[..., : whole.shape[-1] // 2 + 1]

    monkeypatch.setattr(torch.fft, "fft", partial(transform, 1, torch.complex64))
    monkeypatch.setattr(torch.fft, "rfft", partial(half, 1))
    monkeypatch.setattr(torch.fft, "rfft2", partial(half, 2))
    monkeypatch.setattr(torch.fft, "irfft2", partial(transform, 2, torch.float32))
    macs = count(create_on_meta(name), (3, 224, 224)).macs
    assert (macs + sum(counted)) / 1e9 == pytest.approx(quoted, rel=within)


def test_a_fourier_transform_counts_by_its_points() -> None:
    class Transform(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.ifft(torch.fft.fft(torch.fft.irfft2(torch.fft.rfft2(x)).to(torch.complex64)))

    counts = count(Transform(), (3, 8, 16))
    assert counts.macs == 3 * 128 * (2 * 2.5 * 7 + 2 * 5 * 4)


def states(kernel: Kernel, u: Tensor) -> Tensor:
    """h_t = exp(ΔA) h_{t-1} + u_t, y_t = 2 Re Σ C h_t, step by step: (c, l) → (k, c, l)."""
    exponent, drive = kernel.discrete()
    h, ys = torch.zeros_like(exponent), []
    for t in range(u.shape[1]):
        h = exponent.exp() * h + u[:, t, None]
        ys.append(2 * (drive * h).sum(2).real)
    return torch.stack(ys, 2)


def test_an_image_of_other_channels_is_refused() -> None:
    """Gray ones would broadcast."""
    model = timm.create_model("s4nd_convnext_tiny", num_classes=3, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    for channels in (1, 2):
        with pytest.raises(ValueError, match=f"expected 3 channels, got {channels}"):
            model(torch.zeros(1, channels, 32, 32))


def test_an_image_that_patches_do_not_cover_is_refused() -> None:
    with pytest.raises(ModelError, match="img_size: expected multiples of 16x16, got 40x32"):
        create_on_meta("s4nd_vit_base", img_size=(40, 32), depth=1)


def test_the_discrete_system_is_the_continuous_one() -> None:
    """exp(ΔA), and B's integral over a step, by solving for a constant input in small steps."""
    kernel = Kernel(2, 1, (0.1, 1.0)).double()
    exponent, drive = kernel.discrete()
    A = torch.complex(-kernel.log_A_real.exp(), kernel.A_imag)
    dt, steps = kernel.log_dt.exp(), 20_000
    h = torch.zeros_like(exponent)
    for _ in range(steps // 10):  # trapezoidal rule, ten thousandths of a step at a time
        small = dt[:, None] / (steps // 10)
        h = ((1 + small * A / 2) * h + small) / (1 - small * A / 2)
    C = torch.complex(kernel.C[..., 0], kernel.C[..., 1])
    torch.testing.assert_close(C * h, drive, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(exponent, dt[:, None] * A)


def test_a_kernel_is_the_recurrence() -> None:
    kernel = Kernel(3, 2, (0.1, 1.0)).double()
    impulse = torch.zeros(3, 9, dtype=torch.float64)
    impulse[:, 0] = 1
    torch.testing.assert_close(kernel(9), states(kernel, impulse))


@pytest.mark.parametrize("size", [(4, 5), (1, 3), (7, 1)], ids=str)
@pytest.mark.parametrize("channels", [1, 2])
def test_the_convolution_is_the_recurrence(size: tuple[int, int], channels: int) -> None:
    """Along each column, from above and below, then along each row: value and every gradient."""
    layer = S4ND(3, channels).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)

    def along(kernel: Kernel, lines: Tensor, k: int) -> Tensor:
        """(lines, c, l), both ways; the second direction begins one position later."""
        ys = []
        for line in lines:
            after = states(kernel, line)[k]
            before = states(kernel, line.flip(1))[channels + k].flip(1)
            before = torch.cat((before[:, 1:], torch.zeros_like(before[:, :1])), 1)
            ys.append(after + before)
        return torch.stack(ys)

    outputs = []
    for k in range(channels):
        columns = x.permute(0, 3, 1, 2)  # (b, w, c, h)
        y = along(layer.column, columns.flatten(0, 1), k).unflatten(0, columns.shape[:2])
        rows = y.permute(0, 3, 2, 1)  # (b, h, c, w)
        y = along(layer.row, rows.flatten(0, 1), k).unflatten(0, rows.shape[:2]).transpose(1, 2)
        outputs.append(y + layer.D[k, :, None, None] * x)
    results = [layer(x), torch.cat(outputs, 1)]
    torch.testing.assert_close(*results)
    inputs = [x, *layer.parameters()]
    gradients = [torch.autograd.grad(y.square().sum(), inputs) for y in results]
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


def test_a_short_kernel_ends() -> None:
    layer = S4ND(2, out_channels=3, longest=2).double()
    x = torch.zeros(1, 2, 9, 9, dtype=torch.float64)
    x[:, :, 4, 4] = 1
    reached = (layer(x).abs() > 1e-12).any(1)[0]
    expected = torch.zeros(9, 9, dtype=torch.bool)
    expected[2:6, 2:6] = True  # lags -2, -1, 0, 1
    assert torch.equal(reached, expected)


def test_half_precision_keeps_its_type() -> None:
    layer = S4ND(4).bfloat16()
    x = torch.randn(1, 4, 5, 5, dtype=torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    expected = layer.float()(x.float())
    torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


def test_timms_contract() -> None:
    settings = {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 24), "num_classes": 5}
    model = timm.create_model("s4nd_convnext_tiny", **settings)
    assert model(torch.randn(2, 3, 64, 48)).shape == (2, 5)
    assert isinstance(model.stem, S4NDStem)
    assert {type(block.conv_dw) for stage in model.stages for block in stage.blocks} == {S4ND}
    assert "stages.1.blocks.0.conv_dw.row.log_dt" in model.no_weight_decay()
    assert "stages.1.blocks.0.mlp.fc1.weight" not in model.no_weight_decay()
    features = timm.create_model("s4nd_convnext_tiny", features_only=True, **settings)
    assert [each.shape[1:] for each in features(torch.randn(1, 3, 64, 64))] == [
        (8, 16, 16),
        (16, 8, 8),
        (16, 4, 4),
        (24, 2, 2),
    ]
    vit = timm.create_model("s4nd_vit_base", img_size=(32, 48), embed_dim=24, depth=2, num_heads=2)
    assert vit(torch.randn(1, 3, 32, 48)).shape == (1, 1000)
    assert all(isinstance(block.attn, S4NDMixer) for block in vit.blocks)
    with pytest.raises(AssertionError, match="doesn't match model"):
        vit(torch.randn(1, 3, 48, 48))
