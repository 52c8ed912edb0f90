# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""From a sound image to a wrong one and its artifact map."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .decoys import retouch
from .kinds import distort, duplicate, fuse, melt, misplace, omit, seam, watermark
from .parts import NoChange
from .pixels import grow, keeping_grain
from .regions import blob, choose_place, saliency


Place = tuple[slice, slice]
Kind = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]

KINDS: dict[str, Kind] = {
    kind.__name__: kind for kind in (duplicate, omit, misplace, distort, fuse, melt, watermark, seam)
}
# Local mistakes of anatomy are what detectors are for.
WEIGHTS = {
    "duplicate": 0.24,
    "omit": 0.24,
    "misplace": 0.14,
    "fuse": 0.12,
    "distort": 0.1,
    "melt": 0.06,
    "watermark": 0.06,
    "seam": 0.04,
}
COUNTS = {1: 0.6, 2: 0.25, 3: 0.15}  # injections in an image -> share of the images
DIFFERENCE = 18  # of 255; smaller differences between the wrong image and the sound one cannot be seen
LEAST_AREA, MOST_AREA = 0.004, 0.35  # share of the image's pixels that an injection visibly changes
LEAST_MEAN = 45  # of 255: mean difference of the pixels that it visibly changes
KINDS_TRIED, TRIES = 4, 20  # for one injection, and places for each of them
DECOYS = 3  # at most, in an image that gets decoys


@dataclass(frozen=True)
class Injected:
    """An image uint8 (H, W, 3), its artifact map uint8 (H, W), 255 = wrong, and the kinds of what is wrong with it."""

    image: np.ndarray
    artifact_map: np.ndarray
    kinds: tuple[str, ...]


def visible(new: np.ndarray, old: np.ndarray) -> np.ndarray:
    """Where two images differ so that one can see it, as a mask (H, W): by more than `DIFFERENCE` in a channel."""
    return _difference(new, old) > DIFFERENCE


def _difference(new: np.ndarray, old: np.ndarray) -> np.ndarray:
    return np.abs(new.astype(np.int16) - old).max(-1)


def inject(
    image: np.ndarray,
    rng: np.random.Generator,
    kinds: Mapping[str, float] = WEIGHTS,
    boxes: Sequence[Sequence[float]] | None = None,
    least_size: float = 0.08,
    most_size: float = 1 / 3,
    counts: Mapping[int, float] = COUNTS,
    decoys: float = 0.5,
    functions: Mapping[str, Kind] = KINDS,
    retouches: Sequence[Kind] = (retouch,),
) -> Injected:
    """Spoil a sound image in one or several places.

    The map is where the wrong image visibly differs from the sound one, as it is where two renderings of one scene differ, grown by a
    hundredth of the shorter side, at least one pixel.

    Args:
        image: uint8 (H, W, 3).
        rng: source of chance; everything follows from it.
        kinds: names of `functions` with their weights; without any the image stays sound.
        boxes: (x1, y1, x2, y2) in pixels, where to inject; see [`choose_place`].
        least_size, most_size: diameters of regions, in shares of the shorter side.
        counts: numbers of injections with their weights.
        decoys: chance in [0, 1] that one to three regions are retouched first, with the same tools, and stay sound.
        functions: the kinds by their names.
        retouches: the functions that retouch, one of which is chosen each time.

    Returns:
        The wrong image. Where no injection could be seen, which is so in flat images, `kinds` is empty and the map zero.
    """
    sound, weights = image.copy(), saliency(image)
    if rng.random() < decoys:
        for _ in range(rng.integers(1, DECOYS + 1)):
            retouch_one(retouches[rng.integers(len(retouches))], sound, weights, rng, least_size, most_size)
    result, names = sound.copy(), []
    count = int(rng.choice(list(counts), p=_shares(counts))) if kinds else 0
    for _ in range(count):
        for name in rng.choice(list(kinds), KINDS_TRIED, p=_shares(kinds)):
            change = _found(functions[str(name)], result, sound, weights, rng, least_size, most_size, boxes)
            if change is not None:
                place, pixels = change
                result[place] = pixels
                names.append(str(name))
                break
    wrong = visible(result, sound)
    growth = max(1, round(min(wrong.shape) / 100))
    return Injected(result, grow(wrong, growth) * np.uint8(255), tuple(names))


