"""No non-finite value where the mathematics has none: short runs, extreme operands (docs/stability.md)."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from scans import BACKENDS, FAST, assert_accurate, given, operands
from vmamba import VMamba
from vmamba.nn import SS2D
from vmamba.ops import selective_scan_2d, use_backend
from vmamba.ops.triton import interpreted

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import stability

LARGEST_LOG = 88.7  # of A_log: e^88.73 is beyond float32


@pytest.mark.parametrize("routes", stability.ROUTES)
@pytest.mark.parametrize("precision", stability.PRECISIONS)
def test_trains_in_the_precision_claimed(precision: str, routes: str) -> None:
    draw = np.random.default_rng(0)
    images, labels = draw.integers(256, size=(16, 8, 8, 3), dtype=np.uint8), draw.integers(3, size=16)
    model = VMamba(num_classes=3, depths=(1, 1), dims=(8, 16), stem_stride=2, routes=routes)
    actual = stability.train(model, images, labels, precision, steps=5, batch=4)
    assert {actual["types"][f"operand {name}"] for name in ("x", "delta", "B", "C")} == {precision}
    assert actual["types"]["y"] == "float32"
    assert actual["extremes"]["delta"][0] > 0


def test_another_precision_than_claimed_is_told() -> None:
    model = VMamba(num_classes=3, depths=(1,), dims=(8,), stem_stride=2)
    check = stability.watching_scans(model, stability.ScanChecker(torch.float16))
    with check, pytest.raises(TypeError, match="x enters the scan in torch"):
        model(torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize("name", ["the loss", "gradient", "scan"])
def test_a_non_finite_value_is_told(name: str) -> None:
    images, labels = np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4, np.int64)
    model = VMamba(num_classes=3, depths=(1,), dims=(8,), stem_stride=2)
    if name == "the loss":
        model.head.fc.bias.data.fill_(float("nan"))
    elif name == "scan":
        next(m for m in model.modules() if isinstance(m, SS2D)).D.data.fill_(float("inf"))
    else:
        model.head.fc.bias.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(FloatingPointError, match=name):
        stability.train(model, images, labels, "float32", steps=1, batch=2)


def extreme(side: int, routes: str | tuple[str, ...]) -> dict:
    """A channel each for A_log of -80, 0 and 80 with a bias of delta of -50, 0 and 50; values up to 1e4."""
    logs, biases = torch.cartesian_prod(torch.tensor([-80.0, 0.0, 80.0]), torch.tensor([-50.0, 0.0, 50.0])).T
    call = operands(1, side, side, 9, 1, 2, routes=routes, dtype=torch.float32)
    n_routes = call["A"].shape[0]
    call["x"] = (4e3 * call["x"]).detach().clamp(-1e4, 1e4).requires_grad_()
    call["A"] = (-logs.exp()).repeat(n_routes, 1)[..., None].requires_grad_()
    call["delta_bias"] = biases.repeat(n_routes, 1).requires_grad_()
    return call


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("routes", ["cross", "bidirectional"])
def test_extreme_values(backend: str, routes: str) -> None:
    call = extreme(16 if backend == "reference" or interpreted() else 64, routes)
    y = selective_scan_2d(**call, backend=backend)
    assert y.isfinite().all()
    y.mean().backward()
    assert all(t.grad.isfinite().all() for t in given(call).values())
    gradient_of_log = call["A"].grad * call["A"]
    assert gradient_of_log.isfinite().all()


@pytest.mark.parametrize("backend", FAST)
def test_extreme_values_are_exact(backend: str) -> None:
    assert_accurate(extreme(8, "bidirectional"), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("routes", ["cross", "bidirectional"])
def test_extreme_parameters_of_a_layer(backend: str, routes: str) -> None:
    layer = SS2D(8, d_state=2, routes=routes)
    with torch.no_grad():
        layer.A_log.copy_(torch.linspace(-80, LARGEST_LOG, layer.A_log.numel()).view_as(layer.A_log))
        layer.dt_bias.copy_(torch.linspace(-50, 50, layer.dt_bias.numel()).view_as(layer.dt_bias))
    x = torch.full((1, 8, 8, 8), 1e4).requires_grad_()
    with use_backend(backend):
        y = layer(x)
        y.mean().backward()
    assert y.isfinite().all()
    assert all(t.grad.isfinite().all() for t in (x, *layer.parameters()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_norms_before_it_rounds_to_half(backend: str) -> None:
    """What a scan of float16 operands gives may be beyond float16, as it is in real training."""
    layer, x = SS2D(8), torch.randn(2, 4, 4, 8, requires_grad=True)
    with torch.no_grad():
        layer.D.fill_(1e8)
    with use_backend(backend), torch.autocast("cpu", torch.float16):
        inputs = layer.project(x)[:4]
        assert inputs[0].dtype == torch.float16
        assert layer.scan(*inputs).half().isinf().any()
        y = layer(x)
        assert y.dtype == torch.float16
    assert y.isfinite().all()
    y.mean().backward()
    assert all(t.grad.isfinite().all() for t in (x, *layer.parameters()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_dividing_by_cumulated_decays_fails(backend: str) -> None:
    """h_t = w_t Σ_s≤t δ_s B_s x_s / w_s, w the product of the decays: 1 / w ends after 887 steps of 0.1."""
    call = operands(1, 1, 1200, 2, 1, None, routes=("row",), dtype=torch.float32, requires_grad=False)
    call |= {"delta": torch.full_like(call["delta"], 0.1), "delta_bias": None, "D": None}
    call |= {"A": torch.full_like(call["A"], -1.0), "B": call["B"].abs() + 0.1, "C": call["C"].abs() + 0.1}
    delta, B, C = (call[name][0, 0, :, 0] for name in ("delta", "B", "C"))
    product = torch.exp(-delta).cumprod(0)
    naive = C * product * (delta * B * call["x"][0, 0] / product).cumsum(0)
    assert not naive[1100:].isfinite().any()
    actual = selective_scan_2d(**call, delta_softplus=False, backend=backend)
    true = selective_scan_2d(
        **{n: t.double() if isinstance(t, torch.Tensor) else t for n, t in call.items()},
        delta_softplus=False,
        backend="reference",
    )
    torch.testing.assert_close(actual.double(), true, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_float32_ends(backend: str) -> None:
    """e^A_log beyond float32 is A = -inf: the state is forgotten at once, and gradients are NaN."""
    call = operands(1, 4, 4, 2, 1, 2, dtype=torch.float32)
    log = torch.full_like(call["A"], 90.0).detach().requires_grad_()
    call["A"] = -log.exp()
    y = selective_scan_2d(**call, backend=backend)
    assert y.isfinite().all()
    y.sum().backward()
    assert log.grad.isnan().all()


def test_no_step_along_an_infinite_decay_is_nan() -> None:
    """exp(δ A) with δ = 0 and A = -inf."""
    call = operands(1, 4, 4, 2, 1, 2, dtype=torch.float32, requires_grad=False)
    call |= {"A": call["A"] * float("inf"), "delta_bias": call["delta_bias"] - 200}
    assert selective_scan_2d(**call, backend="reference").isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_beyond_half_precision_is_infinite(backend: str) -> None:
    """A gradient is rounded to its operand's type: what a scaled loss has a scaler for."""
    call = operands(1, 4, 4, 2, 1, 2, dtype=torch.float16)
    selective_scan_2d(**call, backend=backend, out_dtype=torch.float32).sum().mul(1e6).backward()
    assert call["x"].grad.isinf().any()
