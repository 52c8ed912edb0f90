# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Decoys: what injection does to pixels, with sound content, so that no detector can take the traces of it for artifacts."""

import numpy as np

from .kinds import joined
from .parts import cut_out, laid, moved, part_in
from .pixels import fill, sample


UNSEEN = 14  # of 255; a little below what an artifact map calls visible, which grain and rounding can add to


def turned_back(image: np.ndarray, region: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A part, cut out and turned one way, is laid down turned the other way, where it was.

    Twice resampled, some of its contour can be seen to differ; there the image stays as it was.
    """
    part = part_in(image, region, rng)
    center, degrees = part.points.mean(0), rng.uniform(-80, 80)
    turned = moved(cut_out(image, part), center, -degrees)
    new = laid(image, moved(turned, center, degrees))
    differs = np.abs(new - image).max(-1) > UNSEEN
    return np.where(differs[..., None], image, new)


def shifted_back(image: np.ndarray, region: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The region is resampled a fraction of a pixel away and back."""
    y, x = np.mgrid[0 : image.shape[0], 0 : image.shape[1]].astype(np.float32)
    dy, dx = rng.uniform(-0.5, 0.5, 2)
    new = sample(sample(image, y + dy, x + dx), y - dy, x - dx)
    return image + region[..., None] * (new - image)


def filled_again(image: np.ndarray, region: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The region is filled with its surroundings, as if something had been taken away."""
    hole = region > 0.5
    return joined(image, fill(image, hole, region > 0, rng), hole)


WAYS = (turned_back, shifted_back, filled_again)


def retouch(image: np.ndarray, region: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A region resampled, cut out or filled as for an artifact, in one of `WAYS`; where it can be seen it is not taken.

    Arguments and result are those of a kind.
    """
    return WAYS[rng.integers(len(WAYS))](image, region, rng)
