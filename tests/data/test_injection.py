# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Injection: each kind does what it says, the map says where, and nothing else changes."""

import numpy as np
import pytest

from diffusers_diffdoctor.data.injection import DIFFERENCE, KINDS, NoChange, blob, inject, saliency
from diffusers_diffdoctor.data.injection.pixels import (
    fill,
    flood,
    grow,
    keeping_grain,
    sample,
    shrink,
    spread,
    without_holes,
)
from diffusers_diffdoctor.miniature.renderer import render, sample_scene


PAPER, SKIN, NAIL = (230, 230, 225), (190, 90, 60), (40, 60, 200)


def hand(size: int = 96) -> np.ndarray:
    """A body with three fingers that stick out upwards; the middle one is blue."""
    image = np.empty((size, size, 3), np.uint8)
    image[:] = PAPER
    u = size // 24
    image[14 * u : 22 * u, 6 * u : 18 * u] = SKIN
    for number, color in enumerate((SKIN, NAIL, SKIN)):
        left = (6 + 5 * number) * u
        image[5 * u : 14 * u, left : left + 2 * u] = color
    return image


def middle_finger(size: int = 96) -> np.ndarray:
    return (hand(size) == NAIL).all(-1)


def like(image: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    return np.abs(image.astype(int) - color).max(-1) < 40


def spoiled(kind: str, image: np.ndarray, region: np.ndarray, wanted=lambda new: True) -> np.ndarray:
    """The first result of a kind, over many seeds, that is as `wanted`; at least one in eight has to be."""
    tried = 0
    for seed in range(64):
        try:
            new = KINDS[kind](image.astype(np.float32), region, np.random.default_rng(seed))
        except NoChange:
            continue
        tried += 1
        if wanted(new):
            return new
        assert tried < 8, f"{kind} did not do what it says in {tried} tries"
    raise AssertionError(f"{kind} found nothing to spoil")


def region_at(y: float, x: float, radius: float, size: int = 96) -> np.ndarray:
    return blob((size, size), (y, x), radius, np.random.default_rng(0))


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(5)
    return [render(sample_scene(rng, 0.0))[0] for _ in range(16)]


# --- pixels --------------------------------------------------------------------------------------------------------------------


def test_flood_reaches_what_a_walk_reaches():
    rng = np.random.default_rng(0)
    for _ in range(50):
        within, start = rng.random((9, 13)) < 0.6, (int(rng.integers(9)), int(rng.integers(13)))
        walked, todo = np.zeros_like(within), [start]
        while todo:
            y, x = todo.pop()
            if 0 <= y < 9 and 0 <= x < 13 and within[y, x] and not walked[y, x]:
                walked[y, x] = True
                todo += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        seed = np.zeros_like(within)
        seed[start] = True
        np.testing.assert_array_equal(flood(seed, within), walked)


def test_holes_are_what_the_border_cannot_reach():
    mask = np.zeros((9, 9), bool)
    mask[2:7, 2:7] = True
    ring = mask.copy()
    ring[3:6, 3:6] = False
    np.testing.assert_array_equal(without_holes(ring), mask)
    ring[2, 4] = False  # open
    np.testing.assert_array_equal(without_holes(ring), ring)


def test_growing_and_shrinking_go_as_far_as_they_say():
    point = np.zeros((21, 21), bool)
    point[10, 10] = True
    y, x = np.mgrid[-10:11, -10:11]
    for radius in (1, 3, 6):
        grown = grow(point, radius)
        assert grown[np.hypot(y, x) <= 0.9 * radius].all() and not grown[np.hypot(y, x) > 1.2 * radius].any()
    np.testing.assert_array_equal(shrink(grow(point, 4), 4), point)


def test_spreading_keeps_what_is_known_and_stays_in_its_range():
    rng = np.random.default_rng(0)
    values, known = rng.uniform(50, 200, (37, 21, 3)).astype(np.float32), rng.random((37, 21)) < 0.2
    result = spread(values, known)
    np.testing.assert_allclose(result[known], values[known], atol=1e-3)
    assert result.min() >= values[known].min() - 1e-3 and result.max() <= values[known].max() + 1e-3


def test_a_hole_in_a_texture_is_filled_with_the_texture():
    y, x = np.mgrid[0:64, 0:64]
    stripes = (128 + 100 * np.sin(2 * np.pi * x / 8) + 0.3 * y)[..., None].repeat(3, -1).astype(np.float32)
    hole = np.hypot(y - 30, x - 33) < 7
    broken = np.where(hole[..., None], 0, stripes).astype(np.float32)
    errors = [
        np.abs(fill(broken, hole, ~hole, np.random.default_rng(seed)) - stripes)[hole].mean() for seed in range(5)
    ]
    assert np.median(errors) < 12  # of an amplitude of 100; smooth filling is 60 away


# --- kinds ---------------------------------------------------------------------------------------------------------------------


def test_duplicate_shows_a_part_twice():
    image, finger = hand(), middle_finger()
    new = spoiled("duplicate", image, region_at(30, 48, 9), lambda new: like(new, NAIL).sum() > 1.4 * finger.sum())
    second = like(new, NAIL) & ~grow(finger, 1)
    assert like(new, NAIL)[finger].mean() > 0.8  # the first is still there
    assert 0.3 * finger.sum() < second.sum() < 1.5 * finger.sum()


def test_omit_takes_a_part_away_and_shows_what_is_behind():
    image, finger = hand(), middle_finger()
    new = spoiled("omit", image, region_at(30, 48, 9), lambda new: like(new, NAIL).sum() < 0.1 * finger.sum())
    assert like(new, PAPER)[shrink(finger, 1)].mean() > 0.9
    others = (image == SKIN).all(-1) & ~grow(finger, 4)
    np.testing.assert_array_equal(np.rint(new)[others], image[others])


def test_omit_can_leave_a_stump():
    finger = middle_finger()
    spoiled("omit", hand(), region_at(30, 48, 9), lambda new: 0.03 < like(new, NAIL).sum() / finger.sum() < 0.6)


def test_misplace_moves_a_part():
    finger = middle_finger()
    new = spoiled(
        "misplace",
        hand(),
        region_at(30, 48, 9),
        lambda new: like(new, NAIL)[finger].mean() < 0.5 and like(new, NAIL).sum() > 0.4 * finger.sum(),
    )
    assert (like(new, NAIL) & ~finger).sum() > 0.2 * finger.sum()


def test_fuse_fills_the_gap_between_two_parts():
    image = hand()
    gap = np.zeros(image.shape[:2], bool)
    gap[24:52, 33:43] = True  # between the first finger and the second
    new = spoiled("fuse", image, region_at(40, 38, 10), lambda new: (~like(new, PAPER))[gap].mean() > 0.4)
    filled = gap & ~like(new, PAPER)
    assert (like(new, SKIN) | like(new, NAIL))[filled].mean() > 0.7


@pytest.mark.parametrize("kind", ["distort", "melt", "seam"])
def test_warps_change_the_region_and_nothing_else(kind, scenes):
    region = blob((64, 64), (32, 32), 10, np.random.default_rng(1))
    for seed, image in enumerate(scenes[:8]):
        new = KINDS[kind](image.astype(np.float32), region, np.random.default_rng(seed))
        np.testing.assert_array_equal(new[region == 0], image[region == 0])
        assert np.isfinite(new).all()
    assert np.abs(new - image)[region > 0.9].max() > DIFFERENCE


def test_melt_runs_together():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 2, (16, 16, 1)).repeat(4, 0).repeat(4, 1).repeat(3, 2) * 200.0 + 20
    region = blob((64, 64), (32, 32), 12, rng)
    new = KINDS["melt"](image.astype(np.float32), region, rng)
    inside = region > 0.9
    assert new[inside].std() < 0.75 * image[inside].std()


