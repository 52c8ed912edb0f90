# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Decoys: what injection does to pixels, with sound content, so that no detector can take the traces of it for artifacts."""

import numpy as np

from .kinds import joined
from .parts import cut_out, laid, moved, part_in
from .pixels import fill, sample


def retouch(image: np.ndarray, region: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A region resampled, cut out or filled as for an artifact, and what is seen stays what it was.

    Arguments and result are those of a kind. One of: a part is turned and laid down where it was cut out of the picture turned the
    other way; the region is resampled a fraction of a pixel away and back; a hole is filled with its surroundings.
    """
    which = rng.integers(3)
    if which == 0:
        part = part_in(image, region, rng)
        center, degrees = part.points.mean(0), rng.uniform(-80, 80)
        turned = moved(cut_out(image, part), center, -degrees)
        return laid(image, moved(turned, center, degrees))
    if which == 1:
        y, x = np.mgrid[0 : image.shape[0], 0 : image.shape[1]].astype(np.float32)
        dy, dx = rng.uniform(-0.5, 0.5, 2)
        new = sample(sample(image, y + dy, x + dx), y - dy, x - dx)
        return image + region[..., None] * (new - image)
    hole = region > 0.5
    return joined(image, fill(image, hole, region > 0, rng), hole)
