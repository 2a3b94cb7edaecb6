import numpy as np
import pytest
import torch

from vmamba.data.contact_sheet import picture


@pytest.mark.parametrize(("channels", "shape"), [(1, (2, 3)), (2, (2, 3)), (3, (2, 3, 3)), (4, (2, 3, 3))])
def test_a_tensor_as_a_picture(channels: int, shape: tuple[int, ...]) -> None:
    """Each value becomes the nearest of the 256 grays: 0.999 is white."""
    grays = torch.arange(channels * 6).view(channels, 2, 3) * 10
    pixels = np.asarray(picture(grays / 255))
    assert pixels.shape == shape
    shown = grays[:3] if channels >= 3 else grays[0]
    np.testing.assert_array_equal(pixels, shown.permute(1, 2, 0) if channels >= 3 else shown)
    assert np.asarray(picture(torch.full((1, 1, 1), 0.999))).item() == 255
