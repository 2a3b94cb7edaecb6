"""Class, box and mask of each proposed region.

n regions, k classes with the background (0), m side of a mask.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, roi_align

from vmamba.heads.boxes import STRIDES, BoxCoder, Matcher
from vmamba.heads.masks import mask_targets

Target = Mapping[str, Tensor]


class RegionFeatures(nn.Module):
    """Cuts regions out of the pyramid levels that suit their sizes, by aligned adaptive RoIAlign.

    torchvision's `MultiScaleRoIAlign` has no aligned form, and guesses the levels' scales from their sizes.

    Args:
        side: Of the cut squares, in positions.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(
        self, features: Mapping[str, Tensor], boxes: Sequence[Tensor], image_shapes: object = None
    ) -> Tensor:
        """Squares (n, c, side, side) of all images' boxes.

        Args:
            features: Pyramid levels from the finest on; those beyond the fourth are not used.
            boxes: (n, 4) of each image.
            image_shapes: Not used; torchvision's callers give it.
        """
        levels = list(features.values())[:4]
        all_boxes = torch.cat(list(boxes))
        images = [torch.full_like(each[:, :1], index) for index, each in enumerate(boxes)]
        regions = torch.cat([torch.cat(images), all_boxes], dim=1)
        level_of = region_levels(all_boxes)
        # In half precision a place in a large image would be off by a pixel.
        dtype = torch.promote_types(levels[0].dtype, regions.dtype)
        regions = regions.to(dtype)
        result = levels[0].new_zeros(len(regions), levels[0].shape[1], self.side, self.side)
        for index, (level, stride) in enumerate(zip(levels, STRIDES[:4], strict=True)):
            of_level = (level_of == index).nonzero()[:, 0]
            squares = roi_align(level.to(dtype), regions[of_level], self.side, 1 / stride, aligned=True)
            result = result.index_copy(0, of_level, squares.to(result.dtype))
        return result

    def extra_repr(self) -> str:
        return f"side={self.side}"


def region_levels(boxes: Tensor) -> Tensor:
    """The pyramid level, 0 … 3, of each box: those 56 pixels wide and smaller go to the first two."""
    widths, heights = (boxes[:, 2:] - boxes[:, :2]).float().unbind(1)
    return ((widths * heights).sqrt() / 56 + 1e-6).log2().floor().clamp(0, 3).long()


