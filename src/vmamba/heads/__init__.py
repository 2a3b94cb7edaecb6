"""Detection and segmentation heads on any backbone with feature maps at strides 4, 8, 16 and 32."""

from vmamba.heads.mask_rcnn import FixedRegions, MaskRCNN, MaskRCNNConfig, mask_rcnn
from vmamba.heads.names import from_mmdet, to_mmdet

__all__ = ["FixedRegions", "MaskRCNN", "MaskRCNNConfig", "from_mmdet", "mask_rcnn", "to_mmdet"]
