"""Masks of objects: cut out of the image for training, pasted into it for prediction.

n objects or boxes, h height, w width, m side of a mask.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align


def mask_targets(masks: Tensor, boxes: Tensor, matches: Tensor, side: int) -> Tensor:
    """The part of an object's mask that lies in each box, scaled to a square; 1 where half of it is covered.

    Args:
        masks: Of the objects, (n, h, w), with 0 and 1.
        boxes: (k, 4); what lies outside the mask is cut off.
        matches: The object of each box, (k,).
        side: m.

    Returns:
        (k, m, m) in the boxes' type, with 0 and 1.
    """
    height, width = masks.shape[-2:]
    limits = boxes.new_tensor([width, height, width, height])
    boxes = torch.minimum(boxes.clamp(min=0), limits)
    if not len(boxes):
        return boxes.new_zeros(0, side, side)
    indices = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)
    matched = masks[matches].to(boxes.dtype)[:, None]
    regions = torch.cat([indices[:, None], boxes], dim=1)
    return (roi_align(matched, regions, side, aligned=True)[:, 0] >= 0.5).to(boxes.dtype)


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks of boxes as masks of the image, sampled bilinearly at the pixels' centres.

    Args:
        masks: Probabilities, (n, 1, m, m), each stretched over its box.
        boxes: (n, 4) in the image's pixels.
        size: (height, width) of the image.

    Returns:
        (n, 1, height, width) in float32, 0 further than one pixel outside the box.
    """
    height, width = size
    pasted = masks.new_zeros(len(masks), 1, height, width, dtype=torch.float32)
    corners = torch.cat([boxes[:, :2].floor() - 1, boxes[:, 2:].ceil() + 1], dim=1).int().tolist()
    for index, (x1, y1, x2, y2) in enumerate(corners):
        x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
        x = _places(x1, x2, boxes[index, 0], boxes[index, 2])
        y = _places(y1, y2, boxes[index, 1], boxes[index, 3])
        if not len(x) or not len(y):
            continue
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
        sampled = F.grid_sample(masks[index : index + 1].float(), grid[None], align_corners=False)
        pasted[index, 0, y1:y2, x1:x2] = sampled[0, 0]
    return pasted


def _places(start: int, end: int, low: Tensor, high: Tensor) -> Tensor:
    """Centres of the pixels from start to end, as places between −1 (low) and 1 (high)."""
    centres = torch.arange(start, max(start, end), device=low.device, dtype=torch.float32) + 0.5
    places = (centres - low) / (high - low) * 2 - 1
    return torch.where(places.isfinite(), places, 0)  # of a box without extent: the middle of its mask
