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

    The Dice loss is the semimetric one (arXiv 2303.16296), `sum(|c - t|) / sum(c + t)` of confidences c and labels t. For labels of
    0 and 1 it is the usual `1 - 2 sum(c t) / sum(c + t)`; for soft ones it is smallest at `c = t`, where the usual one pulls them
    to 0 or 1. It is weighed by the highest label of the image: sound images have cross-entropy alone, and so, nearly, have the
    labels of 1/255 that a detector leaves where nothing is, whose exact pattern nobody wants to be learned.

    Args:
        logits: (B, 1, H, W).
        labels: (B, 1, H, W) in [0, 1], negative where a pixel does not count.

    Returns:
        (B,), 0 for an image of which no pixel counts.
    """
    counted = (labels >= 0).to(logits.dtype)

    def total(values: torch.Tensor) -> torch.Tensor:
        return (values * counted).flatten(1).sum(dim=1)

    truth, confidence = labels.clamp(min=0), logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    entropy = total(entropy) / counted.flatten(1).sum(dim=1).clamp(min=1)
    dice = total((confidence - truth).abs()) / total(confidence + truth).clamp(min=1e-6)
    return entropy + DICE_WEIGHT * truth.flatten(1).amax(dim=1) * dice


# by the names of `ArtifactDetectorTrainingArguments.loss`
LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mse": confidence_error,
    "bce_dice": cross_entropy_with_dice,
}
