# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What injection does with pixels: grow and shrink masks, blur, resample, fill holes, keep the grain.

Images here are float32 (H, W, 3) in [0, 255], masks bool (H, W), weights float32 (H, W) in [0, 1].
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


GRAIN_WINDOW = 5  # pixels of a side of the mean from which grain is measured
GRAIN = 0.4, 6.0  # of 255, standard deviation: less is none, more is what the image shows
FINE_PIXELS = 2**18  # of an image that is resampled by way of one twice as large


def grow(mask: np.ndarray, radius: int) -> np.ndarray:
    """The mask with all that is within `radius` pixels of it, in turns of a square and a cross, close to a disc."""
    for step in range(radius):
        across = mask.copy()
        across[:, 1:] |= mask[:, :-1]
        across[:, :-1] |= mask[:, 1:]
        before = across if step % 2 else mask
        mask = across.copy()
        mask[1:] |= before[:-1]
        mask[:-1] |= before[1:]
    return mask


def shrink(mask: np.ndarray, radius: int) -> np.ndarray:
    """The mask without what is within `radius` pixels of its edge; the border of the image is no edge."""
    return ~grow(~mask, radius)


def flood(seeds: np.ndarray, within: np.ndarray) -> np.ndarray:
    """What can be reached from the seeds without leaving `within`, not across corners."""
    reached, size = seeds & within, -1
    # whole runs at a time, along rows and along columns in turn
    runs = [np.cumsum(~part).reshape(part.shape) + np.arange(len(part))[:, None] for part in (within, within.T)]
    while reached.sum() != size:
        size = reached.sum()
        for run in runs:
            found = np.zeros(run[-1, -1] + 1, bool)
            found[run[reached]] = True
            reached, within = (found[run] & within).T, within.T
    return reached


def without_holes(mask: np.ndarray) -> np.ndarray:
    """The mask with all that it encloses."""
    edge = np.zeros_like(mask)
    edge[[0, -1]] = True
    edge[:, [0, -1]] = True
    return ~flood(edge, ~mask)


