# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Parts of things, found without knowing the things: what differs from the surroundings of a region and hangs together.

A finger, an ear, an eye or a window is cut along its own contour, so that what is copied, moved or taken away has no other seam
than the one that it always had; where a part goes over into its thing it is cut softly.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from .pixels import blur, fill, flood, grain_of, grow, sample, shrink, spread, without_holes


LEAST_PART = 8  # pixels
CANDIDATES = 6  # parts that are looked at before one is taken
LEAST_OUTLINE = 0.55  # share of a part's outline that must belong to its surroundings
PALETTE_SIDE = 32  # pixels of the longer side of the image whose colours are clustered
DISTINCT = 22  # of 255, in a channel: by how much a thing differs from its surroundings
CONTOUR = 3  # pixels: how deep the contour of a thing may go
FINE_RADIUS = 24  # pixels: around regions with a larger radius, things are looked for in a reduced image


class NoChange(Exception):
    """The region holds nothing that the kind could spoil; another one may."""


@dataclass(frozen=True)
class Reduction:
    """From an image of `shape` (H, W) to one with sides a `factor`-th as long."""

    factor: int
    shape: tuple[int, int]


@dataclass(frozen=True)
class Part:
    """`mask`: its pixels. `rest`: those of its thing that hang together with it. `thing`: all that is not surroundings.
    `beyond`: what lies around the surroundings, see [`thing_in`].

    All in the reduced image; [`enlarged`] brings them to the image.
    """

    mask: np.ndarray
    rest: np.ndarray
    thing: np.ndarray
    beyond: np.ndarray
    reduction: Reduction

    @property
    def points(self) -> np.ndarray:
        """(N, 2): y and x of its pixels, in the image."""
        return self._places(self.mask)

    @property
    def root(self) -> np.ndarray | None:
        """(y, x) of where it goes over into the rest of its thing, in the image; None where it stands alone."""
        joint = grow(self.rest, 2) & self.mask
        return self._places(joint).mean(0) if joint.sum() >= 2 else None

    def _places(self, mask: np.ndarray) -> np.ndarray:
        return (np.argwhere(mask) + 0.5) * self.reduction.factor - 0.5


