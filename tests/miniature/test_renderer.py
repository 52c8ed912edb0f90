# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
from dataclasses import replace

import numpy as np
import pytest

from diffusers_diffdoctor.miniature.renderer import (
    _PARTS,
    ARTIFACT_KINDS,
    CATEGORIES,
    PLAIN_CATEGORIES,
    PRONE_CATEGORIES,
    all_prompts,
    is_held_out,
    render,
    sample_scene,
)


def scenes(count, seed=0, **options):
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, **options) for _ in range(count)]


def dilated(mask):
    padded = np.pad(mask, 1)
    h, w = mask.shape
    return np.any([padded[i : i + h, j : j + w] for i in range(3) for j in range(3)], axis=0)


@pytest.mark.parametrize("kind", ARTIFACT_KINDS)
@pytest.mark.parametrize("category", PRONE_CATEGORIES)
def test_the_map_is_where_the_scene_differs_from_its_right_twin(category, kind):
    for scene in scenes(8, category=category, artifact=kind):
        image, artifact_map = render(scene)
        twin, empty = render(replace(scene, artifact=None))
        assert empty.max() == 0
        visible = np.abs(image.astype(int) - twin.astype(int)).max(-1) > 18
        assert visible.sum() >= 14
        assert np.array_equal(artifact_map == 255, dilated(visible))
        assert set(np.unique(artifact_map)) <= {0, 255}


def test_rendering_is_deterministic():
    for scene in scenes(6, wrong_share=1.0):
        (a, ma), (b, mb) = render(scene), render(scene)
        assert np.array_equal(a, b) and np.array_equal(ma, mb)


def test_plain_categories_are_never_wrong():
    drawn = scenes(400, wrong_share=1.0)
    assert {s.category for s in drawn} == set(CATEGORIES)
    assert all((s.artifact is None) == (s.category in PLAIN_CATEGORIES) for s in drawn)


def test_the_wrong_share_is_the_share_of_wrong_scenes():
    drawn = scenes(2000, wrong_share=0.8, category="hand")
    assert 0.77 < np.mean([s.artifact is not None for s in drawn]) < 0.83
    assert {s.artifact for s in drawn} == {None, *ARTIFACT_KINDS}


@pytest.mark.parametrize("category", PRONE_CATEGORIES)
def test_every_part_of_every_thing_can_go_wrong(category):
    # A detector that never saw a part missing is no obstacle to a generator that erases it.
    parts = _PARTS[category](np.random.default_rng(0))
    trunk = [p.name for p in parts if not p.removable]
    assert len(trunk) == 1  # what the other parts hang on
    for part in parts:
        if part.removable:
            assert part.extra and part.misplaced, part.name


def test_captions_are_distinct_and_name_every_attribute():
    rows = all_prompts()
    assert len({row["prompt"] for row in rows}) == len(rows) == 432
    for row in rows:
        words = row["prompt"].split()
        assert all(row[key] in words for key in ("category", "color", "background", "style"))


def test_held_out_combinations_leave_every_value_to_train_on():
    rows = all_prompts()
    kept = [r for r in rows if not is_held_out(r["category"], r["color"], r["background"])]
    held = [r for r in rows if is_held_out(r["category"], r["color"], r["background"])]
    assert len(held) == len(rows) // 4
    for key in ("category", "color", "background"):
        assert {r[key] for r in kept} == {r[key] for r in held} == {r[key] for r in rows}
