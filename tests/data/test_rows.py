# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from fixtures.rows import photo_bytes, write_rows
from fixtures.runs import squares
from PIL import Image

from diffusers_diffdoctor.data import Photos, group_files, run_stage
from diffusers_diffdoctor.data.rows import load_rows
from diffusers_diffdoctor.data.schema import FEATURES, encode_png


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def same(found, expected):
    return np.array_equal(np.asarray(found), np.asarray(expected))


def test_what_a_stage_wrote(tmp_path):
    images = []
    for i, row in enumerate(squares(5)):
        images.append(row["image"])
        row["image"].save(tmp_path / f"{i}.png")
    shards = group_files([(tmp_path / f"{i}.png", f"{i}.png") for i in range(5)], shard_megabytes=0.005)
    run_stage(Photos(category=("square",)), shards, tmp_path / "photos")
    assert len(shards) > 1 and (tmp_path / "photos/stage.json").is_file()
    rows = load_rows(tmp_path / "photos")
    assert rows.column_names == list(FEATURES) and len(rows) == 5
    for row, image in zip(rows, images):
        assert (
            same(row["image"], image)
            and row["artifact_map"].size == (8, 8)
            and row["artifact_map"].getextrema() == (0, 0)
        )
        assert row["category"] == ["square"] and row["source"] == "photo"


def test_parquet_of_others_and_a_folder_of_images(tmp_path):
    rows = [row | {"category": "square", "year": 2024, "note": "x"} for row in squares(3)]
    features = {
        "image": ImageFeature(),
        "artifact_map": ImageFeature(),
        "category": Value("string"),
        "year": Value("int64"),
    }
    Dataset.from_list(rows, features=Features(features | {"note": Value("string")})).to_parquet(
        tmp_path / "p/test-0.parquet"
    )
    (tmp_path / "images").mkdir()
    with open(tmp_path / "images/metadata.jsonl", "w") as file:
        for i, row in enumerate(rows):
            row["image"].save(tmp_path / f"images/{i}.png")
            row["artifact_map"].save(tmp_path / f"images/{i}_map.png")
            line = {"file_name": f"{i}.png", "artifact_map_file_name": f"{i}_map.png", "category": "square"}
            file.write(json.dumps(line) + "\n")
    for found in (load_rows(tmp_path / "p", "test"), load_rows(tmp_path / "images")):
        assert set(found.column_names) - {"year"} == {"image", "artifact_map", "category"}
        for row, expected in zip(found, rows, strict=True):
            assert same(row["image"], expected["image"]) and same(row["artifact_map"], expected["artifact_map"])
            assert row["category"] == "square"


def test_bytes_without_the_librarys_own_notes(tmp_path):
    """As other programs write Parquet."""
    images = [encode_png(np.full((4, 4, 3), i, np.uint8)) for i in range(2)]
    pq.write_table(
        pa.table({"image": [image["bytes"] for image in images], "artifact_map": images}), tmp_path / "a.parquet"
    )
    rows = load_rows(tmp_path / "a.parquet")
    assert isinstance(rows[1]["image"], Image.Image) and rows[1]["image"].getpixel((0, 0)) == (1, 1, 1)


def test_paths_are_refused(tmp_path):
    """A stranger's dataset must not choose files of this machine."""
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    for number, image in enumerate(
        (str(tmp_path / "secret.png"), {"bytes": None, "path": str(tmp_path / "secret.png")})
    ):
        file = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"image": [image]}), file)
        with pytest.raises(ValueError, match="`image` must hold the bytes of image files, but 1 rows have only paths"):
            load_rows(file)
    folder = tmp_path / "images"
    folder.mkdir()
    os.symlink(tmp_path / "secret.png", folder / "0.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png"}\n')
    with pytest.raises(ValueError, match=r"0\.png', which lies outside of the folder"):
        load_rows(folder)


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises((FileNotFoundError, ValueError), match="nowhere"):
        load_rows(tmp_path / "nowhere")
    pq.write_table(pa.table({"image": [b"x"], "category": ["a"]}), tmp_path / "train-0.parquet")
    pq.write_table(pa.table({"image": [b"x"], "category": [{"a": 1}]}), tmp_path / "train-1.parquet")
    with pytest.raises(ValueError, match="cannot be read"):
        load_rows(tmp_path)


@pytest.mark.parametrize("name", ["a#b", "a%23b", "a[c]b", "a*b", "a?b"])
def test_a_name_is_no_pattern_and_no_address(tmp_path, name):
    for folder, seed in ((name, 0), ("acb", 9)):  # what the name would mean as a pattern
        for count, split in enumerate(("train", "test"), 1):
            rows = [{"image": photo_bytes(seed), "prompt": f"{folder} {split}"}] * count
            write_rows(tmp_path / folder / f"{split}-00000-of-00001.parquet", rows)
    for count, split in enumerate(("train", "test"), 1):
        assert load_rows(tmp_path / name, split)["prompt"] == [f"{name} {split}"] * count
