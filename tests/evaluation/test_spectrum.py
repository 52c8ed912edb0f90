# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Grids and stripes are found however they are turned and however large the image; what is no grid is not taken for one."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from diffusers_diffdoctor.evaluation import spectral_growth, spectral_peaks
from diffusers_diffdoctor.evaluation.spectrum import growth, mean_spectra
from diffusers_diffdoctor.miniature.renderer import render, sample_scene


ALARM = 3.0  # dB, `spectral_alarm`'s default


def noise(count: int, side: int, beta: float, seed: int = 0) -> torch.Tensor:
    """Noise whose amplitude falls as 1 / f ** beta: 0 is white, 1 that of photographs."""
    white = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))
    frequency = torch.hypot(torch.fft.fftfreq(side)[:, None], torch.fft.fftfreq(side))
    frequency[0, 0] = 1 / side
    images = torch.fft.ifft2(torch.fft.fft2(white) * frequency**-beta).real
    return (0.5 + 0.15 * images / images.std((1, 2, 3), keepdim=True)).clamp(0, 1)


def pattern(
    side: int, period: float, angle: float = 0.0, strength: float = 0.05, crossed: bool = False
) -> torch.Tensor:
    """Stripes, or both sorts of stripes; `strength` is the amplitude of each."""
    y, x = torch.meshgrid(torch.arange(side).float(), torch.arange(side).float(), indexing="ij")
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    stripes = torch.cos(2 * math.pi * along / period)
    return strength * (stripes + crossed * torch.cos(2 * math.pi * across / period))


def scenes(count: int) -> torch.Tensor:
    rng = np.random.default_rng(3)
    drawn = np.stack([render(sample_scene(rng, 0.5))[0] for _ in range(count)])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255


def compressed(images: torch.Tensor, quality: int) -> torch.Tensor:
    result = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()).save(file, "JPEG", quality=quality)
        result.append(torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).float() / 255)
    return torch.stack(result)


def page(side: int, size: int, seed: int = 0) -> torch.Tensor:
    picture = Image.new("RGB", (side, side), "white")
    words, rng = "sphinx of black quartz judge my vow".split(), np.random.default_rng(seed)
    for y in range(3, side, int(1.4 * size)):
        text = " ".join(rng.choice(words, 30))
        ImageDraw.Draw(picture).text((3, y), text, fill="black", font=ImageFont.load_default(size))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("side", [64, 256])
@pytest.mark.parametrize("period, angle", [(2.5, 0.3), (5.3, 1.2), (8, 0.0)])
def test_stripes_stand_out_at_every_size_and_angle(side, period, angle):
    clean = noise(2, side, 1.0)
    assert spectral_peaks(clean).max() < 10
    for crossed in (False, True):
        striped = (clean + pattern(side, period, angle, 0.1, crossed)).clamp(0, 1)
        assert spectral_peaks(striped).min() > 14


def test_the_figure_is_that_of_the_pattern_not_of_the_size():
    figures = [spectral_peaks(noise(2, side, 0.0) + pattern(side, 4, 0.4)).mean().item() for side in (64, 200, 1024)]
    assert max(figures) - min(figures) < 3  # a pattern 65 times as strong would have 18 more


def test_coarse_grids_of_large_images_are_found_at_half_the_size():
    for period in (16, 32):
        image = (noise(1, 256, 1.0) + pattern(256, period, 0.0, 0.05, crossed=True)).clamp(0, 1)
        assert spectral_peaks(image) > 14


@pytest.mark.parametrize("side", [64, 256])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 1.5])
def test_noise_of_no_colour_stands_out(side, beta):
    assert spectral_peaks(noise(4, side, beta)).max() < 10


def test_a_faint_grid_in_all_images_is_growth_and_changes_that_are_none_are_not():
    before = scenes(32)
    for period, angle, strength in ((4, 0.5, 0.02), (2.5, 0.0, 0.02), (8, 0.3, 0.05)):
        assert spectral_growth(before, (before + pattern(64, period, angle, strength)).clamp(0, 1)) > ALARM
    blurred = torch.nn.functional.avg_pool2d(before, 3, 1, 1)
    noisy = (before + 0.05 * (noise(32, 64, 0.0) - 0.5)).clamp(0, 1)
    sharper = (2 * before - blurred).clamp(0, 1)
    for after in (before, blurred, noisy, sharper, before.flip(3), compressed(before, 85), compressed(before, 30)):
        assert spectral_growth(before, after) < ALARM
    one = before.clone()
    one[:2] += pattern(64, 4, 0.5, 0.1)
    assert spectral_growth(before, one.clamp(0, 1)) < ALARM  # what two images of 32 repeat is theirs


@pytest.mark.parametrize("count", [4, 8, 16])
def test_few_images_of_other_things_are_no_growth(count):
    """Neither fresh noise nor other scenes: chance alone."""
    drawn = scenes(8 * count).split(count)
    for first, second in zip(drawn[::2], drawn[1::2]):
        assert spectral_growth(first, second) < ALARM
    for seed in range(4):
        assert spectral_growth(noise(count, 64, 1.0, seed), noise(count, 64, 1.0, 100 + seed)) < ALARM


def test_text_repeats_before_and_after_and_so_is_no_growth():
    pages = torch.cat([page(256, size, seed) for seed in range(2) for size in (9, 14)])
    assert spectral_peaks(pages).min() > 14  # lines of text do repeat
    other = torch.cat([page(256, size, 10 + seed) for seed in range(2) for size in (9, 14)])
    assert spectral_growth(pages, other) < ALARM
    assert spectral_growth(pages, (pages + pattern(256, 5, 0.6, 0.1)).clamp(0, 1)) > ALARM


def test_hard_compression_of_smooth_images_is_a_grid():
    """Blocks of 8x8 pixels over the whole image are one; where compression is not to count, both sides have it."""
    smooth = noise(4, 256, 2.0)
    hard = compressed(smooth, 5)
    assert spectral_growth(smooth, hard) > ALARM > spectral_growth(hard, compressed(noise(4, 256, 2.0, seed=1), 5))


def test_the_spectra_are_all_that_growth_needs():
    before, after = noise(3, 130, 1.0), noise(3, 130, 1.0) + pattern(130, 4)
    found = growth(mean_spectra(before), mean_spectra(after), 3, (130, 130))
    assert found == pytest.approx(spectral_growth(before, after))


def test_flat_images_have_no_pattern():
    assert spectral_peaks(torch.full((2, 3, 64, 64), 0.5)).max() == 0


def test_what_is_no_pair_of_images_is_refused():
    with pytest.raises(ValueError, match="`images` must be float"):
        spectral_peaks(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="`before` and `after` must be images of the same prompts"):
        spectral_growth(torch.zeros(1, 3, 64, 64), torch.zeros(2, 3, 64, 64))
