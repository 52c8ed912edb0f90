# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The column `ignore_map` on its way through datasets: imported, merged, read for training, evaluated; and absent where none is."""

import json

import numpy as np
import pytest
import torch
from fixtures.annotations import SIZE, imported, mask, picture, pixels, square
from fixtures.rows import photo_bytes, write_rows
from fixtures.segformer import tiny_detector
from PIL import Image

from diffdoctor import main
from diffusers_diffdoctor.data import FEATURES, Compare, evaluate_detector, find_or_load_shards, find_shards, load_rows
from diffusers_diffdoctor.data.schema import conform, encode_png, no_artifact
from diffusers_diffdoctor.images import to_image_tensor


PART, IGNORED = square(5, 5, 20, 20), square(15, 10, 40, 30)


@pytest.fixture
def annotated(tmp_path, monkeypatch):
    """Two images, one of which does not count everywhere."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    values = np.where(IGNORED, np.uint8(7), PART)
    for i, one in enumerate((values, PART)):
        picture(tmp_path / f"images/{i}.png", i)
        mask(tmp_path / f"masks/{i}.png", one)
    imported(tmp_path / "annotated", "folders", tmp_path / "images", "--ignore", 7)
    return tmp_path / "annotated"


@pytest.fixture
def photos(tmp_path):
    rows = [{"image": photo_bytes(9), "artifact_map": no_artifact(SIZE), "source": "photo"}]
    write_rows(tmp_path / "photos/train-00000.parquet", rows)
    return tmp_path / "photos"


def test_training_reads_it_where_it_is(annotated, photos):
    rows = load_rows(annotated)
    assert rows.column_names == [*FEATURES, "ignore_map"]
    assert np.array_equal(np.asarray(rows[0]["ignore_map"]), IGNORED) and rows[1]["ignore_map"] is None
    assert load_rows(photos).column_names == list(FEATURES)


@pytest.mark.parametrize("order", [("annotated", "photos"), ("photos", "annotated")])
def test_a_mixture_with_datasets_that_have_none_keeps_it(annotated, photos, tmp_path, order):
    paths = [str({"annotated": annotated, "photos": photos}[name]) for name in order]
    assert main(["data", "merge", *paths, "-o", str(tmp_path / "merged")]) == 0
    rows = [row for shard in find_shards(tmp_path / "merged") for row in shard.read()]
    ignored = [row["ignore_map"] for row in rows if row["ignore_map"]]
    assert len(rows) == 3 and len(ignored) == 1 and np.array_equal(pixels(ignored[0]), IGNORED)
    assert load_rows(tmp_path / "merged").column_names == [*FEATURES, "ignore_map"]


def test_bad_ones_are_refused_or_quarantined(tmp_path):
    with pytest.raises(ValueError, match="`ignore_map` must hold the bytes of an image file, found only a path"):
        conform({"image": b"1", "ignore_map": {"path": "/etc/passwd", "bytes": None}})
    assert "ignore_map" not in conform({"image": b"1"})
    (tmp_path / "images").mkdir()
    small = encode_png(np.zeros((9, 9), np.uint8))["bytes"]
    for name, content in (
        ("a.png", photo_bytes(0)),
        ("a_ignore.png", small),
        ("a_map.png", no_artifact(SIZE)["bytes"]),
    ):
        (tmp_path / "images" / name).write_bytes(content)
    line = {"file_name": "a.png", "artifact_map_file_name": "a_map.png", "ignore_map_file_name": "a_ignore.png"}
    (tmp_path / "images/metadata.jsonl").write_text(json.dumps(line))
    (shard,) = find_or_load_shards(tmp_path / "images")
    (row,) = shard.read()
    assert row["ignore_map"]["bytes"] == small and "ignore_map" in shard.features
    tiny_detector().save_pretrained(tmp_path / "detector")
    with pytest.raises(ValueError, match="No row of the dataset"):
        evaluate_detector(Compare.by(str(tmp_path / "detector")), [shard], tmp_path / "out", show_progress=False)
    lines = (tmp_path / "out/.diffdoctor/compared/quarantine/00000.jsonl").read_text()
    assert "an ignore_map of 9 x 9" in lines


def test_figures_leave_out_what_does_not_count(annotated, tmp_path):
    tiny_detector().save_pretrained(tmp_path / "detector")
    stage = Compare.by(str(tmp_path / "detector"))
    found = evaluate_detector(stage, find_shards(annotated), tmp_path / "out", show_progress=False)
    errors = []
    for i, counted in enumerate((IGNORED == 0, np.ones_like(IGNORED, bool))):
        image = to_image_tensor(Image.open(tmp_path / f"images/{i}.png"))[None]
        with torch.no_grad():
            confidence = tiny_detector().confidence(image)[0, 0].numpy()
        errors.append(np.square(confidence - PART / 255)[counted].mean())
    assert found["figures"]["all"]["mse"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert (tmp_path / "out/report.html").is_file()
