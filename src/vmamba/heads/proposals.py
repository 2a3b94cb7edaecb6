"""The region proposal network: which places of the image may hold an object."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection import rpn
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image

from vmamba.heads.boxes import BoxCoder, Matcher, PyramidAnchors

PADDED_SIZE = "padded_size"
"""Key of a target with the (height, width) to which its image alone would have been padded."""


class ProposalNetwork(rpn.RegionProposalNetwork):
    """torchvision's with mmdet's anchors, matching, loss and order of proposals.

    Args:
        channels: Of the pyramid.
        proposals: At most so many are kept of an image.
    """

    def __init__(self, channels: int, proposals: int) -> None:
        anchors = PyramidAnchors()
        super().__init__(
            anchors,
            rpn.RPNHead(channels, anchors.num_anchors_per_location()[0]),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2000, "testing": 1000},
            post_nms_top_n={"training": proposals, "testing": proposals},
            nms_thresh=0.7,
        )
        self.box_coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
        self.proposal_matcher = Matcher(high=0.7, low=0.3, best=0.3)

    def filter_proposals(
        self,
        proposals: Tensor,
        objectness: Tensor,
        image_shapes: Sequence[tuple[int, int]],
        num_anchors_per_level: Sequence[int],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The best boxes of each image after suppression within each level, and their scores.

        Args:
            proposals: (b, n, 4), of all levels one after the other.
            objectness: Logits, b·n of them in any shape.
            image_shapes: (height, width) of each image without padding.
            num_anchors_per_level: Their sum is n.
        """
        scores = objectness.detach().reshape(len(proposals), -1).float().sigmoid()
        kept_by_image = [
            self._best(*each, num_anchors_per_level)
            for each in zip(proposals, scores, image_shapes, strict=True)
        ]
        return [boxes for boxes, _ in kept_by_image], [image_scores for _, image_scores in kept_by_image]

    def _best(
        self, boxes: Tensor, scores: Tensor, size: tuple[int, int], counts: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        # A stable sort: of equal (saturated) scores the first position is kept, on any device.
        ranked = [level.sort(descending=True, stable=True) for level in scores.split(list(counts))]
        starts = [sum(counts[:level]) for level in range(len(counts))]
        count = self.pre_nms_top_n()
        kept = torch.cat([order[:count] + start for (_, order), start in zip(ranked, starts, strict=True)])
        levels = torch.cat([torch.full_like(order[:count], level) for level, (_, order) in enumerate(ranked)])
        boxes, scores = clip_boxes_to_image(boxes[kept], size), scores[kept]
        valid = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        boxes, scores, levels = boxes[valid], scores[valid], levels[valid]
        best = batched_nms(boxes, scores, levels, self.nms_thresh)[: self.post_nms_top_n()]
        return boxes[best], scores[best]

    def assign_targets_to_anchors(
        self, anchors: Sequence[Tensor], targets: Sequence[Mapping[str, Any]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """For each anchor 1 (object), 0 (background) or −1 (ignored), and the box of its object.

        Ignored are also anchors that lie where only other images of the batch reach, so that an image is
        learnt from the same anchors whatever is beside it.
        """
        labels, boxes = [], []
        for image_anchors, target in zip(anchors, targets, strict=True):
            objects = target["boxes"]
            if not len(objects):
                image_labels, image_boxes = image_anchors.new_zeros(len(image_anchors)), image_anchors
            else:
                matches = self.proposal_matcher(box_iou(objects, image_anchors))
                image_boxes = objects[matches.clamp(min=0)]
                image_labels = (matches >= 0).float()
                image_labels[matches == Matcher.BETWEEN_THRESHOLDS] = -1
            height, width = target[PADDED_SIZE]
            centres = (image_anchors[:, :2] + image_anchors[:, 2:]) / 2
            # Centres are whole multiples of the stride, up to rounding.
            outside = (centres > centres.new_tensor([width - 0.5, height - 0.5])).any(dim=1)
            image_labels[outside] = -1
            labels.append(image_labels)
            boxes.append(image_boxes)
        return labels, boxes

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: Sequence[Tensor],
        regression_targets: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """The losses of 256 sampled anchors of each image: cross-entropy, and L1 of the boxes."""
        samples = self.fg_bg_sampler(labels)
        # mmdet counts at least one positive and one negative anchor of each image.
        count = sum(max(int(mask.sum()), 1) for masks in samples for mask in masks)
        positive, negative = (torch.cat(masks).bool() for masks in samples)
        sampled = positive | negative
        box_loss = F.l1_loss(
            pred_bbox_deltas[positive], torch.cat(list(regression_targets))[positive], reduction="sum"
        )
        objectness_loss = F.binary_cross_entropy_with_logits(
            objectness.flatten()[sampled], torch.cat(list(labels))[sampled], reduction="sum"
        )
        return objectness_loss / count, box_loss / count
