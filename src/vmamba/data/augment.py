"""What timm's augmentation needs to run with every Pillow."""

from typing import Any

from PIL import Image, ImageOps


def keep_a_bit(transform: Any) -> Any:
    """Let the posterising of timm's policies leave at least one bit a channel.

    At the greatest magnitude they ask for none, as for one image in 650 with the paper's policy: Pillow made
    it black once, and raises today.

    Args:
        transform: From `timm.data.create_transform`; it is changed, and returned.
    """
    for part in transform.transforms:
        policy = getattr(part, "policy", [getattr(part, "ops", [])])  # AutoAugment's, else RandAugment's
        for operation in (operation for operations in policy for operation in operations):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    return ImageOps.posterize(image, min(max(bits, 1), 8))
