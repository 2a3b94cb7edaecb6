"""Metrics that torchmetrics does not have."""

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassCalibrationError

from vmamba.train.guard import NonFiniteError


class CalibrationError(MulticlassCalibrationError):
    """torchmetrics' expected calibration error, computed from logits.

    Raises:
        NonFiniteError: Logits are NaN or infinite.
    """

    def update(self, preds: Tensor, target: Tensor) -> None:
        probabilities = preds.softmax(1)  # torchmetrics mistakes logits in [0, 1] for probabilities
        if probabilities.isnan().any():
            raise NonFiniteError("the model's outputs are not finite; judge it with train.precision=32-true")
        # A confidence of exactly 1 would fall into a bin beyond the last.
        super().update(probabilities.clamp(max=1 - torch.finfo(probabilities.dtype).eps), target)
