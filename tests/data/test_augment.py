import pytest
from PIL import Image
from timm.data import create_transform

from vmamba.data.augment import skip_posterize_to_zero_bits


@pytest.mark.parametrize(
    "policy", ["rand-m10-n40", "rand-m0-n40", "rand-m10-n40-inc1", "v0", "original", "augmix-m5"]
)
def test_every_policy_runs_at_any_magnitude(policy: str) -> None:
    transform = skip_posterize_to_zero_bits(create_transform(16, is_training=True, auto_augment=policy))
    for _ in range(20):
        transform(Image.new("RGB", (20, 20), (10, 200, 90)))


def test_posterising_leaves_something() -> None:
    transform = create_transform(16, is_training=True, auto_augment="rand-m10-inc1")
    skip_posterize_to_zero_bits(transform)
    (operation,) = [op for op in transform.transforms[2].ops if op.name == "PosterizeIncreasing"]
    operation.prob = 1.0
    assert operation(Image.new("RGB", (2, 2), (10, 200, 90))).getpixel((0, 0)) == (0, 128, 0)


def test_without_a_policy() -> None:
    skip_posterize_to_zero_bits(create_transform(16, is_training=True))