def test_seam_shifts_one_side_along_a_line():
    y, x = np.mgrid[0:64, 0:64]
    image = (127 + 100 * np.sin(2 * np.pi * (x + y) / 21))[..., None].repeat(3, -1).astype(np.float32)
    region = np.ones((64, 64), np.float32)
    for seed in range(6):
        new = KINDS["seam"](image, region, np.random.default_rng(seed))
        changed = np.abs(new - image).max(-1) > 1
        assert 0.3 < changed.mean() < 0.7  # one half, up to a line through the middle
        along = [changed.mean(axis) for axis in (0, 1)]
        if max(np.sort(profile)[-20:].mean() - np.sort(profile)[:20].mean() for profile in along) > 0.9:
            return  # an upright or level line among the first: the side is changed all along it, the other nowhere
    raise AssertionError("no seam along an axis in six")


def test_watermark_is_translucent_and_of_one_tone(scenes):
    region = blob((64, 64), (32, 32), 12, np.random.default_rng(1))
    for seed in range(6):
        image = scenes[seed].astype(np.float32)
        new = KINDS["watermark"](image, region, np.random.default_rng(seed))
        moved = np.abs(new - image).max(-1) > 3
        assert 10 < moved.sum() < 0.4 * moved.size
        # image + share (level - image): no pixel is covered, and brighter ones end brighter
        covered = np.abs(new - image)[moved].max(-1) / 255
        assert covered.max() < 0.8


