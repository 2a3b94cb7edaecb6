"""Sizes of resized images."""


def scaled_size(size: tuple[int, int], short: float, long: float) -> tuple[int, int]:
    """The largest size of an image, enlarged or reduced, with sides of at most `short` and `long`.

    It is rounded as mmdet rounds.

    Args:
        size: Height and width.
        short: Of the shorter side.
        long: Of the longer side.
    """
    scale = min(short / min(size), long / max(size))
    height, width = (max(int(side * scale + 0.5), 1) for side in size)
    return height, width
