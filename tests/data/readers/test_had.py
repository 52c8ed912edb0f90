# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The Human Artifact Dataset: boxes are drawn where they are, with their levels; damage is counted and named."""

import json

import numpy as np
import pytest
from fixtures.annotations import SIZE, imported, picture, pixels, square

from diffdoctor import main
from diffusers_diffdoctor.data.readers import Had


def write(top, name, parts=(), people=(), split="train_ALL", there=True, **changes):
    content = {
        "image": {"file_name": f"{name}.png", "width": SIZE[0], "height": SIZE[1]},
        "annotation": [{"body_parts": part, "bbox": box, "level": level} for part, box, level in parts],
        "human": [{"bbox": box, "tag": tags} for box, tags in people],
    } | changes
    path = top / f"annotations/{split}/{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    if there:
        picture(top / f"images/{split}/{name}.png")


@pytest.fixture
def two(tmp_path):
    """Boxes that lie over each other, one with swapped corners; a person with a missing arm; and a sound image."""
    parts = [("hand", [5, 5, 20, 15], "severe"), ("face", [30, 25, 10, 10], "mild")]
    people = [([0, 0, 40, 30], ["human missing arm"]), ([40, 30, 48, 40], [])]
    write(tmp_path / "had", "a", parts, people)
    write(tmp_path / "had", "sound")
    return tmp_path / "had"


def test_levels_are_values_and_the_higher_one_holds(two, tmp_path):
    rows, quarantined, _ = imported(tmp_path / "out", "had", two, "--mild", "0.4", "--severe", "0.8")
    assert not quarantined and set(rows) == {"a.png", "sound.png"}
    expected = np.maximum(square(10, 10, 30, 25, 102), square(5, 5, 20, 15, 204))
    assert np.array_equal(pixels(rows["a.png"]["artifact_map"]), expected)
    ignored = (square(0, 0, 40, 30) > 0) & (expected == 0)
    assert np.array_equal(pixels(rows["a.png"]["ignore_map"]) > 0, ignored)
    assert rows["a.png"]["category"] == ["hand", "face"] and rows["sound.png"]["category"] == []
    assert not pixels(rows["sound.png"]["artifact_map"]).any() and rows["sound.png"]["ignore_map"] is None


def test_people_may_be_artifacts_or_say_nothing(two, tmp_path):
    parts = np.maximum(square(10, 10, 30, 25), square(5, 5, 20, 15))
    for humans, expected in (("artifact", square(0, 0, 40, 30)), ("skip", parts)):
        rows, *_ = imported(tmp_path / humans, "had", two, "--humans", humans)
        assert np.array_equal(pixels(rows["a.png"]["artifact_map"]), expected)
        assert rows["a.png"]["ignore_map"] is None


def test_damage_is_counted_and_named(two, tmp_path):
    box = [5, 5, 20, 15]
    write(two, "level", [("hand", box, "awful")])
    write(two, "nan", [("hand", [5, float("nan"), 20, 15], "mild")])
    write(two, "three", [("hand", [5, 5, 20], "mild")])
    write(two, "outside", [("hand", [100, 100, 120, 120], "mild")])
    write(two, "size", image={"file_name": "size.png", "width": 9, "height": 9})
    write(two, "absent", there=False)
    write(two, "no list", annotation="none")
    (two / "annotations/train_ALL/cut.json").write_text('{"image": {')
    picture(two / "images/train_ALL/alone.png")
    rows, quarantined, counts = imported(tmp_path / "out", "had", two)
    assert set(rows) == {"a.png", "sound.png"} and counts["rows_in"] == 2 + 9
    assert quarantined.pop("cut.json").startswith("no JSON")
    assert quarantined == {
        "level.png": "unknown level 'awful', expected was mild or severe",
        "nan.png": "a region has coordinates that are not finite",
        "three.png": "a region's coordinates are not pairs of numbers",
        "outside.png": "a region lies outside of the image",
        "size.png": "An image of 48 x 40 pixels is annotated as one of 9 x 9.",
        "absent.json": "no image of this name",
        "no list.png": "'annotation' of the annotation is no list of boxes",
        "alone.png": "no annotation of this image",
    }


def test_arguments_are_checked(two, tmp_path, capsys):
    with pytest.raises(ValueError, match="`mild` must lie in"):
        Had(mild=2)
    with pytest.raises(ValueError, match="`humans` must be one of"):
        Had(humans="all")
    assert main(["data", "import", "had", str(two), "-o", str(tmp_path / "out"), "--split", "val"]) == 1
    assert "`split` can be train_ALL" in capsys.readouterr().err
