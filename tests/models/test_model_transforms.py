"""Transforms of PyTorch through a whole model give the right values, second derivatives among them."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

import vmamba
from vmamba import ops
from vmamba.nn import fused

pytestmark = [
    # PyTorch scripts its own decompositions at the first jvp.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated"),
    # Its average pooling is slow under vmap.
    pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented"),
]

SETTINGS = [
    {},
    {"gate": True, "d_state": 2, "mlp_ratio": 0.0, "stem": "patch", "downsample": "merge"},
    {"routes": "cascade"},
]
settings = pytest.mark.parametrize("settings", SETTINGS, ids=["default", "vanilla", "cascade"])


def build(settings: dict) -> nn.Module:
    model = vmamba.VMamba(num_classes=3, depths=(1, 1), dims=(8, 8), **settings)
    return model.double().eval()


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 12, 16, dtype=torch.float64)


def difference(model: nn.Module, x: Tensor, tangent: Tensor, step: float = 1e-6) -> Tensor:
    """The derivative along `tangent` by central differences."""
    with torch.no_grad():
        return (model(x + step * tangent) - model(x - step * tangent)) / (2 * step)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


@settings
def test_forward_mode(settings: dict) -> None:
    model, x, tangent = build(settings), images(), images()
    expected = difference(model, x, tangent)
    y, actual = torch.func.jvp(model, (x,), (tangent,))
    close(y, model(x))
    close(actual, expected)
    with forward_ad.dual_level():
        y, actual = forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent)))
    close(actual, expected)


@settings
def test_tangents_of_parameters(settings: dict) -> None:
    model, x = build(settings), images()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}

    def logits(values: dict[str, Tensor]) -> Tensor:
        return functional_call(model, values, (x,))

    _, actual = torch.func.jvp(logits, (parameters,), (tangents,))
    moved = [
        logits({name: p + sign * 1e-6 * tangents[name] for name, p in parameters.items()}) for sign in (1, -1)
    ]
    torch.testing.assert_close(actual, (moved[0] - moved[1]) / 2e-6, rtol=1e-4, atol=1e-6)


@settings
def test_per_sample_gradients(settings: dict) -> None:
    model, x = build(settings), images(3)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(model, values, (image[None],)).square().sum()

    actual = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i, image in enumerate(x):
        expected = torch.autograd.grad(model(image[None]).square().sum(), list(model.parameters()))
        one = torch.func.grad(loss)(parameters, image)
        for name, gradient in zip(parameters, expected, strict=True):
            close(actual[name][i], gradient)
            close(one[name], gradient)


@settings
def test_vmap_and_jacobians(settings: dict) -> None:
    model, x = build(settings), images()
    close(torch.vmap(lambda image: model(image[None])[0])(x), model(x))
    image = images(1).requires_grad_()
    logits = model(image)
    rows = [torch.autograd.grad(logits[0, i], image, retain_graph=True)[0] for i in range(3)]
    close(torch.func.jacrev(model)(image.detach())[0], torch.stack(rows))


@settings
def test_a_batch_of_gradients(settings: dict) -> None:
    model, image = build(settings), images(1).requires_grad_()
    logits = model(image)
    directions = torch.eye(3, dtype=torch.float64)[:, None]
    (actual,) = torch.autograd.grad(logits, image, directions, is_grads_batched=True, retain_graph=True)
    for gradient, direction in zip(actual, directions, strict=True):
        close(gradient, torch.autograd.grad(logits, image, direction, retain_graph=True)[0])


@settings
@pytest.mark.parametrize("enabled", [True, False])
def test_second_derivatives(settings: dict, enabled: bool) -> None:
    """The penalty on the gradient of the images, with respect to every parameter."""
    model, x = build(settings), images().requires_grad_()

    def penalty() -> Tensor:
        with fused(enabled), ops.use_backend("reference"):
            (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return gradient.square().sum()

    parameters = list(model.parameters())
    actual = torch.autograd.grad(penalty(), parameters)
    tangents = [torch.randn_like(p) for p in parameters]
    along = sum((g * t).sum() for g, t in zip(actual, tangents, strict=True))
    moved = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            for p, t in zip(parameters, tangents, strict=True):
                p.add_(t, alpha=step)
        moved.append(penalty().item())
    torch.testing.assert_close(along.item(), (moved[0] - moved[1]) / 2e-6, rtol=1e-3, atol=1e-5)
