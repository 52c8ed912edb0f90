# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What the detector is trained to make small: one number for each image, from its logits and its map.

All of them leave out pixels whose label is negative, and none looks beyond its image: an image weighs the same whatever is in its
batch. (The decode head's batch norm does look at the whole batch while it is trained.)
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .modeling_artifact_detector import squared_error


__all__ = ["LOSSES", "confidence_error", "cross_entropy_with_dice"]

DICE_WEIGHT = 0.2
# Share of an image's pixels. A region of certain pixels needs to be much larger than that to get the whole weight of the Dice term;
# what is left of a detector's own labels where nothing is (1/255 everywhere) gets none of it.
DICE_SMOOTHING = 1e-4


def confidence_error(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the confidence, `L_AD` of DiffDoctor (arXiv 2501.12382, equation 1).

    Args:
        logits: (B, 1, H, W).
        labels: (B, 1, H, W) in [0, 1], negative where a pixel does not count.

    Returns:
        (B,) in [0, 1], 0 for an image of which no pixel counts.
    """
    return squared_error(logits.sigmoid(), labels)


def cross_entropy_with_dice(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the pixels plus 0.2 times the Dice loss of the image.

    The Dice loss is that of V-Net (arXiv 1606.04797, section 3), `1 - 2 sum(c t) / (sum(c^2) + sum(t^2))`, of confidences c and
    labels t. With squares in the denominator it is smallest at `c = t` for soft labels too; the common form without them pulls soft
    labels to 0 or 1. Sums are means over the image, and 1e-4 is added above and below, so that an image without artifacts has a
    loss as well.

    Args:
        logits: (B, 1, H, W).
        labels: (B, 1, H, W) in [0, 1], negative where a pixel does not count.

    Returns:
        (B,), 0 for an image of which no pixel counts.
    """
    counted = (labels >= 0).to(logits.dtype)
    pixels = counted.flatten(1).sum(dim=1).clamp(min=1)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return (values * counted).flatten(1).sum(dim=1) / pixels

    truth, confidence = labels.clamp(min=0), logits.sigmoid()
    entropy = mean(F.binary_cross_entropy_with_logits(logits, truth, reduction="none"))
    overlap = 2 * mean(confidence * truth) + DICE_SMOOTHING
    dice = 1 - overlap / (mean(confidence.square()) + mean(truth.square()) + DICE_SMOOTHING)
    return entropy + DICE_WEIGHT * dice


# by the names of `ArtifactDetectorTrainingArguments.loss`
LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mse": confidence_error,
    "bce_dice": cross_entropy_with_dice,
}
