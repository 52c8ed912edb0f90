# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
import colorsys
import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_diffdoctor.detector.augmentation import (
    PRESETS,
    Augmentation,
    blurred,
    from_picture,
    moved,
    recolored,
    to_picture,
)


def picture(height=48, width=64, seed=0):
    """Smooth waves with some noise, so that both resampling and compression leave traces, on 8-bit levels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / rng.uniform(3, 9)) + np.cos(y / rng.uniform(3, 9)) for _ in range(3)]
    values = np.stack(waves) * 50 + 128 + rng.normal(0, 6, (3, height, width))
    return torch.from_numpy(values.clip(0, 255).round()).float() / 255


def square_map(height=48, width=64):
    artifact_map = torch.zeros(1, height, width)
    artifact_map[:, 10:20, 30:45] = 0.8
    return artifact_map


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_without_probabilities_nothing_happens():
    image, artifact_map = picture(), square_map()
    for augmentation in (Augmentation(), PRESETS["none"], Augmentation(shrink_probability=1.0)):
        new_image, new_map = augmentation(image, artifact_map, seeded(0))
        assert torch.equal(new_image, picture()) and torch.equal(new_map, square_map())


def dot(x, y, height, width):
    """A disc of two pixels around a point, in the image as in the map."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    disc = torch.from_numpy(((columns - x) ** 2 + (rows - y) ** 2 <= 4).astype(np.float32))[None]
    return disc.expand(3, -1, -1).clone(), disc


def centre(values):
    rows, columns = np.mgrid[: values.shape[0], : values.shape[1]] + 0.5
    return np.array([(values * columns).sum(), (values * rows).sum()]) / values.sum()


def test_geometry_moves_image_and_map_alike():
    """A dot lands where the forward map, written down by itself, takes it: all of geometry combined, 200 times."""
    rng, height, width, seen = np.random.default_rng(0), 60, 84, 0
    for _ in range(200):
        x, y = rng.uniform(5, width - 5), rng.uniform(5, height - 5)
        scale, angle, flip = rng.uniform(0.6, 1.8), rng.uniform(-180, 180), bool(rng.integers(2))
        shift = rng.uniform(-15, 15, 2)
        image, artifact_map = dot(x, y, height, width)
        image, artifact_map = moved(image, artifact_map, scale, angle, tuple(shift), flip, reflect=False)
        from_centre = complex((x - width / 2) * (-1 if flip else 1), -(y - height / 2))  # up is positive
        turned = from_centre * scale * np.exp(1j * math.radians(angle))
        expected = np.array([turned.real + width / 2 + shift[0], -turned.imag + height / 2 + shift[1]])
        counted = (artifact_map[0] >= 0).numpy()
        label = artifact_map[0].clamp(min=0).numpy()
        if (expected > 5).all() and (expected < (width - 5, height - 5)).all() and label.sum() > 0:
            seen += 1
            assert np.abs(centre(label) - expected).max() < 0.8
            # its mean colour lies outside the image
            assert np.abs(centre(image[0].numpy() * counted * (image[0].numpy() > 0.2)) - expected).max() < 0.6
        elif ((expected < -6) | (expected > (width + 6, height + 6))).any():
            assert label.sum() == 0 and (image[0].numpy() * counted).max() < 0.05
    assert seen > 60


def test_an_augmented_dot_stays_under_its_label():
    augment = Augmentation(flip_probability=0.5, move_probability=0.7, rotation=40.0, shrink_others_probability=0.3)
    rng, generator, seen = np.random.default_rng(1), seeded(1), 0
    for _ in range(200):
        image, artifact_map = augment(*dot(*rng.uniform(10, 50, 2), 60, 60), generator)
        label = (artifact_map[0] == 1).numpy()
        edge = np.concatenate([label[0], label[-1], label[:, 0], label[:, -1]]).any()
        if label.sum() < 4 or edge:
            continue
        seen += 1
        bright = image[0].numpy() * (artifact_map[0] >= 0).numpy()
        assert np.abs(centre(bright * (bright > bright.max() / 3)) - centre(label)).max() < 0.8
    assert seen > 120


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_quarter_turns_and_mirrors_are_exact(turns):
    image, artifact_map = picture(64, 64), square_map(64, 64)
    new_image, new_map = moved(image, artifact_map, angle=90 * turns, flip=True)
    torch.testing.assert_close(new_image, torch.rot90(image.flip(-1), turns, (-2, -1)), atol=1e-5, rtol=0)
    assert torch.equal(new_map, torch.rot90(artifact_map.flip(-1), turns, (-2, -1)))
    oblong, oblong_map = picture(48, 80), square_map(48, 80)
    new_image, new_map = moved(oblong, oblong_map, angle=180)
    torch.testing.assert_close(new_image, oblong.flip(-1, -2), atol=1e-4, rtol=0)
    assert torch.equal(new_map, oblong_map.flip(-1, -2))


