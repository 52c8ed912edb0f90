# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The kinds of artifacts, each a function of an image, a region and chance.

`kind(image, region, rng) -> image`: image float32 (H, W, 3) in [0, 255], region float32 (H, W) in [0, 1] with a soft edge. They raise
[`NoChange`] where the region holds nothing to spoil. The first line of each says which mistake of generators it stands for.
"""

import string

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .parts import (
    NoChange,
    Part,
    contoured,
    cut_out,
    enlarged,
    laid,
    moved,
    one_color,
    part_in,
    reduced,
    thing_in,
    without,
)
from .pixels import blur, fill, flood, grow, sample, shrink
from .regions import low_noise


PLACES = 4  # that are looked at for a part that is laid down


def duplicate(image: np.ndarray, region: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A part too many: a sixth finger, a third arm, a second mouth.

    The part is laid down once more beside itself, turned around where it is attached, in front of its thing or behind it.
    """
    part = part_in(image, region, rng)
    return _laid_down(image, image, part, rng, far=rng.random() < 0.25)


def omit(image: np.ndarray, region: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A missing part, or a stump of it: four fingers, an eye that is not there.

    The part is filled with its surroundings; of one in three that are attached to a thing, a shrunken rest is left.
    """
    part = part_in(image, region, rng)
    taken = without(image, part, rng)
    if part.root is not None and rng.random() < 0.33:
        return laid(taken, moved(cut_out(image, part), part.root, scale=rng.uniform(0.25, 0.65)))
    return taken


def misplace(image: np.ndarray, region: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A part in the wrong place: a thumb on the wrong side, a mouth on the forehead.

    The part is taken away and laid down elsewhere.
    """
    part = part_in(image, region, rng)
    return _laid_down(without(image, part, rng), image, part, rng, far=rng.random() < 0.6)


def distort(image: np.ndarray, region: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A warped face: swirled, pinched, bulging or wavy."""
    height, width = region.shape
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    cy, cx, radius = extent(region)
    dy, dx = y - cy, x - cx
    which = rng.integers(3)
    if which == 0:  # swirl
        angle = rng.choice([-1, 1]) * rng.uniform(1.5, 3.6) * region
        sy, sx = dy * np.cos(angle) + dx * np.sin(angle), dx * np.cos(angle) - dy * np.sin(angle)
    elif which == 1:  # pinch, bulge
        scale = np.exp(rng.choice([-1, 1]) * rng.uniform(0.6, 1.1) * region)
        sy, sx = dy * scale, dx * scale
    else:  # waves
        cells = max(height, width) / radius * rng.uniform(0.8, 2)
        reach = radius * rng.uniform(0.25, 0.5) * region
        sy, sx = dy + reach * low_noise(region.shape, cells, rng), dx + reach * low_noise(region.shape, cells, rng)
    new = sample(image, sy + cy, sx + cx)
    return np.where((region > 0)[..., None], new, image)


def fuse(image: np.ndarray, region: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Fingers that have grown together, two eyes that are one.

    Gaps of the thing (what a closing adds to it) are filled with the thing's own colours, and get its contour.
    """
    small, place, reduction = reduced(image, region)
    thing, _ = thing_in(small, place, rng)
    reach = max(2, round(extent(place)[2] * rng.uniform(0.6, 1.6)))
    closed = shrink(grow(np.pad(thing, reach), reach), reach)[reach:-reach, reach:-reach]
    gaps = closed & ~thing
    seeds = np.argwhere(gaps & (place > 0.5))
    if not len(seeds):
        raise NoChange
    seed = np.zeros_like(gaps)
    seed[tuple(seeds[rng.integers(len(seeds))])] = True
    gap = flood(seed, gaps)
    outline = grow(gap, 1) & ~gap
    if not 6 <= gap.sum() <= 4 * (place > 0.5).sum() or (outline & thing).sum() < 0.5 * outline.sum():
        raise NoChange
    hole = grow(gap, 2)  # with the contours on both sides
    near = grow(hole, 3) & thing & ~hole
    if not near.any():
        raise NoChange
    known = one_color(small, near, rng) & grow(hole, 2 * reach + 2) & ~gap
    closed, where = thing | hole, grow(hole, 1)
    hole, known = enlarged(hole, reduction), enlarged(known, reduction)
    new = joined(image, fill(image, hole, known, rng), hole)
    return contoured(new, image, thing, closed, where, reduction)


def melt(image: np.ndarray, region: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A melted mouth: what was drawn flows down and together.

    Small warps, one after another, along a field that points mostly one way; each smooths a little.
    """
    height, width = region.shape
    radius = extent(region)[2]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    cells = max(height, width) / radius * rng.uniform(0.7, 1.6)
    turn = rng.normal(0, 0.6)
    steps = 6
    reach = radius * rng.uniform(0.5, 1.1) / steps * region
    drip = reach * (0.5 + np.abs(low_noise(region.shape, cells, rng)))
    side = 0.5 * reach * low_noise(region.shape, cells, rng)
    sy, sx = y - np.cos(turn) * drip + np.sin(turn) * side, x + np.sin(turn) * drip + np.cos(turn) * side
    new = image
    for _ in range(steps):
        new = sample(new, sy, sx)
        soft = blur(new, max(0.6, 0.07 * radius))
        new = new + (0.7 * region)[..., None] * (soft - new)
    return np.where((region > 0)[..., None], new, image)


def watermark(image: np.ndarray, region: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The ghost of a watermark: letters or strokes, translucent, in a line across the region."""
    height, width = region.shape
    cy, cx, radius = extent(region)
    size = max(5, round(radius * rng.uniform(0.5, 0.9)))
    scale = max(1, round(24 / size))  # strokes thinner than a pixel are drawn large, and reduced
    layer = Image.new("L", (width * scale, height * scale), 0)
    draw = ImageDraw.Draw(layer)
    left, top = (cx - radius * rng.uniform(1.5, 2.5)) * scale, (cy - size / 2) * scale
    letters = rng.choice(list(string.ascii_letters + string.digits + "©"), int(rng.integers(4, 10)))
    if rng.random() < 0.6:
        font = ImageFont.load_default(size * scale * 1.2)
        draw.text((left, top), "".join(letters), fill=255, font=font, stroke_width=int(rng.integers(0, 2) * scale))
    else:
        for _ in letters:
            _stroke(draw, left, top, size * scale, rng)
            left += size * scale * rng.uniform(0.7, 1.0)
    layer = layer.rotate(rng.uniform(-35, 35), Image.Resampling.BICUBIC, center=(cx * scale, cy * scale))
    share = np.asarray(layer.reduce(scale), np.float32) / 255 * rng.uniform(0.35, 0.75)
    around = image[region > 0.5].mean() if (region > 0.5).any() else image.mean()
    level = rng.uniform(225, 255) if around < 128 else rng.uniform(0, 50)
    if rng.random() < 0.2:
        level = 255 - level
    return image + share[..., None] * (level - image)


def seam(image: np.ndarray, region: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Tiles that do not meet: one side of a straight line is shifted along it, and a little brighter or darker."""
    height, width = region.shape
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    cy, cx, radius = extent(region)
    turn = rng.choice([0, np.pi / 2]) + (rng.normal(0, 0.3) if rng.random() < 0.4 else 0)
    across = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn)
    side = np.clip(across + 0.5, 0, 1) * region  # sharp at the line, soft elsewhere
    shift = rng.choice([-1, 1]) * max(2.0, radius * rng.uniform(0.25, 0.6))
    reach = np.where(across > -0.5, region, 0) * shift
    new = sample(image, y + np.cos(turn) * reach, x - np.sin(turn) * reach)
    new = new + rng.choice([-1, 1]) * (rng.uniform(0, 30) if rng.random() < 0.5 else 0)
    return image + side[..., None] * (new - image)


# --- what they share -------------------------------------------------------------------------------------------------------------


def extent(region: np.ndarray) -> tuple[float, float, float]:
    """Centre (y, x) and radius in pixels of the part of a region above one half."""
    points = np.argwhere(region > 0.5)
    if not len(points):
        raise NoChange
    return (*points.mean(0), max(1.5, float(np.sqrt(len(points) / np.pi))))


def joined(old: np.ndarray, new: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """The new pixels of the hole in the old image, mixed over the pixel at its edge."""
    weight = np.maximum(blur(hole.astype(np.float32), 0.7) * grow(hole, 1), shrink(hole, 1))
    return old + weight[..., None] * (np.where(grow(hole, 1)[..., None], new, old) - old)


def _laid_down(onto: np.ndarray, image: np.ndarray, part: Part, rng: np.random.Generator, far: bool) -> np.ndarray:
    """`onto` with the part of `image` laid down in another place, near where it was or far from it.

    Of several places the one is taken where most of it lies on the surroundings of its thing: a finger beside the others, an eye in
    the face.
    """
    layer, root, points = cut_out(image, part), part.root, part.points
    other = (part.thing if onto is image else part.rest) | part.beyond
    free = (~enlarged(other, part.reduction)).astype(np.float32)
    best = -1.0, layer
    for _ in range(PLACES):
        placed = moved(layer, *_placement(points, root, rng, far))
        weight = np.clip(placed[..., 3], 0, 1)
        on_free = float((weight * free).sum() / max(layer[..., 3].sum(), 1.0))  # what leaves the image is not there
        if on_free > best[0]:
            best = on_free, placed
    behind = root is not None and rng.random() < 0.6
    return laid(onto, best[1], blur(free, 0.6) if behind else None)


def _placement(
    points: np.ndarray, root: np.ndarray | None, rng: np.random.Generator, far: bool
) -> tuple[np.ndarray, float, float, tuple[float, float], bool]:
    """Arguments of [`moved`]: around where to turn, by how much, how large, how far to shift, and whether to mirror."""
    scale, mirrored = np.exp(rng.normal(0, 0.1)), rng.random() < 0.3
    reach = np.ptp(points, 0) + 1
    if root is not None and not far:  # like a finger beside a finger
        width = len(points) / reach.max()
        return (
            root,
            rng.choice([-1, 1]) * rng.uniform(15, 75),
            scale,
            tuple(rng.uniform(-0.8, 0.8, 2) * width),
            mirrored,
        )
    turn, distance = rng.uniform(0, 2 * np.pi), rng.uniform(0.9, 3 if far else 1.6)
    shift = np.array([np.sin(turn), np.cos(turn)]) * distance * (reach.max() if far else reach)
    degrees = rng.normal(0, 20) if root is None else rng.uniform(-180, 180)
    return points.mean(0), degrees, scale, tuple(shift), mirrored


def _stroke(draw: ImageDraw.ImageDraw, x: float, y: float, size: float, rng: np.random.Generator) -> None:
    """A sign like a letter: a bar, an angle, a ring or a zigzag."""
    width = max(1, round(size * rng.uniform(0.12, 0.2)))
    w = size * 0.6
    which = rng.integers(4)
    if which == 0:
        draw.line([(x, y), (x, y + size)], fill=255, width=width)
    elif which == 1:
        draw.line([(x, y + size), (x + w / 2, y), (x + w, y + size)], fill=255, width=width)
    elif which == 2:
        draw.ellipse([x, y, x + w, y + size], outline=255, width=width)
    else:
        draw.line([(x, y), (x + w, y), (x, y + size), (x + w, y + size)], fill=255, width=width)
