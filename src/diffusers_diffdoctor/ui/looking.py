# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What a detector says about pictures of the pages, and the pictures that show it."""

from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..detector.tiling import tiled_confidence
from ..images import to_image_tensor
from ..pictures import heatmap_overlay, to_pil


class Detector:
    """A detector as the pages ask it: one image at a time, whoever asks.

    Args:
        model: with `confidence(images)`, in evaluation mode, on the device it is to run on.
        name: to show.
    """

    def __init__(self, model: Any, name: str):
        self.model, self.name, self._lock = model, name, Lock()

    @torch.no_grad()
    def map_of(self, image: Image.Image, tile: bool = False) -> np.ndarray:
        """uint8 (H, W), 255 = confidence 1, of an RGB image.

        Args:
            image: of any size.
            tile: also look piece by piece, see [`tiled_confidence`].
        """
        images = to_image_tensor(image)[None]
        weight = next(self.model.parameters(), None)
        images = images if weight is None else images.to(weight.device)
        with self._lock:
            side = self.model.config.image_size
            found = tiled_confidence(self.model, images, side) if tile else self.model.confidence(images)
        return (found[0, 0].float().cpu().clamp(0, 1) * 255).round().byte().numpy()


def heatmap(image: Image.Image, found: np.ndarray, threshold: float = 0.0) -> Image.Image:
    """The map over the image, without confidences below the threshold.

    Args:
        image: RGB.
        found: uint8 (H, W) of its size.
        threshold: in [0, 1].
    """
    confidence = torch.from_numpy(np.where(at_least(found, threshold), found, 0).astype(np.float32) / 255)
    return to_pil(heatmap_overlay(to_image_tensor(image)[None], confidence[None, None])[0])


def at_least(found: np.ndarray, threshold: float) -> np.ndarray:
    """Where a map of 8 bits has at least this confidence: bool (H, W)."""
    return found >= round(255 * threshold)


def figures(found: np.ndarray, threshold: float) -> dict[str, Any]:
    """`max_confidence` and `area_ratio` in [0, 1] and `artifact`, as `diffdoctor diagnose` has them, of a map of 8 bits."""
    wrong = at_least(found, threshold)
    return {
        "max_confidence": round(int(found.max()) / 255, 4),
        "area_ratio": round(float(wrong.mean()), 6),
        "artifact": bool(wrong.any()),
    }
