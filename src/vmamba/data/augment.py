"""Repairs of timm's augmentation, so that it runs with every version of Pillow."""

from typing import Any

from PIL import Image, ImageOps


def skip_posterize_to_zero_bits(transform: Any) -> Any:
    """Make the posterising of timm's policies leave at least one bit of each channel.

    At the greatest magnitude timm asks for zero bits, with the paper's policy in one image of 650. Older
    Pillow made such an image black; newer Pillow raises.

    Args:
        transform: From `timm.data.create_transform`; changed in place and returned.
    """
    for step in transform.transforms:
        policy = getattr(step, "policy", [getattr(step, "ops", [])])  # AutoAugment's, else RandAugment's
        for operation in (operation for operations in policy for operation in operations):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    return ImageOps.posterize(image, min(max(bits, 1), 8))
