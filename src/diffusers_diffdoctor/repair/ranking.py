# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The best of several images, by a detector."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..evaluation.metrics import area_ratio, max_confidence
from ..images import ImageSource, to_image_tensor


class Ranked(NamedTuple):
    """`index`: of the image in what was given. `max_confidence`: of its pixels. `area_ratio`: share of pixels from the threshold."""

    index: int
    max_confidence: float
    area_ratio: float


@torch.no_grad()
def rank(
    images: Sequence[ImageSource] | torch.Tensor, detector: torch.nn.Module, threshold: float = 0.5
) -> list[Ranked]:
    """Images from the cleanest to the most wrong: by the highest confidence of a pixel, then by the area, as `diffdoctor diagnose`.

    Args:
        images: (N, 3, H, W) in [0, 1], or files, PIL images or arrays, of any sizes.
        detector: with `confidence(images)`.
        threshold: confidence in (0, 1] from which a pixel counts as wrong.

    Raises:
        ValueError: no images, or a threshold outside (0, 1].
    """
    if len(images) == 0:
        raise ValueError("`images` is empty: there is nothing to rank.")
    if not 0 < threshold <= 1:
        raise ValueError(f"`threshold` must lie in (0, 1], got {threshold}.")
    device = next(detector.parameters()).device
    found = []
    for index, image in enumerate(images):
        pixels = image if isinstance(image, torch.Tensor) else to_image_tensor(image)
        confidence = detector.confidence(pixels[None].to(device))
        found.append(Ranked(index, max_confidence(confidence).item(), area_ratio(confidence, threshold).item()))
    return sorted(found, key=lambda one: (one.max_confidence, one.area_ratio, one.index))