# --- whole images --------------------------------------------------------------------------------------------------------------


def test_the_map_is_where_the_images_differ_visibly(scenes):
    for seed, image in enumerate(scenes):
        done = inject(image, np.random.default_rng(seed), decoys=0.0)
        difference = np.abs(done.image.astype(int) - image).max(-1)
        inside = done.artifact_map > 0
        assert set(np.unique(done.artifact_map)) <= {0, 255}
        assert difference[~inside].max(initial=0) <= DIFFERENCE
        np.testing.assert_array_equal(inside, grow(difference > DIFFERENCE, 1))
        if done.kinds:
            assert (difference > DIFFERENCE).mean() >= 0.003


def test_decoys_cannot_be_seen_and_are_no_artifacts(scenes):
    changed = 0
    for seed, image in enumerate(scenes):
        done = inject(image, np.random.default_rng(seed), kinds={}, decoys=1.0)
        assert not done.kinds and not done.artifact_map.any()
        assert np.abs(done.image.astype(int) - image).max() <= DIFFERENCE
        changed += (done.image != image).any()
    assert changed >= len(scenes) // 2


def test_nearly_every_image_with_something_in_it_is_spoiled(scenes):
    done = [inject(image, np.random.default_rng(seed)) for seed, image in enumerate(scenes)]
    assert sum(bool(one.kinds) for one in done) >= len(scenes) - 1
    assert {kind for one in done for kind in one.kinds} >= {"duplicate", "omit"}


