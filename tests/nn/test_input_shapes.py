import pytest
import torch
from torch import nn

from vmamba.nn import (
    SS2D,
    CascadeSS2D,
    ConvDownsample,
    ConvStem,
    MergeDownsample,
    PatchStem,
    VSSBlock,
    fused,
)

LAYERS = [
    lambda: SS2D(8),
    lambda: CascadeSS2D(8, ssm_conv=0),
    lambda: VSSBlock(8),
    lambda: VSSBlock(8, mlp_ratio=0, routes="cascade"),
    lambda: ConvDownsample(8, 16),
    lambda: MergeDownsample(8, 16),
    lambda: MergeDownsample(8, 16, stride=1),
]
WRONG = [
    ((2, 8, 5, 6), r"x\.permute\(0, 2, 3, 1\)"),
    ((8, 5, 6), r"for one image x\.permute\(1, 2, 0\)\.unsqueeze\(0\)"),
    ((5, 6, 8), r"for one image x\.unsqueeze\(0\), for sequences .* x\.unflatten\(1, \(h, w\)\)"),
    ((2, 5, 6, 7), r"\(2, 5, 6, 7\)$"),
    ((2, 8), r"\(2, 8\)$"),
    ((2, 3, 5, 6, 8), r"\(2, 3, 5, 6, 8\)$"),
]


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize(("shape", "hint"), WRONG, ids=lambda value: str(value))
@pytest.mark.parametrize("is_fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("grad", [True, False])
def test_a_layer_says_which_shape_it_takes(make, shape, hint: str, is_fused: bool, grad: bool) -> None:
    layer = make()
    with (
        fused(is_fused),
        torch.set_grad_enabled(grad),
        pytest.raises(ValueError, match=rf"^{type(layer).__name__}: expected \(b, h, w, 8\), got .*{hint}"),
    ):
        layer(torch.zeros(shape))


def test_with_checkpointing_and_by_keyword_too() -> None:
    block = VSSBlock(8)
    with pytest.raises(ValueError, match=r"^VSSBlock: expected .*x\.permute\(0, 2, 3, 1\)"):
        block(x=torch.zeros(2, 8, 5, 6))
    block.grad_checkpointing = True
    for is_fused in (True, False):
        with (
            fused(is_fused),
            pytest.raises(ValueError, match=r"^VSSBlock: expected .*x\.permute\(0, 2, 3, 1\)"),
        ):
            block(torch.zeros(2, 8, 5, 6))


@pytest.mark.parametrize("stem", [ConvStem, PatchStem])
@pytest.mark.parametrize(
    ("shape", "hint"),
    [
        ((2, 32, 32, 3), r"x\.permute\(0, 3, 1, 2\)"),
        ((3, 32, 32), r"for one image x\.unsqueeze\(0\)$"),
        ((32, 32, 3), r"for one image x\.permute\(2, 0, 1\)\.unsqueeze\(0\)"),
        ((2, 1, 32, 32), r"in_chans=…"),
    ],
    ids=str,
)
def test_a_stem_says_which_images_it_takes(stem: type[nn.Module], shape, hint: str) -> None:
    for grad in (True, False):
        with (
            torch.set_grad_enabled(grad),
            pytest.raises(ValueError, match=rf"^{stem.__name__}: expected \(b, 3, h, w\), got .*{hint}"),
        ):
            stem(3, 8)(torch.zeros(shape))


def test_another_error_stays_as_it_is() -> None:
    layer = SS2D(8)
    with pytest.raises(RuntimeError, match="type"):
        layer(torch.zeros(2, 5, 6, 8, dtype=torch.int64))
    layer.in_proj.register_forward_hook(lambda *_: (_ for _ in ()).throw(ValueError("the hook's")))
    with pytest.raises(ValueError, match=r"^the hook's$"):
        layer(torch.zeros(2, 5, 6, 8))
