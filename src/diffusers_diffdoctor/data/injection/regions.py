# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Where to inject: places that stand out, or boxes that are given, and shapes with soft, irregular edges there."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .pixels import blur


SALIENCY_SIDE = 96  # pixels of the longer side at which it is computed


def saliency(image: np.ndarray) -> np.ndarray:
    """How much each place of an image stands out from its surroundings.

    The colour of a small neighbourhood against that of one three times as wide, at three sizes (centre and surround: Itti et al.
    1998), all channels together. Ours is the choice of sizes: 1/32, 1/16 and 1/8 of the longer side.

    Args:
        image: uint8 (H, W, 3).

    Returns:
        float32 (h, w), the image's shape with a longer side of at most 96 pixels; positive, sum 1. A flat image stands out
        nowhere, and all places weigh the same.
    """
    height, width = image.shape[:2]
    scale = min(1.0, SALIENCY_SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX), np.float32)
    total = np.zeros(small.shape[:2], np.float32)
    for part in (32, 16, 8):
        sigma = max(0.5, max(size) / part / 2)
        if min(size) > 2:
            total += np.abs(blur(small, sigma / 2) - blur(small, 1.5 * sigma)).sum(-1)
    total += 0.02 * total.max() + 1e-3
    return total / total.sum()


def blob(
    shape: tuple[int, int], center: tuple[float, float], radius: float, rng: np.random.Generator, softness: float = 0.3
) -> np.ndarray:
    """A round shape with an irregular outline and a soft edge.

    Args:
        shape: (height, width) of the result.
        center: (y, x) in pixels.
        radius: mean distance in pixels at which the weight has fallen to one half.
        rng: source of chance: elongation, bumps.
        softness: width of the edge, in radii.

    Returns:
        float32 (height, width) in [0, 1]: 1 inside, 0 outside.
    """
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]].astype(np.float32)
    turn, stretch = rng.uniform(0, np.pi), np.exp(rng.uniform(-0.4, 0.4))
    y, x = y - center[0], x - center[1]
    along, across = (x * np.cos(turn) + y * np.sin(turn)) * stretch, (y * np.cos(turn) - x * np.sin(turn)) / stretch
    angle = np.arctan2(across, along)
    reach = np.ones(shape, np.float32)
    for waves in range(2, 6):
        reach += rng.uniform(0, 0.28) / waves * np.cos(waves * angle + rng.uniform(0, 2 * np.pi))
    inside = (reach - np.hypot(along, across) / max(radius, 0.5)) / max(softness, 1e-3) + 0.5
    inside = np.clip(inside, 0, 1)
    return (inside * inside * (3 - 2 * inside)).astype(np.float32)


def choose_place(
    weights: np.ndarray,
    shape: tuple[int, int],
    rng: np.random.Generator,
    least_size: float,
    most_size: float,
    boxes: Sequence[Sequence[float]] | None = None,
) -> tuple[tuple[float, float], float, tuple[int, int, int, int]]:
    """A place to inject.

    Args:
        weights: [`saliency`] of the image.
        shape: its height and width in pixels.
        rng: source of chance.
        least_size, most_size: diameter as a share of the image's shorter side; with boxes, of the box's longer side, which the
            diameter may not exceed in pixels either.
        boxes: (x1, y1, x2, y2) in pixels, corners in any order; one of them is chosen. Without them a place that stands out.

    Returns:
        Its centre (y, x), its radius in pixels, and the limits (top, left, bottom, right) that changes must not leave: the
        image, or the box with a quarter of its size around it.
    """
    height, width = shape
    limits, side = (0, 0, height, width), min(height, width)
    if boxes is not None and len(boxes):
        x1, y1, x2, y2 = boxes[rng.integers(len(boxes))]
        (left, right), (top, bottom) = sorted((x1, x2)), sorted((y1, y2))
        rows, columns = (np.arange(n) + 0.5 for n in weights.shape)
        rows, columns = rows * height / weights.shape[0], columns * width / weights.shape[1]
        inside = ((rows >= top) & (rows < bottom))[:, None] & ((columns >= left) & (columns < right))[None]
        if inside.any():
            weights = np.where(inside, weights, 0)
            weights = weights / weights.sum()
        else:  # smaller than a pixel of the saliency
            cell = (top + bottom) / 2 / height, (left + right) / 2 / width
            cell = tuple(min(max(int(at * n), 0), n - 1) for at, n in zip(cell, weights.shape))
            weights = np.zeros_like(weights)
            weights[cell] = 1
        side = max(right - left, bottom - top)
        margin = side / 4
        limits = (
            max(0, int(top - margin)),
            max(0, int(left - margin)),
            min(height, int(np.ceil(bottom + margin))),
            min(width, int(np.ceil(right + margin))),
        )
    cell = rng.choice(weights.size, p=weights.ravel().astype(np.float64) / weights.sum(dtype=np.float64))
    row, column = divmod(int(cell), weights.shape[1])
    center = (
        (row + rng.random()) * height / weights.shape[0],
        (column + rng.random()) * width / weights.shape[1],
    )
    size = rng.uniform(least_size, most_size)
    return center, max(1.5, size * side / 2), limits


def low_noise(shape: tuple[int, int], cells: float, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise, float32 (height, width), standard normal at its nodes, about `cells` of them along the longer side."""
    nodes = [max(2, round(cells * side / max(shape)) + 1) for side in shape]
    noise = torch.from_numpy(rng.standard_normal((1, 1, *nodes)).astype(np.float32))
    return F.interpolate(noise, size=shape, mode="bicubic", align_corners=True)[0, 0].numpy()
