# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Polygons and boxes as masks. A pixel belongs to a shape in which its centre lies: pixel (0, 0) has it at (0.5, 0.5)."""

from typing import Any

import numpy as np


FARTHEST = 1e9  # coordinate in pixels: what is beyond it is an error, and not to be reckoned with
OUTSIDE = "a region lies outside of the image"


def points_of(values: Any) -> np.ndarray:
    """Corners (N, 2) of [x1, y1, x2, y2, ...] or [[x1, y1], ...].

    Raises:
        ValueError: something else, or coordinates that are not finite numbers, or beyond all images.
    """
    try:
        points = np.asarray(values, np.float64).reshape(-1, 2)
    except (TypeError, ValueError) as error:
        raise ValueError("a region's coordinates are not pairs of numbers") from error
    if not np.isfinite(points).all():
        raise ValueError("a region has coordinates that are not finite")
    if (np.abs(points) > FARTHEST).any():
        raise ValueError(f"a region has coordinates beyond {FARTHEST:.0e}")
    return points


def polygon_mask(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The inside of a polygon, by the even-odd rule. One that is too thin to hold a centre takes the pixels of its corners.

    Args:
        points: corners (N, 2) in pixels, at least 3; the last is joined with the first.
        size: (width, height) of the image.

    Returns:
        bool (H, W).

    Raises:
        ValueError: there are fewer corners, or it lies outside of the image.
    """
    if len(points) < 3:
        raise ValueError("a polygon has fewer than 3 corners")
    width, height = size
    # How many edges cross the line of a pixel's centre to its left: odd inside. Counted where each crossing is, then summed up.
    crossings = np.zeros((height, width + 1), np.int64)
    for (x1, y1), (x2, y2) in zip(points, np.roll(points, -1, axis=0)):
        top, bottom = (int(np.clip(np.ceil(y - 0.5), 0, height)) for y in sorted((y1, y2)))
        if top < bottom:
            rows = np.arange(top, bottom)
            x = x1 + (rows + 0.5 - y1) * ((x2 - x1) / (y2 - y1))
            crossings[rows, np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)] += 1
    mask = np.cumsum(crossings, axis=1)[:, :width] % 2 == 1
    return mask if mask.any() else _corners(points, size)


def box_mask(box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The inside of a box [[x1, y1], [x2, y2]] whose corners may be swapped, see [`polygon_mask`]."""
    (x1, y1), (x2, y2) = np.sort(box, axis=0)
    return polygon_mask(np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)]), size)


def _corners(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    inside = points[((points >= 0) & (points <= size)).all(axis=1)]
    if not len(inside):
        raise ValueError(OUTSIDE)
    mask = np.zeros(size[::-1], bool)
    x, y = np.minimum(inside.astype(np.int64), np.array(size) - 1).T
    mask[y, x] = True
    return mask