def thing_in(image: np.ndarray, region: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The pixels that differ from the region's surroundings, and what lies beyond those, as two masks.

    The surroundings are a colour that is frequent in a ring about the region. Where they are seen they are continued over the rest,
    and what differs from that is the thing: so light may change across them.

    What takes up most of the image's border is no thing, but lies beyond the surroundings: of the eyes in a face, the face is the
    surroundings, and what is behind the head lies beyond.

    Raises:
        NoChange: the region lies in its surroundings, or there is no ring.
    """
    core = region > 0.5
    ring = grow(region > 0.02, max(2, round(0.35 * _radius(core)))) & ~grow(core, 1)
    if not core.any() or not ring.any():
        raise NoChange
    around = one_color(image, ring, rng)
    _, deviation = grain_of(image)
    difference = np.abs(image - spread(blur(image, 0.6), shrink(around, 1) if shrink(around, 1).any() else around))
    thing = blur(difference.max(-1), 0.4) > max(DISTINCT, 4 * deviation)
    border = np.zeros_like(thing)
    border[[0, -1]] = border[:, [0, -1]] = True
    beyond = flood(border, thing) if thing[border].mean() > 0.5 else np.zeros_like(thing)
    thing &= ~beyond
    if (thing & core).sum() < LEAST_PART:
        raise NoChange
    return thing, beyond


def one_color(image: np.ndarray, where: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """All pixels of a colour that is frequent in `where`: drawn by the square of its share there.

    The image's colours are brought to three to eight (median cut, then k-means, of a reduced image).
    """
    picture = Image.fromarray(np.clip(image + 0.5, 0, 255).astype(np.uint8))
    small = picture.reduce(max(1, max(picture.size) // PALETTE_SIDE))
    palette = small.quantize(int(rng.integers(3, 9)), Image.Quantize.MEDIANCUT, kmeans=2).getpalette()
    distances = [((image - color) ** 2).sum(-1) for color in np.array(palette, np.float32).reshape(-1, 3)]
    labels = np.argmin(distances, axis=0)
    shares = np.bincount(labels[where]).astype(float) ** 2
    return labels == rng.choice(len(shares), p=shares / shares.sum())


def part_in(image: np.ndarray, region: np.ndarray, rng: np.random.Generator) -> Part:
    """A part that touches the region.

    Several are looked at: what is thin there, whole, which is what an opening takes away from the thing (fingers, limbs, ears,
    eyes); and what lies in the region and hangs together, cut where the region ends. The one is taken that is large and little
    cut: whose outline belongs to its surroundings and not to the rest of its thing.

    Raises:
        NoChange: there is none.
    """
    image, region, reduction = reduced(image, region)
    thing, beyond = thing_in(image, region, rng)
    core = region > 0.5
    radius = _radius(core)
    seeds = np.argwhere(thing & core)
    best = 0.0, None, None
    for number in range(CANDIDATES):
        seed = np.zeros_like(core)
        seed[tuple(seeds[rng.integers(len(seeds))])] = True
        if number % 3:
            width = max(1, round(radius * rng.uniform(0.2, 0.9)))
            within = thing & ~grow(shrink(thing, width), width)
        else:
            within = thing & (region > 0.02)
        mask = without_holes(flood(seed, within))
        if not LEAST_PART <= mask.sum() <= 0.3 * mask.size or np.ptp(np.argwhere(mask), 0).max() > 4 * radius:
            continue
        if not shrink(mask, 1).any():  # a contour alone is no part
            continue
        outline = grow(mask, 1) & ~mask
        own = (outline & ~thing).sum() / max(1, outline.sum())
        score = own**2 * np.sqrt(mask.sum())
        if own > LEAST_OUTLINE and score > best[0]:
            best = score, mask, flood(seed, thing) & ~mask
    _, mask, rest = best
    if mask is None:
        raise NoChange
    return Part(mask, rest, thing | mask, beyond & ~mask, reduction)


def reduced(image: np.ndarray, region: np.ndarray) -> tuple[np.ndarray, np.ndarray, Reduction]:
    """Image and region so small that the region's radius is at most `FINE_RADIUS`."""
    factor = max(1, int(np.ceil(_radius(region > 0.5) / FINE_RADIUS)))
    reduction = Reduction(factor, region.shape)
    if factor == 1:
        return image, region, reduction
    picture = Image.fromarray(np.clip(image + 0.5, 0, 255).astype(np.uint8)).reduce(factor)
    return np.asarray(picture, np.float32), np.asarray(Image.fromarray(region).reduce(factor)), reduction


def enlarged(mask: np.ndarray, reduction: Reduction) -> np.ndarray:
    """A mask of the reduced image in the image, its edge smoothed."""
    if reduction.factor == 1:
        return mask
    return _enlarged(blur(mask.astype(np.float32), 0.7), reduction) > 0.5


def _enlarged(values: np.ndarray, reduction: Reduction) -> np.ndarray:
    if reduction.factor == 1:
        return values
    y, x = ((np.arange(side, dtype=np.float32) + 0.5) / reduction.factor - 0.5 for side in reduction.shape)
    return sample(values[..., None], *np.meshgrid(y, x, indexing="ij"))[..., 0]


def cut_out(image: np.ndarray, part: Part) -> np.ndarray:
    """(H, W, 4): the part's own colours, continued beyond it, and how much of each pixel is its, in [0, 1].

    Pixels at its contour are a mixture of its colour F and the surroundings' B: with both continued from either side, the share is
    a = (I - B)(F - B) / |F - B|^2. Where it goes over into its thing, the share falls off over a few pixels.
    """
    mask, rest, thing = part.mask, part.rest, part.thing
    contour = grow(mask, 1) & ~shrink(thing, 1) & ~rest
    inside = mask & ~contour
    if inside.sum() < 3:  # all contour
        inside = mask
    outside = ~grow(thing | part.beyond, 1)
    if not outside.any():
        outside = ~mask
    attached = grow(rest, 3)  # soft towards the thing, sharp towards the surroundings
    softly = np.clip(2 * blur(mask.astype(np.float32), 1.2) - 0.6, 0, 1)
    softly = _enlarged(np.where(attached, softly, 1), part.reduction)
    mask, contour, inside, outside = (enlarged(pixels, part.reduction) for pixels in (mask, contour, inside, outside))

    own, behind = spread(image, inside), spread(image, outside)
    direction = own - behind
    share = ((image - behind) * direction).sum(-1) / np.maximum((direction**2).sum(-1), 400.0)
    weight = np.where(contour, np.clip(share, 0, 1), mask) * softly
    return np.concatenate([np.where(inside[..., None], image, own), weight[..., None]], -1).astype(np.float32)


def without(image: np.ndarray, part: Part, rng: np.random.Generator) -> np.ndarray:
    """The image with the surroundings of its thing where the part was, and where it mixed with them; and where the thing was cut
    it gets the contour that it has elsewhere.

    Raises:
        NoChange: there are no surroundings to fill it with.
    """
    hole = grow(part.mask, 2) & ~part.rest
    other = part.thing | part.beyond
    known = ~grow(other, 2)
    if not (known & grow(hole, 8)).any():
        known = ~other & ~hole
    hole, known = enlarged(hole, part.reduction), enlarged(known, part.reduction)
    if not (known & ~hole).any():
        raise NoChange
    filled = np.where(hole[..., None], fill(image, hole, known, rng), image)
    return contoured(filled, image, part.thing, part.rest, grow(part.mask, CONTOUR), part.reduction)


def contoured(
    new: np.ndarray, old: np.ndarray, before: np.ndarray, after: np.ndarray, where: np.ndarray, reduction: Reduction
) -> np.ndarray:
    """The new image, in which a thing has another outline than in the old one, with its contour along that.

    Drawings are darker (or brighter) at their edge than a few pixels inside. The difference is the median, for each depth, over the
    old edge nearby; where there is none, as in photographs, nothing changes.

    Args:
        new, old: (H, W, 3).
        before, after: the thing's pixels in the old image and in the new one, reduced.
        where: the new outline is looked for here, reduced.
        reduction: by which the masks are.
    """
    inside, near = after & ~grow(~before, CONTOUR), grow(where, 3 * CONTOUR)
    if not (inside & near).any():
        return new
    small = old
    if reduction.factor > 1:
        picture = Image.fromarray(np.clip(old + 0.5, 0, 255).astype(np.uint8))
        small = np.asarray(picture.reduce(reduction.factor), np.float32)
    difference = (small - spread(small, inside)).mean(-1)
    change = np.zeros(before.shape, np.float32)
    shallower = ~before, ~after
    for depth in range(1, CONTOUR + 1):
        deeper = grow(~before, depth), grow(~after, depth)
        edge, new_edge = (after & wide & ~narrow for wide, narrow in zip(deeper, shallower))
        if (edge & near).sum() >= LEAST_PART:
            change[new_edge & where & ~(before & deeper[0])] = np.median(difference[edge & near])
        shallower = deeper
    return new + _enlarged(change, reduction)[..., None]


def moved(
    values: np.ndarray,
    pivot: np.ndarray,
    degrees: float = 0.0,
    scale: float = 1.0,
    shift: tuple[float, float] = (0.0, 0.0),
    mirrored: bool = False,
) -> np.ndarray:
    """`values` (H, W, C) turned around `pivot` (y, x), scaled, and shifted by (dy, dx) pixels; 0 where nothing came to lie."""
    height, width = values.shape[:2]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    y, x = y - pivot[0] - shift[0], x - pivot[1] - shift[1]
    turn = np.deg2rad(degrees)
    x, y = (np.cos(turn) * x + np.sin(turn) * y) / scale, (np.cos(turn) * y - np.sin(turn) * x) / scale
    y, x = y + pivot[0], (-x if mirrored else x) + pivot[1]
    inside = (y > -1) & (y < height) & (x > -1) & (x < width)
    return sample(values, y, x) * inside[..., None]


def laid(image: np.ndarray, layer: np.ndarray, only_on: np.ndarray | None = None) -> np.ndarray:
    """The image under a layer (H, W, 4) of colours and their weight, which is seen only where `only_on` (H, W) has weight."""
    share = np.clip(layer[..., 3:], 0, 1) * (1 if only_on is None else only_on[..., None])
    return image + share * (layer[..., :3] - image)


def _radius(mask: np.ndarray) -> float:
    return float(np.sqrt(mask.sum() / np.pi))
