# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The pixel-level penalty of DiffDoctor: push the artifact confidence of the generated pixels down."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .base import RewardOutput


SELECTIONS = ("threshold", "mean", "max")


def pixel_penalty(maps: torch.Tensor, selection: str = "threshold", threshold: float = 0.1) -> torch.Tensor:
    """`L_pixel = 1/N_aggr sum(M * C)` per sample (DiffDoctor, equation 3, and its ablation of the pixel selection).

    Args:
        maps: artifact confidences C, float (B, 1, H, W) in [0, 1].
        selection: which pixels M count. `"threshold"`: those with C > `threshold`, the paper's choice; `"mean"`: all of
            them; `"max"`: the highest (tied pixels share the gradient).
        threshold: confidence above which a pixel is active, in [0, 1); 0.1 in the paper. Read by `"threshold"` only.

    Returns:
        (B,), in [0, 1]. With `"threshold"`, N_aggr is the number of active pixels of the sample and M carries no
        gradient; a sample without active pixels gives exactly 0, with zero gradient.
    """
    if maps.ndim != 4 or maps.shape[1] != 1 or maps.numel() == 0:
        raise ValueError(f"maps must have the shape (B, 1, H, W), got {tuple(maps.shape)}.")
    if selection not in SELECTIONS:
        raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}; got {selection!r}.")
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold must lie in [0, 1), got {threshold}.")
    confidence = maps.flatten(1).to(torch.promote_types(maps.dtype, torch.float32))  # float16 cannot count the pixels
    if selection == "mean":
        return confidence.mean(dim=1)
    if selection == "max":
        return confidence.amax(dim=1)
    active = (confidence > threshold).to(confidence.dtype)  # a comparison: no gradient
    return (active * confidence).sum(dim=1) / active.sum(dim=1).clamp(min=1)


class ArtifactReward(nn.Module):
    """Penalise the artifacts that a frozen detector sees.

    Args:
        detector: anything with `confidence(images)` from (B, 3, H, W) in [0, 1] to (B, 1, H, W) in [0, 1]. If it is an
            `nn.Module`, it is set to `eval()`, where it stays, and frozen.
        selection, threshold: see [`pixel_penalty`].
        clean_level: an image whose penalty is below this gives no gradient, in [0, 1); the paper has none.

    Calling it with images and prompts (which are not read) returns a [`RewardOutput`]: loss = pixel penalty, score =
    1 - highest confidence, map = the confidences, detached.
    """

    __name__ = "artifact"

    def __init__(self, detector: Any, selection: str = "threshold", threshold: float = 0.1, clean_level: float = 0.0):
        if not callable(getattr(detector, "confidence", None)):
            raise TypeError(f"detector needs a `confidence(images)` method; {type(detector).__name__} has none.")
        pixel_penalty(torch.zeros(1, 1, 1, 1), selection, threshold)  # reject bad settings before the first batch
        super().__init__()
        self.detector = detector
        self.eval().requires_grad_(False)
        self.selection = selection
        self.threshold = threshold
        if not 0 <= clean_level < 1:
            raise ValueError(f"clean_level must lie in [0, 1), got {clean_level}.")
        self.clean_level = clean_level

    def train(self, mode: bool = True):
        return super().train(False)  # the batch norm of a training detector would mix the samples

    def forward(self, images: torch.Tensor, prompts: Sequence[str] | None = None) -> RewardOutput:
        maps = self.detector.confidence(images)
        loss = pixel_penalty(maps, self.selection, self.threshold)
        return RewardOutput(
            loss=torch.where(loss < self.clean_level, loss.detach(), loss),
            score=1 - maps.detach().flatten(1).amax(dim=1),
            map=maps.detach(),
        )
