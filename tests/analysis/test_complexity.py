import pytest
import timm
import torch

from vmamba.analysis.complexity import count, feature_shapes, parse_size
from vmamba.errors import ModelError
from vmamba.models.factory import create_on_meta

AT_SIZE = {384: 14.27, 512: 25.38, 640: 39.65, 768: 57.09, 1024: 101.50}  # vmamba_tiny


@pytest.mark.parametrize("size", AT_SIZE)
def test_gmacs_of_tiny_at_larger_sizes(size: int) -> None:
    counts = count(create_on_meta("vmamba_tiny"), (3, size, size))
    assert counts.parameters == 30_705_832
    assert counts.macs / 1e9 == pytest.approx(AT_SIZE[size], rel=1e-3)


def test_the_for_loop_counting_is_the_papers_v0() -> None:
    assert count(create_on_meta("vanilla_vmamba_tiny"), (3, 224, 224)).macs_for_loop / 1e9 == pytest.approx(
        4.46, abs=5e-3
    )


@pytest.mark.parametrize(
    ("name", "gmacs"),
    [
        ("resnet50", 4.11),
        ("convnext_tiny", 4.46),
        ("deit_small_patch16_224", 4.61),
        ("swin_tiny_patch4_window7_224", 4.51),
        ("cait_xxs24_224", 2.53),  # hands parameters to its modules
    ],
)
def test_other_models_have_their_known_figures(name: str, gmacs: float) -> None:
    counts = count(create_on_meta(name), (3, 224, 224))
    assert counts.macs / 1e9 == pytest.approx(gmacs, rel=1e-2)
    assert counts.parameters == sum(p.numel() for p in timm.create_model(name).parameters())


def test_a_count_leaves_the_model_as_it_was() -> None:
    model = timm.create_model("vmamba_pico", num_classes=2)
    on_meta = count(create_on_meta("vmamba_pico", num_classes=2), (3, 33, 65))
    assert model.training
    assert count(model, (3, 33, 65)) == on_meta
    assert count(model.half(), (3, 33, 65)) == on_meta
    assert model.training
    assert not any(p.is_meta for p in model.parameters())
    assert torch.is_grad_enabled()


def test_feature_shapes() -> None:
    assert feature_shapes(create_on_meta("vmamba_pico"), (3, 33, 65)) == {
        "stages.0": (24, 17, 33),
        "stages.1": (48, 9, 17),
        "stages.2": (96, 5, 9),
        "stages.3": (192, 3, 5),
    }


def test_models_made_for_one_size_take_another() -> None:
    name = "swin_tiny_patch4_window7_224"
    twice = count(create_on_meta(name, (224, 448)), (3, 224, 448)).macs
    assert twice / 1e9 == pytest.approx(2 * 4.51, rel=1e-3)
    with pytest.raises(ModelError, match=r"does not take an input of \(3, 224, 448\): .*448.*224"):
        count(create_on_meta(name), (3, 224, 448))


def test_sizes() -> None:
    assert parse_size("384") == (384, 384)
    assert parse_size("512x2048") == (512, 2048)
    for text in ("", "a", "0", "1x2x3", "-4", "3.5"):
        with pytest.raises(ModelError, match="expected 384 or 512x2048"):
            parse_size(text)
    with pytest.raises(ModelError, match="unknown model 'vmamba_huge'"):
        create_on_meta("vmamba_huge")
    with pytest.raises(ModelError, match=r"does not take an input of \(4, 32, 32\)"):
        count(create_on_meta("vmamba_pico"), (4, 32, 32))
    with pytest.raises(ModelError, match="does not take an input"):
        count(create_on_meta("vmamba_pico"), (3, 10**9, 10**9))
