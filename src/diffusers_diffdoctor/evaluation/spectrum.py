# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Grids and stripes, which tuning for a reward breeds, as isolated peaks of an image's spectrum. Formula and limits are ours.

The power of an image at each frequency is that of windowed tiles of 64 pixels, in decibels, averaged over the tiles (Welch's
method, with a geometric mean: what is in one corner counts little, what goes over the whole image counts whole). A natural
spectrum falls smoothly with the frequency, and has streaks where an image has straight edges; what stands above both its ring (the
same frequency in other directions) and its ray (the same direction at other frequencies) is a pattern that repeats.
The same is done at half the size, and again, as long as a tile fits twice, so that coarse grids of large images count like fine ones.

Tiles make the figure that of the pattern, not of the image's size: a grid has the same height at 64 and at 1024 pixels.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F


TILE = 64  # pixels of a side
MOST = 12  # tiles in a row
FAINT = 0.01  # standard deviation of a noise too faint to see, in images in [0, 1]: the power below it counts as it
LOWEST = 4 / TILE  # cycles per pixel: below, it is the picture's composition
LOG_NOISE = 5.57  # dB, standard deviation of the logarithm of one power of noise, 10 / ln 10 * pi / sqrt 6
CERTAIN = 3.0  # standard errors of the mean spectrum that count as chance


def log_spectra(images: torch.Tensor) -> list[torch.Tensor]:
    """The power of images at each frequency, at full size, half of it, and so on.

    Args:
        images: (B, 3, H, W) in [0, 1].

    Returns:
        For each size a tensor (B, T, T), in dB over [`FAINT`], at least 0, in the order of `torch.fft.fft2`; T is [`TILE`], or the
        short side of smaller images.

    Raises:
        ValueError: another shape or type, or a side below 16 pixels.
    """
    if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[-2:]) < 16 or not images.is_floating_point():
        raise ValueError(
            "`images` must be float (B, 3, H, W) in [0, 1] with sides of 16 pixels or more, found "
            f"{images.dtype} {tuple(images.shape)}."
        )
    spectra = [torch.stack([_log_spectrum(image.float()) for image in images])]
    while min(images.shape[-2:]) >= 2 * TILE:
        images = F.avg_pool2d(images, 2)
        spectra.append(torch.stack([_log_spectrum(image.float()) for image in images]))
    return spectra


def _log_spectrum(image: torch.Tensor) -> torch.Tensor:
    """(3, H, W) -> (T, T), dB."""
    size = min(TILE, *image.shape[-2:])
    rows, columns = (_starts(side, size) for side in image.shape[-2:])
    tiles = torch.stack([image[:, y : y + size, x : x + size] for y in rows for x in columns])
    window = torch.hann_window(size, device=image.device)
    window = window[:, None] * window
    tiles = (tiles - (tiles * window).sum((2, 3), keepdim=True) / window.sum()) * window
    power = torch.fft.fft2(tiles).abs().square().mean(1) / window.square().sum()  # of white noise: its variance
    return 10 * torch.log10(1 + power / FAINT**2).mean(0)


def _starts(side: int, size: int) -> list[int]:
    """Where tiles begin that cover the side and overlap by half or a little more; at most [`MOST`], spread evenly over it."""
    gaps = min(math.ceil(2 * (side - size) / size), MOST - 1)
    return [round(i * (side - size) / gaps) for i in range(gaps + 1)] if gaps else [0]


def _peaks(spectra: torch.Tensor) -> torch.Tensor:
    """(B, T, T) -> (B,), dB: how far the frequency that stands out most is above the median of its ring and of its ray."""
    neighbours, counted = _neighbours(spectra.shape[-1])
    flat = spectra.flatten(1).cpu()
    padded = torch.cat([flat, torch.full_like(flat[:, :1], math.nan)], dim=1)  # what index -1 finds
    ring, ray = (padded[:, indices].nanmedian(-1).values for indices in neighbours)
    above = flat - torch.fmax(ring, ray)
    return above[:, counted].amax(1)


@lru_cache(maxsize=4)
def _neighbours(size: int) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """For each frequency the indices of its ring (T^2, M) and of its ray (T^2, N), -1 for none, and whether it counts (T^2,)."""
    y, x = (part.flatten() * size for part in torch.meshgrid(*[torch.fft.fftfreq(size)] * 2, indexing="ij"))
    radius = torch.hypot(x, y)

    def index(x, y):
        inside = (x.abs() <= size / 2) & (y.abs() <= size / 2) & (torch.hypot(x, y) >= size * LOWEST / 2)
        return torch.where(inside, y.round().long() % size * size + x.round().long() % size, -1)

    turns = torch.linspace(0.1, 0.9, 25) * math.pi
    ring = index(
        x[:, None] * turns.cos() - y[:, None] * turns.sin(), x[:, None] * turns.sin() + y[:, None] * turns.cos()
    )
    steps = torch.tensor([-9, -8, -7, -6, -5, -4, -3, 3, 4, 5, 6, 7, 8, 9])
    along = (radius[:, None] + steps).clamp(min=0) / radius[:, None].clamp(min=1)
    ray = index(x[:, None] * along, y[:, None] * along)
    return (ring, ray), radius >= size * LOWEST


def spectral_peaks(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) in [0, 1] -> (B,), dB: how far a pattern that repeats all over the image stands out of its spectrum.

    `max over f of L(f) - max(median of L on the ring of f, median of L on the ray of f)`, with L the spectrum of [`log_spectra`];
    the greatest of all sizes. Noise of any colour stays below 10 dB; drawings with hard edges reach 17. What truly repeats, a
    fence, a fabric or lines of text, stands out as a grid does: compare with other images of the same prompts
    ([`spectral_growth`]).
    """
    return torch.stack([_peaks(spectra) for spectra in log_spectra(images)]).amax(0)


def spectral_growth(before: torch.Tensor, after: torch.Tensor) -> float:
    """Images of the same prompts and seeds before and after, (B, 3, H, W) in [0, 1] each -> dB: how much a pattern that they have
    in common grew.

    As [`spectral_peaks`], of the mean over the images of `L_after - L_before`, less what chance explains (three standard errors,
    `3 * 5.57 dB * sqrt(2 / (B * tiles))`), so that few or small images do not seem to have one. Below 0 nothing grew. What the images
    repeated before, and what only one of them repeats, does not count.

    Raises:
        ValueError: the images do not have one shape.
    """
    if before.shape != after.shape:
        raise ValueError(
            "`before` and `after` must be images of the same prompts and seeds, found shapes "
            f"{tuple(before.shape)} and {tuple(after.shape)}."
        )
    return growth(mean_spectra(before), mean_spectra(after), len(after), tuple(after.shape[-2:]))


def mean_spectra(images: torch.Tensor) -> list[torch.Tensor]:
    """[`log_spectra`] as the mean over the images, each (T, T), on the CPU: what [`growth`] needs to know of them."""
    return [spectra.mean(0).cpu() for spectra in log_spectra(images)]


def growth(before: list[torch.Tensor], after: list[torch.Tensor], count: int, size: tuple[int, int]) -> float:
    """[`spectral_growth`] by the [`mean_spectra`] of `count` images of `size` (height, width)."""
    found = []
    for scale, (old, new) in enumerate(zip(before, after)):
        tiles = math.prod(min(MOST, max(1, (side >> scale) // TILE)) for side in size)
        chance = CERTAIN * LOG_NOISE * math.sqrt(2 / (count * tiles))
        found.append(_peaks((new - old)[None]).item() - chance)
    return max(found)