def test_the_same_seed_gives_the_same_image_and_another_another(scenes):
    one, same, other = (inject(scenes[0], np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.image, same.image)
    np.testing.assert_array_equal(one.artifact_map, same.artifact_map)
    assert (one.image != other.image).any()


@pytest.mark.parametrize("box", [(20, 10, 44, 40), (44, 40, 20, 10), (20, 40, 44, 10)])
def test_changes_stay_within_a_quarter_of_a_box(box, scenes):
    found = 0
    for seed, image in enumerate(scenes):
        done = inject(image, np.random.default_rng(seed), boxes=[box], most_size=0.8, decoys=0.0)
        outside = np.ones(image.shape[:2], bool)
        outside[10 - 8 : 40 + 8, 20 - 8 : 44 + 8] = False
        np.testing.assert_array_equal(done.image[outside], image[outside])
        assert not done.artifact_map[outside].any()
        found += bool(done.kinds)
    assert found >= len(scenes) * 3 // 4


@pytest.mark.parametrize("shape", [(16, 16), (17, 90), (300, 500)])
def test_any_shape_can_be_spoiled(shape):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8).repeat(100, 0).repeat(100, 1)[: shape[0], : shape[1]]
    image = np.ascontiguousarray(image)
    image[shape[0] // 3 : shape[0] // 2, shape[1] // 3 : shape[1] // 2] = (250, 20, 20)
    done = inject(image, np.random.default_rng(0))
    assert done.image.shape == image.shape and done.artifact_map.shape == image.shape[:2]
    assert done.image.dtype == done.artifact_map.dtype == np.uint8


def test_a_large_image_is_spoiled():
    rng = np.random.default_rng(3)
    image = np.asarray(render(sample_scene(rng, 0.0, category="hand"))[0]).repeat(10, 0).repeat(10, 1)
    done = inject(image, rng, {"duplicate": 1, "omit": 1}, counts={1: 1})
    assert done.kinds and (done.artifact_map > 0).mean() > 0.003


def test_a_flat_image_stays_as_it_is():
    image = np.full((48, 48, 3), 128, np.uint8)
    kinds = {kind: 1.0 for kind in KINDS if kind not in ("watermark", "seam")}
    done = inject(image, np.random.default_rng(0), kinds)
    assert not done.kinds and not done.artifact_map.any()
    np.testing.assert_array_equal(done.image, image)


def test_a_gray_image_stays_gray():
    image = render(sample_scene(np.random.default_rng(1), 0.0, category="face"))[0].mean(-1).astype(np.uint8)
    done = inject(image[..., None].repeat(3, -1), np.random.default_rng(2))
    assert done.kinds
    assert np.ptp(done.image.astype(int), axis=-1).max() <= 1


def test_saliency_points_at_what_stands_out():
    image = np.full((64, 96, 3), 200, np.uint8)
    image[20:30, 60:70] = (200, 30, 30)
    weights = saliency(image)
    assert weights.sum() == pytest.approx(1, abs=1e-4) and weights.min() > 0
    assert weights[16:34, 56:74].mean() > 5 * weights.mean()


# --- grain -----------------------------------------------------------------------------------------------------------------------


def noisy(seed: int = 0) -> np.ndarray:
    """A bright disc on a slope of light, under gray noise of deviation 3."""
    y, x = np.mgrid[0:64, 0:64]
    disc = np.hypot(y - 30, x - 34) < 12
    image = (80 + 0.5 * x + 90 * disc)[..., None] * np.ones(3)
    return (image + np.random.default_rng(seed).normal(0, 3, (64, 64, 1))).astype(np.float32)


def test_grain_comes_back_bit_for_bit_where_nothing_changes():
    image = noisy()
    result = keeping_grain(lambda drawn: drawn, image, np.random.default_rng(0))
    np.testing.assert_allclose(result, image, atol=1e-4)


def test_grain_is_as_strong_as_before_where_things_moved():
    image = noisy()
    y, x = np.mgrid[0:64, 0:64].astype(np.float32)

    def away(drawn):
        return sample(drawn, y + 0.5, x + 6.5)

    flat = np.s_[2:14, 4:54]  # no edge, before and after
    kept, lost = keeping_grain(away, image, np.random.default_rng(0)), away(image)
    rough = [np.diff(one[flat][..., 0], axis=1).std() for one in (image, kept, lost)]
    assert rough[1] == pytest.approx(rough[0], rel=0.1)
    assert rough[2] < 0.85 * rough[0]  # else this would be no test
    moved = np.hypot(y - 29.5, x - 27.5) < 9
    assert kept[moved].mean() == pytest.approx(image[np.hypot(y - 30, x - 34) < 9].mean(), abs=3)


def test_a_drawing_without_grain_gets_none():
    image = hand(48).astype(np.float32)
    new = keeping_grain(lambda drawn: drawn + 40, image, np.random.default_rng(0))
    np.testing.assert_array_equal(new, image + 40)


def test_resampling_keeps_the_range_and_the_places():
    image = noisy()
    y, x = np.mgrid[0:64, 0:64].astype(np.float32)
    assert np.abs(sample(image, y, x) - image).mean() < 0.3
    assert np.abs(sample(image, y + 3, x)[:-3] - image[3:]).mean() < 0.3
    edge = np.zeros((32, 32, 1), np.float32)
    edge[:, 16:] = 200
    y, x = y[:32, :32], x[:32, :32]
    turned = sample(edge, y + 0.3 * (x - 16), x + 0.37)
    assert turned.min() >= 0 and turned.max() <= 200  # no rim