def _found(
    kind: Kind, image: np.ndarray, sound: np.ndarray, weights: np.ndarray, rng: np.random.Generator, *where
) -> tuple[Place, np.ndarray] | None:
    """One injection of this kind that can be seen, half transparent in one of seven; None where there is no place for it."""
    for _ in range(TRIES):
        opacity = rng.uniform(0.5, 0.9) if rng.random() < 0.15 else 1.0
        change = _applied(kind, image, weights, rng, *where, opacity=opacity)
        if change is not None and _is_strong(*change, image, sound):
            return change
    return None


def _is_strong(place: Place, pixels: np.ndarray, before: np.ndarray, sound: np.ndarray) -> bool:
    """Whether the new pixels can well be seen, against those before as well as against the sound ones, and are not too many."""
    size = sound.shape[0] * sound.shape[1]
    for image in (before, sound):
        difference = _difference(pixels, image[place])
        seen = difference[difference > DIFFERENCE]
        if not max(4, LEAST_AREA * size) <= len(seen) <= MOST_AREA * size or seen.mean() < LEAST_MEAN:
            return False
    return True


def _shares(weights: Mapping) -> np.ndarray:
    values = np.array(list(weights.values()), float)
    return values / values.sum()


def _applied(
    kind: Kind,
    image: np.ndarray,
    weights: np.ndarray,
    rng: np.random.Generator,
    least_size: float,
    most_size: float,
    boxes: Sequence[Sequence[float]] | None = None,
    opacity: float = 1.0,
) -> tuple[Place, np.ndarray] | None:
    """One injection at a place of its choice: where, and the new pixels there; None where there was nothing to spoil."""
    center, radius, limits = choose_place(weights, image.shape[:2], rng, least_size, most_size, boxes)
    reach = 4 * radius + 4  # a window is enough, and of a large image much faster
    top, left = (max(limit, int(at - reach)) for limit, at in zip(limits[:2], center))
    bottom, right = (min(limit, int(np.ceil(at + reach))) for limit, at in zip(limits[2:], center))
    if min(bottom - top, right - left) < 8:
        return None
    window = image[top:bottom, left:right].astype(np.float32)
    region = blob(window.shape[:2], (center[0] - top, center[1] - left), radius, rng, rng.uniform(0.15, 0.5))
    try:
        new = keeping_grain(lambda drawn: kind(drawn, region, rng), window, rng)
    except NoChange:
        return None
    cut = top > 0, bottom < image.shape[0], left > 0, right < image.shape[1]
    weight = opacity * _fading(window.shape[:2], cut)
    new = window + weight[..., None] * (new - window)
    return np.s_[top:bottom, left:right], np.clip(new + 0.5, 0, 255).astype(np.uint8)


def _fading(shape: tuple[int, int], cut: tuple[bool, bool, bool, bool]) -> np.ndarray:
    """1 within a window and falling to 0 at those of its sides (top, bottom, left, right) that are cut out of the image."""
    edge = max(2.0, min(shape) / 16)
    sides = []
    for length, before, after in ((shape[0], *cut[:2]), (shape[1], *cut[2:])):
        at = np.arange(length, dtype=np.float32)
        weight = np.ones(length, np.float32)
        if before:
            weight = np.minimum(weight, at / edge)
        if after:
            weight = np.minimum(weight, (length - 1 - at) / edge)
        sides.append(weight)
    return np.minimum(sides[0][:, None], sides[1][None])


def retouch_one(
    way: Kind, image: np.ndarray, weights: np.ndarray, rng: np.random.Generator, least_size: float, most_size: float
) -> None:
    """Retouch one region of the image in place, if a way is found that cannot be seen."""
    for _ in range(TRIES // 2):
        change = _applied(way, image, weights, rng, least_size, most_size)
        if (
            change is not None
            and (change[1] != image[change[0]]).any()
            and not visible(change[1], image[change[0]]).any()
        ):
            image[change[0]] = change[1]
            return