def blur(values: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of (H, W) or (H, W, C), mirrored at the border."""
    for axis in (0, 1):
        radius = min(int(np.ceil(2.5 * sigma)), values.shape[axis] - 1)
        kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
        padding = [(radius, radius) if a == axis else (0, 0) for a in range(values.ndim)]
        padded = torch.from_numpy(np.pad(values, padding, "reflect"))
        result = torch.zeros(values.shape)
        for step, share in enumerate(kernel / kernel.sum()):
            result.add_(padded.narrow(axis, step, values.shape[axis]), alpha=float(share))
        values = result.numpy()
    return values


def sample(values: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """`values` (H, W, C) at the places `y`, `x` (h, w) in pixels -> (h, w, C); the border is repeated.

    Bicubic, of values made twice as large before (Lanczos) where that is not too much, so that little of what is fine is lost; and
    within the range of the nine values around a place, so that edges get no rim.
    """
    height, width = values.shape[:2]
    planes = torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))[None]
    fine, edge = planes, 0
    if height * width <= FINE_PIXELS:
        edge = 4
        padded = np.pad(values, [(edge, edge), (edge, edge), (0, 0)], "edge")
        size = (2 * padded.shape[1], 2 * padded.shape[0])
        channels = [Image.fromarray(np.ascontiguousarray(padded[..., c])) for c in range(values.shape[2])]
        larger = [np.asarray(channel.resize(size, Image.Resampling.LANCZOS)) for channel in channels]
        fine = torch.from_numpy(np.stack(larger))[None]

    def at(planes: torch.Tensor, edge: int, mode: str) -> torch.Tensor:
        places = [(2 * (x + edge) + 1) / (width + 2 * edge) - 1, (2 * (y + edge) + 1) / (height + 2 * edge) - 1]
        grid = torch.from_numpy(np.stack(places, -1).astype(np.float32))[None]
        return F.grid_sample(planes, grid, mode, "border", align_corners=False)

    around = torch.cat([F.max_pool2d(planes, 3, 1, 1), -F.max_pool2d(-planes, 3, 1, 1)], 1)
    highest, lowest = at(around, 0, "nearest").chunk(2, 1)
    result = torch.minimum(torch.maximum(at(fine, edge, "bicubic"), lowest), highest)
    return result[0].permute(1, 2, 0).numpy()


def spread(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """`values` (H, W, C) where they are known, and a smooth continuation of them everywhere else.

    Known pixels are averaged up a pyramid until nothing is unknown, and what is unknown is taken from the coarser level on the
    way down (pull-push: Gortler et al. 1996, "The Lumigraph", section 3.5).
    """
    weight = torch.from_numpy(known.astype(np.float32))[None, None]
    value = torch.from_numpy(values.astype(np.float32).transpose(2, 0, 1))[None] * weight
    levels = [(value, weight)]
    while max(value.shape[-2:]) > 1:
        value, weight = (F.avg_pool2d(part, 2, ceil_mode=True) for part in (value, weight))
        scale = 1 / weight.clamp(min=0.25)  # at most a whole pixel's weight
        value, weight = value * scale, weight * scale
        levels.append((value, weight))
    value, weight = levels.pop()
    result = value / weight.clamp(min=1e-6)
    for value, weight in reversed(levels):
        coarse = F.interpolate(result, size=value.shape[-2:], mode="bilinear", align_corners=False)
        result = value + (1 - weight) * coarse
    return result[0].permute(1, 2, 0).numpy()


def grain_of(image: np.ndarray) -> tuple[np.ndarray, float]:
    """What is left of the image after a local mean, (H, W, 3), and its standard deviation where nothing is drawn.

    The deviation is the median over the pixels, which edges do not move (MAD / 0.6745).
    """
    planes = torch.from_numpy(image.transpose(2, 0, 1))[None]
    edge = GRAIN_WINDOW // 2
    mean = F.avg_pool2d(F.pad(planes, (edge,) * 4, mode="replicate"), GRAIN_WINDOW, 1)[0].permute(1, 2, 0).numpy()
    residual = image - mean
    return residual, float(np.median(np.abs(residual)) / 0.6745)


def keeping_grain(
    change: Callable[[np.ndarray], np.ndarray], image: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """`change` of what the image shows, under the grain that it has.

    Grain belongs to the camera and not to the things: it stays where it is when they move. So the change is made to the image
    without its grain (what a local mean leaves, where that is weak), which cannot get lost in resampling then, and the grain is laid
    over it again. Where there was an edge, whose grain is not known, what has changed gets that of other pixels.
    """
    residual, deviation = grain_of(image)
    if not GRAIN[0] < deviation < GRAIN[1]:
        return change(image)
    quiet = np.abs(residual).max(-1) < 3 * deviation
    grain = residual * quiet[..., None]
    drawn = image - grain
    new = change(drawn)
    pool = residual[quiet]
    other = pool[rng.integers(len(pool), size=quiet.shape)] * ~quiet[..., None]
    changed = np.clip(np.abs(new - drawn).max(-1, keepdims=True) / (3 * deviation), 0, 1)
    return new + grain + changed * other


def fill(
    image: np.ndarray, hole: np.ndarray, known: np.ndarray, rng: np.random.Generator, tries: int = 32
) -> np.ndarray:
    """The image with the hole filled in the manner of its `known` pixels.

    A copy of the surroundings is laid over the hole whose pixels are all known and which fits best where the two meet; the
    difference that is left there is continued smoothly into the hole and taken away (a membrane: Perez et al. 2003, "Poisson image
    editing"). Whole pixels are copied, which keeps texture. Where no copy fits, the surroundings are continued smoothly.

    Args:
        image: (H, W, 3).
        hole: what to fill.
        known: pixels whose like the hole is to be filled with; those in the hole are not asked.
        rng: source of chance.
        tries: copies to choose from.
    """
    ys, xs = np.nonzero(hole)
    if not len(ys):
        return image
    reach = np.array([np.ptp(ys) + 1, np.ptp(xs) + 1])
    near = tuple(slice(max(0, at.min() - 2 * size - 4), at.max() + 2 * size + 5) for at, size in zip((ys, xs), reach))
    result = image.copy()
    result[near] = _filled(image[near], hole[near], known[near] & ~hole[near], reach, rng, tries)
    return result


def _filled(
    image: np.ndarray, hole: np.ndarray, known: np.ndarray, reach: np.ndarray, rng: np.random.Generator, tries: int
) -> np.ndarray:
    if not known.any():
        return image
    ring = grow(hole, 2) & known
    height, width = hole.shape
    (ys, xs), (ring_ys, ring_xs) = np.nonzero(hole), np.nonzero(ring)
    best = None
    for _ in range(tries if ring.any() else 0):
        dy, dx = (int(step) for step in np.rint(rng.uniform(-2, 2, 2) * reach))
        sy, sx = ys + dy, xs + dx
        if sy.min() < 0 or sx.min() < 0 or sy.max() >= height or sx.max() >= width or not known[sy, sx].all():
            continue
        ry, rx = ring_ys + dy, ring_xs + dx
        inside = (ry >= 0) & (ry < height) & (rx >= 0) & (rx < width)
        if inside.any():
            error = np.abs(image[ring][inside] - image[ry[inside], rx[inside]]).mean()
            if best is None or error < best[0]:
                best = error, dy, dx
    smooth = blur(image * known[..., None], 1.5) / np.maximum(blur(known.astype(np.float32), 1.5), 1e-3)[..., None]
    result = image.copy()
    if best is None:
        result[hole] = spread(smooth, known)[hole]
        return result
    _, dy, dx = best
    y, x = np.clip(np.arange(height) + dy, 0, height - 1), np.clip(np.arange(width) + dx, 0, width - 1)
    there = np.ix_(y, x)
    both = known & known[there] & grow(hole, 4)
    correction = spread(smooth - smooth[there], both) if both.any() else 0
    result[hole] = (image[there] + correction)[hole]
    return result