@pytest.mark.parametrize("reflect", [False, True])
def test_what_comes_from_outside_does_not_count(reflect):
    image, artifact_map = picture(32, 32), square_map(32, 48)[:, :, 16:]
    new_image, new_map = moved(image, artifact_map, shift=(8, 0), reflect=reflect)
    assert torch.equal(new_map[:, :, 8:], artifact_map[:, :, :-8]) and (new_map[:, :, :8] == -1).all()
    outside = image[:, :, :8].flip(-1) if reflect else image.mean(dim=(1, 2))[:, None, None].expand(3, 32, 8)
    torch.testing.assert_close(new_image[:, :, 8:], image[:, :, :-8], atol=1e-5, rtol=0)
    torch.testing.assert_close(new_image[:, :, :8], outside, atol=1e-5, rtol=0)


def test_a_map_is_never_blended():
    """Turned and scaled, no pixel gets a value between those of its neighbours, nor one that is not to count."""
    artifact_map = square_map()
    artifact_map[:, 25:40, 5:15] = -1
    for seed in range(20):
        _, new = PRESETS["strong"](picture(), artifact_map, seeded(seed))
        assert set(new.unique().tolist()) <= {-1.0, 0.0, artifact_map.max().item()}


def test_colours_by_their_formulas():
    image = picture().numpy().astype(np.float64)
    luma = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
    expected = {
        "brightness": image * 1.3,
        "contrast": luma.mean() + 1.3 * (image - luma.mean()),
        "saturation": luma + 1.3 * (image - luma),
    }
    for name, values in expected.items():
        found = recolored(picture(), **{name: 1.3}).numpy()
        assert np.abs(found - values.clip(0, 1)).max() < 1e-5, name
    both = recolored(picture(), brightness=0.9, contrast=0.8, saturation=0.7)
    apart = recolored(recolored(recolored(picture(), brightness=0.9), contrast=0.8), saturation=0.7)
    torch.testing.assert_close(both, apart, atol=1e-5, rtol=0)  # nothing is cut here


def test_hues_turn_in_the_plane_of_chroma():
    """By the standard library's YIQ, whose coefficients are rounded."""
    pale = 0.4 + 0.2 * picture()
    for hue in (-0.3, 0.05, 0.5):
        before, after = pale[:, ::8, ::8].reshape(3, -1).T, recolored(pale, hue=hue)[:, ::8, ::8].reshape(3, -1).T
        for old, new in zip(before.tolist(), after.tolist()):
            (luma, *old_chroma), (new_luma, *new_chroma) = colorsys.rgb_to_yiq(*old), colorsys.rgb_to_yiq(*new)
            expected = complex(*old_chroma) * np.exp(2j * np.pi * hue)
            assert abs(luma - new_luma) < 3e-3 and abs(complex(*new_chroma) - expected) < 3e-3


def test_blur_is_a_gaussian():
    """Of a point, the bell of that width, in two dimensions at once; and nothing gets darker at an edge."""
    point = torch.zeros(3, 41, 51)
    point[1, 20, 25] = 1
    for deviation in (0.7, 2.0):
        found = blurred(point, deviation).double()
        y, x = np.mgrid[-20:21, -25:26]
        expected = np.exp(-(x**2 + y**2) / (2 * deviation**2))
        assert np.abs(found[1].numpy() - expected / expected.sum()).max() < 5e-3 * found.max()
        assert (found[::2] == 0).all()
    white = torch.ones(3, 5, 5)
    torch.testing.assert_close(blurred(white, 3.0), white)


def test_noise_is_white_and_as_strong_as_said():
    gray = torch.full((3, 128, 128), 0.5)
    noise = Augmentation(noise_probability=1.0, noise=(0.03, 0.03))(gray, gray[:1] * 0, seeded(0))[0] - gray
    assert noise.std().item() == pytest.approx(0.03, rel=0.02) and abs(noise.mean().item()) < 5e-4
    for other in (noise.roll(1, -1), noise.roll(1, -2), noise.roll(1, 0)):
        assert abs((noise * other).mean().item()) < 0.02 * 0.03**2


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_compression_is_pillows(format):
    image, artifact_map = picture(), square_map()
    augment = Augmentation(**{f"{format.lower()}_probability": 1.0}, quality=(35, 35))
    new_image, new_map = augment(image, artifact_map, seeded(0))
    file = io.BytesIO()
    pixels = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    Image.fromarray(pixels).save(file, format, quality=35, **({"method": 0} if format == "WEBP" else {}))
    expected = np.asarray(Image.open(file).convert("RGB")).transpose(2, 0, 1) / 255
    assert np.abs(new_image.numpy() - expected).max() < 1e-6
    assert torch.equal(new_map, artifact_map)
    assert (new_image - image).abs().mean() > 0.01


