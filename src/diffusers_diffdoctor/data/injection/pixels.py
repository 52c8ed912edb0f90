# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What injection does with pixels: grow and shrink masks, blur, resample, fill holes, give new pixels the grain of the old.

Images here are float32 (H, W, 3) in [0, 255], masks bool (H, W), weights float32 (H, W) in [0, 1].
"""

import numpy as np
import torch
import torch.nn.functional as F


GRAIN_WINDOW = 5  # pixels of a side of the mean from which grain is measured
GRAIN = 0.4, 12.0  # of 255, standard deviation: less is none, more is what the image shows


def grow(mask: np.ndarray, radius: int) -> np.ndarray:
    """The mask with all that is within `radius` pixels of it, in turns of a square and a cross, close to a disc."""
    result = torch.from_numpy(mask.astype(np.float32))[None, None]
    for step in range(radius):
        if step % 2:
            result = F.max_pool2d(result, 3, 1, 1)
        else:
            across = F.max_pool2d(result, (1, 3), 1, (0, 1))
            result = torch.maximum(across, F.max_pool2d(result, (3, 1), 1, (1, 0)))
    return result[0, 0].numpy() > 0.5


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
    """`values` (H, W, C) at the places `y`, `x` (h, w) in pixels -> (h, w, C): bicubic, the border repeated."""
    height, width = values.shape[:2]
    grid = np.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1).astype(np.float32)
    planes = torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))[None]
    result = F.grid_sample(planes, torch.from_numpy(grid)[None], "bicubic", "border", align_corners=False)
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


def with_grain(new: np.ndarray, old: np.ndarray, changed: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`new` with as much grain where it is `changed` as `old` has, because resampled and filled pixels are smoother.

    The grain is taken from the old image's quiet pixels, all channels of a pixel together.
    """
    residual, deviation = grain_of(old)
    if not GRAIN[0] < deviation < GRAIN[1] or changed.sum() < 4:
        return new
    quiet = np.abs(residual).max(-1) < 3 * deviation
    smooth, _ = grain_of(new)
    inside = changed & (np.abs(smooth).max(-1) < 3 * deviation)
    if quiet.sum() < 16 or not inside.any():
        return new
    pool = residual[quiet]
    wanted, found = pool.var(), smooth[inside].var()
    if found >= wanted:
        return new
    grain = pool[rng.integers(len(pool), size=changed.sum())] - pool.mean(0)
    new = new.copy()
    new[changed] += grain * np.sqrt(1 - found / wanted)
    return new


def fill(
    image: np.ndarray, hole: np.ndarray, known: np.ndarray, rng: np.random.Generator, tries: int = 32
) -> np.ndarray:
    """The image with the hole filled in the manner of its `known` pixels.

    A copy of the surroundings is laid over the hole whose pixels are all known and which fits best where the two meet; the
    difference that is left there is continued smoothly into the hole and taken away (a membrane: Perez et al. 2003, "Poisson image
    editing"). Copied whole pixels keep texture and grain. Where no copy fits, the surroundings are continued smoothly.

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
        return with_grain(result, image, hole, rng)
    _, dy, dx = best
    y, x = np.clip(np.arange(height) + dy, 0, height - 1), np.clip(np.arange(width) + dx, 0, width - 1)
    there = np.ix_(y, x)
    both = known & known[there] & grow(hole, 4)
    correction = spread(smooth - smooth[there], both) if both.any() else 0
    result[hole] = (image[there] + correction)[hole]
    return result
