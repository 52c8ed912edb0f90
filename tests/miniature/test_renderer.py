# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from diffusers_diffdoctor.miniature.renderer import (
    _PARTS,
    ARTIFACT_KINDS,
    ARTIFACT_WEIGHTS,
    CATEGORIES,
    PRONE_CATEGORIES,
    _placement,
    _spoil,
    all_prompts,
    render,
    sample_scene,
    split_of,
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
        twin, empty = render(replace(scene, artifacts=()))
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
    assert all(bool(s.artifacts) == (s.category in PRONE_CATEGORIES) for s in drawn)


def test_the_wrong_share_is_the_share_of_wrong_scenes():
    drawn = scenes(2000, wrong_share=0.8, category="hand")
    assert 0.77 < np.mean([bool(s.artifacts) for s in drawn]) < 0.83
    assert {s.artifacts for s in drawn} == {(), *((kind,) for kind in ARTIFACT_WEIGHTS)}


@pytest.mark.parametrize("category", PRONE_CATEGORIES)
def test_scenes_under_treatment_have_several_and_half_transparent_mistakes(category):
    drawn = scenes(400, wrong_share=1.0, under_treatment=True, category=category)
    assert {kind for s in drawn for kind in s.artifacts} == set(ARTIFACT_KINDS)
    assert {len(s.artifacts) for s in drawn} == {1, 2, 3, 4}
    assert 0.2 < np.mean([s.opacity < 1 for s in drawn]) < 0.4
    for scene in drawn[:60]:
        image, artifact_map = render(scene)
        twin, _ = render(replace(scene, artifacts=()))
        visible = np.abs(image.astype(int) - twin.astype(int)).max(-1) > 18
        assert visible.sum() >= 14 and np.array_equal(artifact_map == 255, dilated(visible))


def test_several_mistakes_spoil_more_than_the_first_of_them():
    drawn = [s for s in scenes(600, wrong_share=1.0, under_treatment=True) if len(s.artifacts) > 2 and s.opacity == 1]
    areas = np.mean([[render(s)[1].mean(), render(replace(s, artifacts=s.artifacts[:1]))[1].mean()] for s in drawn], 0)
    assert areas[0] > 1.5 * areas[1]


def test_a_mistake_that_shines_through_differs_less():
    scene = next(s for s in scenes(50, wrong_share=1.0, category="hand") if s.artifacts == ("extra",))
    twin = render(replace(scene, artifacts=()))[0].astype(int)
    full, half = (np.abs(render(replace(scene, opacity=o))[0].astype(int) - twin).max() for o in (1.0, 0.5))
    assert 0.4 * full < half < 0.6 * full


@pytest.mark.parametrize(
    ("category", "left", "right"),
    [("hand", "palm", "thumb"), ("dog", "tail", "head"), ("house", "door", "window"), ("cup", "body", "handle")],
)
def test_nothing_is_mirrored(category, left, right):
    # a caption does not name a side, so a small model would draw both at once
    rng = np.random.default_rng(0)
    for _ in range(20):
        place, parts = _placement(rng, category), {part.name: part for part in _PARTS[category](rng)}
        x = {
            name: np.mean([place(shape.points)[:, 0].mean() for shape in parts[name].shapes]) for name in (left, right)
        }
        assert x[left] < x[right]


def test_no_part_is_spoiled_twice():
    parts = _PARTS["person"](np.random.default_rng(0))
    rng = np.random.default_rng(0)
    for _ in range(12):  # five parts can be missing, then none is left
        parts = _spoil(parts, "missing", rng)
    assert [p.name for p in parts] == ["torso"]
    parts = _PARTS["person"](np.random.default_rng(0))
    for _ in range(12):
        parts = _spoil(parts, "misplaced", rng)
    assert [p.wrong for p in parts] == [p.name != "torso" for p in parts]


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


def test_every_split_has_every_value_and_training_every_pair():
    rows = all_prompts(PRONE_CATEGORIES)
    splits = {split: [] for split in ("train", "development", "final")}
    for row in rows:
        splits[split_of(row["category"], row["color"], row["background"])].append(row)
    assert {name: len(part) / len(rows) for name, part in splits.items()} == {
        "train": 0.5,
        "development": 0.25,
        "final": 0.25,
    }
    for part in splits.values():
        for key in ("category", "color", "background", "style"):
            assert {row[key] for row in part} == {row[key] for row in rows}
    for pair in combinations(("category", "color", "background"), 2):
        assert {tuple(row[key] for key in pair) for row in splits["train"]} == {
            tuple(row[key] for key in pair) for row in rows
        }
