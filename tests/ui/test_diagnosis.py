# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What the pages for looking show: figures, files, ranks."""

import io
import json
import os
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image


pytest.importorskip("gradio", reason="needs gradio: make test-ui")

from diffusers_diffdoctor.ui.comparison import Comparison
from diffusers_diffdoctor.ui.diagnosis import Diagnosed, diagnose, reason, write_results
from diffusers_diffdoctor.ui.looking import Detector, figures, heatmap


class Redness(torch.nn.Module):
    """A detector that everybody can check: confidence is the red channel."""

    class config:
        image_size = 16

    def confidence(self, images):
        return images[:, :1]


DETECTOR = Detector(Redness(), "redness")


def save(path, red: int, size=(20, 12)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.zeros((size[1], size[0], 3), np.uint8)
    image[:6, :10, 0] = red
    Image.fromarray(image).save(path)


def test_figures_follow_the_threshold(tmp_path):
    save(tmp_path / "a.png", 153)
    one = diagnose(DETECTOR, tmp_path / "a.png", tile=False)
    assert figures(one.found, 0.6) == {"max_confidence": 0.6, "area_ratio": 0.25, "artifact": True}
    assert figures(one.found, 0.61) == {"max_confidence": 0.6, "area_ratio": 0.0, "artifact": False}
    plain = heatmap(one.image, np.zeros_like(one.found))
    assert np.array_equal(np.array(heatmap(one.image, one.found, 0.61)), np.array(plain))
    assert (np.array(heatmap(one.image, one.found, 0.6)) != np.array(plain)).any(axis=2).sum() == 60


def test_downloads_hold_the_maps_exactly(tmp_path):
    found = np.random.default_rng(0).integers(0, 256, (7, 5), dtype=np.uint8)
    image = Image.new("RGB", (5, 7))
    maps, table = write_results(
        [Diagnosed("../evil/name.png", image, found), Diagnosed("a.png", image, found)],
        [{"image": "../evil/name.png"}, {"image": "a.png"}],
        {"detector": "redness", "threshold": 0.5},
    )
    with zipfile.ZipFile(maps) as archive:
        names = archive.namelist()
        assert not any("/" in name or ".." in name for name in names)
        assert np.array_equal(np.array(Image.open(io.BytesIO(archive.read(names[0])))), found)
    rows = json.loads(table.read_text())
    assert [row["map"] for row in rows["images"]] == names and rows["threshold"] == 0.5

    # what was taken long ago does not fill the disk
    os.utime(maps.parent, (0, 0))
    later, _ = write_results([Diagnosed("a.png", image, found)], [{"image": "a.png"}], {})
    assert not maps.exists() and later.is_file() and later.parent.parent == maps.parent.parent


@pytest.mark.parametrize("content", [b"no image", b"GIF89a" + bytes(40), b"<svg xmlns='http://www.w3.org/2000/svg'/>"])
def test_what_is_no_image_is_refused_without_telling_where_it_lies(tmp_path, content):
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(ValueError) as raised:
        diagnose(DETECTOR, path, tile=False)
    assert str(tmp_path) not in reason(raised.value, str(path))


def test_pairs_are_ranked_by_harm(tmp_path):
    reds = {"hands/a": (0, 255), "hands/b": (255, 0), "c": (255, 255), "d": (10, 20)}
    for name, (before, after) in reds.items():
        save(tmp_path / "before" / f"{name}.png", before)
        save(tmp_path / "after" / f"{name}.webp" if name == "d" else tmp_path / "after" / f"{name}.png", after)
    save(tmp_path / "before/alone.png", 0)
    lines = [
        {"file_name": "c.png", "prompt": "a cup", "category": ["cup", "table"]},
        {"file_name": "d.png", "prompt": "a dog"},
    ]
    (tmp_path / "before/metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    comparison = Comparison(tmp_path / "before", tmp_path / "after", DETECTOR)
    (tmp_path / "after/c.png").write_bytes(b"broken")
    assert comparison.alone == 1 and comparison.categories() == ["cup", "hands", "table"]
    comparison.measure()
    assert [(one.pair.name, one.verdict(0.5)) for one in comparison.ranked()] == [
        ("hands/a", "harmed"),
        ("d", "both sound"),
        ("hands/b", "healed"),
    ]
    assert comparison.ranked()[0].harm == pytest.approx(0.25, abs=1e-3)
    assert [one.pair.name for one in comparison.ranked("hands")] == ["hands/a", "hands/b"]
    assert len(comparison.problems) == 1 and comparison.problems[0].startswith("c:")
    assert comparison.ranked()[1].pair.prompt == "a dog"


def test_folders_without_a_common_name_are_refused(tmp_path):
    save(tmp_path / "before/a.png", 0)
    save(tmp_path / "after/b.png", 0)
    with pytest.raises(ValueError, match="no image of the same name"):
        Comparison(tmp_path / "before", tmp_path / "after", DETECTOR)