def test_resampling_is_pillows():
    """One of sixteen pairs of kernels, and in 60 draws most of them."""
    image, found = picture(), set()
    shown, kernels = to_picture(image), list(Image.Resampling)
    augment = Augmentation(resample_probability=1.0, resample=(0.5, 0.5))
    pairs = {
        (down, up): from_picture(shown.resize((32, 24), down).resize((64, 48), up))
        for down in kernels
        for up in kernels
        if Image.Resampling.BOX not in (down, up) and Image.Resampling.HAMMING not in (down, up)
    }
    for seed in range(60):
        new = augment(image, square_map(), seeded(seed))[0]
        fitting = [pair for pair, expected in pairs.items() if torch.equal(new, expected)]
        assert len(fitting) == 1
        found.update(fitting)
    assert len(found) > 10


def test_pictures_keep_every_level():
    levels = torch.arange(256.0).view(1, 16, 16).expand(3, -1, -1) / 255
    for off in (-0.4, 0.0, 0.4):
        assert torch.equal(from_picture(to_picture((levels + off / 255).clamp(0, 1))), levels)


@pytest.mark.parametrize("name", ["light", "strong"])
def test_whatever_is_drawn_is_an_image_and_its_map(name):
    augment = Augmentation.preset(name, shrink_probability=0.3, shrink_others_probability=0.3)
    image, artifact_map = picture(), square_map()
    image[:, :10], image[:, 10:20] = 0, 1
    before, state = (image.clone(), artifact_map.clone()), torch.get_rng_state()
    results = []
    for seed in range(60):
        new_image, new_map = augment(image, artifact_map, seeded(seed))
        assert new_image.shape == image.shape and new_map.shape == artifact_map.shape
        assert new_image.dtype == new_map.dtype == torch.float32
        assert 0 <= new_image.min() and new_image.max() <= 1
        assert ((new_map == -1) | (0 <= new_map) & (new_map <= 1)).all()
        again = augment(image, artifact_map, seeded(seed))
        assert torch.equal(new_image, again[0]) and torch.equal(new_map, again[1])
        results.append(new_image)
    assert len({one.numpy().tobytes() for one in results}) > (50 if name == "strong" else 15)
    assert torch.equal(image, before[0]) and torch.equal(artifact_map, before[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_probabilities_are_kept():
    flipped = changed = 0
    image, artifact_map = picture(16, 16), torch.rand(1, 16, 16, generator=seeded(5))
    augment, generator = Augmentation(flip_probability=0.3, jpeg_probability=0.2, webp_probability=0.2), seeded(0)
    for _ in range(500):
        new_image, new_map = augment(image, artifact_map, generator)
        flip = torch.equal(new_map, artifact_map.flip(-1))
        flipped += flip
        changed += not torch.equal(new_image, image.flip(-1) if flip else image)
    assert abs(flipped / 500 - 0.3) < 0.08 and abs(changed / 500 - 0.4) < 0.09


def test_one_part_does_not_change_the_randomness_of_another():
    image, artifact_map = picture(), square_map()
    for seed in range(10):
        maps = [
            Augmentation.preset("strong", noise_probability=noise, blur_probability=blur)(
                image, artifact_map, seeded(seed)
            )[1]
            for noise, blur in ((0, 0), (1, 0), (0, 1))
        ]
        assert torch.equal(maps[0], maps[1]) and torch.equal(maps[0], maps[2])


def test_reduction_is_that_of_pillow_at_the_place_it_says():
    image = picture(64, 96)
    new_image, new_map = moved(image, torch.zeros(1, 64, 96), scale=0.5, shift=(10, -7), reflect=False)
    top, left = 16 - 7, 24 + 10
    assert (new_map[:, top : top + 32, left : left + 48] == 0).all() and (new_map == 0).sum() == 32 * 48
    reduced = from_picture(to_picture(image).resize((48, 32), Image.Resampling.BILINEAR))
    assert (new_image[:, top : top + 32, left : left + 48] - reduced).abs().max() < 1.5 / 255
    mean = image.mean(dim=(1, 2), keepdim=True).expand_as(new_image)
    assert (new_image - mean)[:, :top].abs().max() < 2 / 255


def test_a_reduced_artifact_stays_certain():
    artifact_map = torch.zeros(1, 64, 64)
    artifact_map[0, 31, 37] = 1
    for shift in ((0, 0), (5, -3), (3.3, 4.8)):
        assert moved(picture(64, 64), artifact_map, scale=0.4, shift=shift)[1].max() == 1


def test_scales_are_drawn_evenly_in_their_logarithm():
    """Measured by the slope of a ramp, at places that show all of it."""
    ramp, slopes = torch.linspace(0.2, 0.8, 64).expand(3, 64, 64), []
    augment, generator = Augmentation(move_probability=1.0, scale=(0.5, 2.0), rotation=0.0), seeded(0)
    for _ in range(300):
        image, artifact_map = augment(ramp, torch.zeros(1, 64, 64), generator)
        inside = image[0][artifact_map[0] == 0].reshape(-1, (artifact_map[0] == 0).any(0).sum())
        steps = inside[len(inside) // 2].diff()
        slopes.append(steps[5:-5].mean().item() / (0.6 / 63))
    logs = -np.log2(slopes)  # of the scale
    assert -1.01 < logs.min() < -0.95 and 0.95 < logs.max() < 1.01
    assert np.abs(np.histogram(logs, bins=4, range=(-1.01, 1.01))[0] - 75).max() < 30


def test_padding_is_reflected_in_half_of_the_cases():
    augment, generator = Augmentation(shrink_probability=1.0, shrink=(0.5, 0.5)), seeded(0)
    flat = []
    for _ in range(100):
        image, artifact_map = augment(picture(64, 64), torch.zeros(1, 64, 64), generator)
        outside = image[0][artifact_map[0] == -1]
        flat.append((outside.sub(outside.median()).abs() < 1e-3).float().mean().item() > 0.8)
    assert 30 < sum(flat) < 70


def test_both_ends_of_a_range_of_qualities_are_drawn():
    augment, generator = Augmentation(jpeg_probability=1.0, quality=(40, 41)), seeded(0)
    found = {augment(picture(), square_map(), generator)[0].numpy().tobytes() for _ in range(20)}
    assert len(found) == 2


def test_dynamic_augmentation_reduces_images_that_are_sound():
    """To a size in its range, whole, at any place, whatever the strength of the label beneath the threshold."""
    augment = Augmentation(shrink_probability=1.0, shrink_below=0.25, shrink=(0.25, 0.7))
    image, generator = picture(64, 128), seeded(0)
    sound, broken = torch.full((1, 64, 128), 0.24), torch.full((1, 64, 128), 0.24)
    broken[0, 5, 5] = 0.25
    sides, places = [], []
    for _ in range(100):
        new_map = augment(image, sound, generator)[1]
        rows, columns = (new_map[0] >= 0).any(1).nonzero(), (new_map[0] >= 0).any(0).nonzero()
        height, width = len(rows), len(columns)
        assert (new_map == sound.max()).sum() == height * width and abs(2 * height - width) <= 2
        sides.append(height)
        places.append((rows[0].item() / (64 - height), columns[0].item() / (128 - width)))
        assert torch.equal(augment(image, broken, generator)[0], image)
    assert min(sides) < 22 and max(sides) > 39 and 15 <= min(sides) and max(sides) <= 46
    assert (np.histogram(np.array(places).ravel(), bins=4, range=(0, 1.1))[0] > 25).all()
    others = Augmentation(shrink_others_probability=1.0)
    assert (others(image, broken, generator)[1] == -1).any()
    assert torch.equal(others(image, torch.zeros(1, 64, 128), generator)[0], image)


def test_presets_and_fields_go_through_json():
    for name in PRESETS:
        augmentation = Augmentation.preset(name, shrink_probability=0.25, scale=(0.5, 2.0))
        assert Augmentation(**json.loads(json.dumps(augmentation.to_dict()))) == augmentation
    assert Augmentation.preset("light") == PRESETS["light"] != PRESETS["strong"]
    with pytest.raises(ValueError, match=r"`augmentation` must be one of 'none', 'light', 'strong', found 'heavy'"):
        Augmentation.preset("heavy")
    with pytest.raises(ValueError, match=r"no mosaic\. It has .*flip_probability"):
        Augmentation.preset("light", mosaic=1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("flip_probability", 1.5),
        ("jpeg_probability", float("nan")),
        ("noise_probability", "often"),
        ("scale", (0.0, 1.0)),
        ("scale", (2.0, 1.0)),
        ("blur", 1.0),
        ("shrink", (0.5, 1.5)),
        ("shrink_below", 0.0),
        ("quality", (0, 50)),
        ("rotation", -1),
        ("hue", 0.7),
        ("webp_probability", 0.7),
    ],
)
def test_what_is_out_of_range_is_refused(field, value):
    with pytest.raises(ValueError, match=rf"{field}.*found"):
        Augmentation(**{"jpeg_probability": 0.5, field: value})