class RegionHeads(RoIHeads):
    """torchvision's with mmdet's matching, losses and mask targets; losses keep torchvision's names.

    Args:
        heads: The modules `box_head`, `box_predictor`, `mask_head` and `mask_predictor`.
        score_threshold: Detections of a lower probability are dropped.
        detections: At most so many are kept of an image.
        samples: Regions of an image that training draws, at most a quarter of them on objects.
    """

    def __init__(
        self, heads: Mapping[str, nn.Module], score_threshold: float, detections: int, samples: int
    ) -> None:
        super().__init__(
            box_roi_pool=RegionFeatures(7),
            mask_roi_pool=RegionFeatures(14),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=samples,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=score_threshold,
            nms_thresh=0.5,
            detections_per_img=detections,
            **heads,
        )
        self.box_coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
        self.proposal_matcher = Matcher(high=0.5, low=0.5, best=0.5)

    def assign_targets_to_proposals(
        self, proposals: Sequence[Tensor], gt_boxes: Sequence[Tensor], gt_labels: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The object of each proposal, and its class (0: background).

        The last proposals are the objects' boxes themselves; each belongs to its object, even where several
        objects have the same box.
        """
        matches, labels = [], []
        for boxes, objects, classes in zip(proposals, gt_boxes, gt_labels, strict=True):
            if not len(objects):
                matches.append(torch.zeros(len(boxes), dtype=torch.long, device=boxes.device))
                labels.append(torch.zeros_like(matches[-1]))
                continue
            proposed = self.proposal_matcher(box_iou(objects, boxes[: len(boxes) - len(objects)]))
            matched = torch.cat([proposed, torch.arange(len(objects), device=boxes.device)])
            matches.append(matched.clamp(min=0))
            labels.append(torch.where(matched >= 0, classes[matches[-1]], 0))
        return matches, labels

    def postprocess_detections(
        self,
        class_logits: Tensor,
        box_regression: Tensor,
        proposals: Sequence[Tensor],
        image_shapes: Sequence[tuple[int, int]],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Boxes, scores and labels of each image after suppression within each class.

        Unlike torchvision's, keeps boxes without extent, such as those clipped at the border.
        """
        counts = [len(each) for each in proposals]
        boxes = self.box_coder.decode(box_regression, proposals)
        scores = class_logits.float().softmax(dim=1)
        results: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        for image_boxes, image_scores, size in zip(
            boxes.split(counts), scores.split(counts), image_shapes, strict=True
        ):
            region, label = (image_scores[:, 1:] > self.score_thresh).nonzero(as_tuple=True)
            label = label + 1
            detected = clip_boxes_to_image(image_boxes[region, label], size)
            score = image_scores[region, label]
            kept = batched_nms(detected, score, label, self.nms_thresh)[: self.detections_per_img]
            for result, values in zip(results, (detected, score, label), strict=True):
                result.append(values[kept])
        return results

    def forward(
        self,
        features: Mapping[str, Tensor],
        proposals: Sequence[Tensor],
        image_shapes: Sequence[tuple[int, int]],
        targets: Sequence[Target] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections in evaluation mode, losses in training mode; the other is empty.

        Args:
            features: Pyramid levels from the finest on.
            proposals: (n, 4) of each image.
            image_shapes: (height, width) of each image without padding.
            targets: Of each image, in training mode.
        """
        if self.training:
            return [], self._losses(features, proposals, targets)
        boxes, scores, labels = self.postprocess_detections(
            *self._boxes(features, proposals), proposals, image_shapes
        )
        logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes)))
        classes = torch.cat(labels)
        masks = logits[torch.arange(len(classes), device=classes.device), classes][:, None].sigmoid()
        keys = ("boxes", "labels", "scores", "masks")
        of_images = zip(boxes, labels, scores, masks.split([len(each) for each in boxes]), strict=True)
        return [dict(zip(keys, values, strict=True)) for values in of_images], {}

    def _boxes(self, features: Mapping[str, Tensor], proposals: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (n, k) and boxes' differences (n, 4·k)."""
        logits, differences = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals)))
        return logits, differences

    def _losses(
        self, features: Mapping[str, Tensor], proposals: Sequence[Tensor], targets: Sequence[Target] | None
    ) -> dict[str, Tensor]:
        # As lists: torchvision replaces the entries.
        proposals, matches, labels, box_targets = self.select_training_samples(list(proposals), targets)
        classes = torch.cat(labels)
        logits, differences = self._boxes(features, proposals)
        count = max(len(classes), 1)
        objects = classes.nonzero()[:, 0]
        predicted = differences.reshape(len(classes), -1, 4)[objects, classes[objects]]
        box_loss = F.l1_loss(predicted, torch.cat(list(box_targets))[objects], reduction="sum")
        losses = {
            "loss_classifier": F.cross_entropy(logits, classes, reduction="sum") / count,
            "loss_box_reg": box_loss / count,
        }
        positive = [each > 0 for each in labels]
        boxes = [each[mask] for each, mask in zip(proposals, positive, strict=True)]
        masks = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes)))
        masks = masks[torch.arange(len(objects), device=objects.device), classes[objects]]
        expected = [
            mask_targets(target["masks"], image_boxes, match[mask], masks.shape[-1])
            for target, image_boxes, match, mask in zip(targets or (), boxes, matches, positive, strict=True)
        ]
        loss = F.binary_cross_entropy_with_logits(masks, torch.cat(expected), reduction="sum")
        return {**losses, "loss_mask": loss / max(masks.numel(), 1)}
