"""The private interfaces of PyTorch in `vmamba._torch_private` do what the library takes them to do."""

import pytest
import torch
from torch.autograd import forward_ad

from vmamba import _torch_private

# --- vmamba.ops: the operator's own autograd kernel -------------------------------------------------------


pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script")  # PyTorch's own, in forward mode


@pytest.fixture
def doubling() -> tuple[torch._ops.OpOverload, list[tuple[str, bool]]]:
    """An operator with an autograd kernel, and what its kernels saw: which one, and `is_transformed`."""
    with torch.library._scoped_library("vmamba_test", "DEF") as library:
        library.define("doubling(Tensor x) -> Tensor")
        operator, seen = torch.ops.vmamba_test.doubling.default, []

        def above(keys, x):
            seen.append(("above", _torch_private.is_transformed((x, None))))
            if seen[-1][1]:
                return x * 2
            return _torch_private.call_below_autograd(operator, keys, (x,))

        def below(x):
            seen.append(("below", x.requires_grad))
            return x * 2

        library.impl("doubling", above, "Autograd", with_keyset=True)
        library.impl("doubling", below, "CompositeExplicitAutograd")
        yield operator, seen


def test_call_below_autograd(doubling) -> None:
    """The next kernel runs, once, and nothing in it is recorded for backward."""
    operator, seen = doubling
    y = operator(torch.ones(2, requires_grad=True))
    assert seen == [("above", False), ("below", True)]
    assert y.tolist() == [2, 2]
    assert not y.requires_grad


@pytest.mark.parametrize(
    ("transformed", "seen_by_autograd"),
    [
        (lambda f, x: torch.func.grad(lambda x: f(x).sum())(x), [True]),
        (lambda f, x: torch.func.vjp(f, x)[0], [True]),
        (lambda f, x: torch.func.jvp(f, (x,), (x,))[1], [True]),
        (lambda f, x: torch.vmap(torch.func.grad(lambda x: f(x).sum()))(x), [True]),
        (lambda f, x: f(x), [False]),
    ],
)
def test_is_transformed_by_torch_func(doubling, transformed, seen_by_autograd: list[bool]) -> None:
    operator, seen = doubling
    transformed(operator, torch.ones(2))
    assert [value for name, value in seen if name == "above"] == seen_by_autograd


def test_is_transformed_by_forward_mode() -> None:
    """By a tangent, and not by the level alone."""
    x = torch.ones(2)
    assert not _torch_private.is_transformed((x, None))
    with forward_ad.dual_level():
        assert not _torch_private.is_transformed((x, None))
        assert _torch_private.is_transformed((None, x, forward_ad.make_dual(x, x)))
    assert not _torch_private.is_transformed((x, None))
