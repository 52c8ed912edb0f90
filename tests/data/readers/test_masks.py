# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""PAL4VST, and folders of images and masks: each mask is what was drawn, each damage is counted and named."""

import pickle

import numpy as np
import pytest
from datasets import load_dataset
from fixtures.annotations import SIZE, imported, mask, picture, pixels, square

from diffdoctor import main
from diffusers_diffdoctor.data import find_shards, run_stage
from diffusers_diffdoctor.data.readers import Folders, Pal4vst


def pal4vst(top, name, values, split="train", mode=None, seed=0):
    picture(top / f"images/{split}/{name}.jpg", seed)
    mask(top / f"labels/{split}/{name}.png", values, mode)


def test_pal4vst_maps_are_the_masks_and_255_beside_1_does_not_count(tmp_path):
    top = tmp_path / "pal4vst"
    part = square(5, 10, 20, 30)
    pal4vst(top, "inner/indices", part // 255)
    pal4vst(top, "palette", part // 255, mode="P")
    pal4vst(top, "levels", part)
    pal4vst(top, "sound", square(0, 0, 0, 0))
    both = part // 255 + square(30, 0, 48, 8)
    pal4vst(top, "both", both)
    pal4vst(top, "other", part, split="val")
    rows, quarantined, counts = imported(tmp_path / "out", "pal4vst", top, "--generator", "sd2", "--category", "hand")
    assert not quarantined and set(rows) == {
        f"{name}.jpg" for name in ("inner/indices", "palette", "levels", "sound", "both")
    }
    for name in ("inner/indices", "palette", "levels", "both"):
        assert np.array_equal(pixels(rows[f"{name}.jpg"]["artifact_map"]), part)
    assert not pixels(rows["sound.jpg"]["artifact_map"]).any()
    assert np.array_equal(pixels(rows["both.jpg"]["ignore_map"]), square(30, 0, 48, 8))
    assert all(row["ignore_map"] is None for name, row in rows.items() if name != "both.jpg")
    assert {(row["generator"], *row["category"]) for row in rows.values()} == {("sd2", "hand")}
    assert rows["levels.jpg"]["image"]["bytes"] == (top / "images/train/levels.jpg").read_bytes()
    assert counts["facts"]["source/human"] == 5
    loaded = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"), split="train")
    assert loaded[0]["artifact_map"].size == loaded[0]["ignore_map"].size == SIZE


def test_with_artifact_1_a_255_never_is_one(tmp_path):
    top = tmp_path / "pal4vst"
    pal4vst(top, "unsure", square(0, 0, 10, 10))
    rows, *_ = imported(tmp_path / "auto", "pal4vst", top)
    assert pixels(rows["unsure.jpg"]["artifact_map"]).any() and rows["unsure.jpg"]["ignore_map"] is None
    rows, *_ = imported(tmp_path / "one", "pal4vst", top, "--artifact", "1")
    assert not pixels(rows["unsure.jpg"]["artifact_map"]).any()
    assert np.array_equal(pixels(rows["unsure.jpg"]["ignore_map"]), square(0, 0, 10, 10))


def test_pal4vst_damage_is_counted_and_named(tmp_path):
    top = tmp_path / "pal4vst"
    for i in range(3):
        pal4vst(top, f"good{i}", square(0, 0, 9, 9, 1), seed=i)
    pal4vst(top, "values", square(0, 0, 9, 9, 7) + square(20, 0, 30, 9, 1))
    pal4vst(top, "size", square(0, 0, 9, 9, size=(40, 48)))
    pal4vst(top, "cut label", square(0, 0, 9, 9))
    pal4vst(top, "cut image", square(0, 0, 9, 9))
    for path in (top / "labels/train/cut label.png", top / "images/train/cut image.jpg"):
        path.write_bytes(path.read_bytes()[:60])
    picture(top / "images/train/no label.jpg")
    mask(top / "labels/train/no image.png", square(0, 0, 9, 9))
    mask(top / "labels/train/colours.png", np.stack([square(0, 0, 9, 9), *2 * [square(0, 0, 0, 0)]], axis=-1))
    picture(top / "images/train/colours.jpg")
    picture(top / "images/train/twice.jpg")
    picture(top / "images/train/twice.png")
    mask(top / "labels/train/twice.png", square(0, 0, 9, 9))
    (top / "images/train/readme.txt").write_text("no image")
    for kind in ("images", "labels"):
        (top / kind / "train/old.gif").write_bytes(b"GIF89a")
    rows, quarantined, counts = imported(tmp_path / "out", "pal4vst", top)
    assert set(rows) == {f"good{i}.jpg" for i in range(3)}
    cut = quarantined.pop("cut label.png", None) or quarantined.pop("cut label.jpg")
    assert cut
    assert quarantined.pop("cut image.jpg")
    assert quarantined == {
        "values.jpg": "unknown values 7 in a label, expected were 0, 1, 255",
        "size.jpg": "An image of 48 x 40 pixels is annotated as one of 40 x 48.",
        "no label.jpg": "no mask of this name",
        "mask no image.png": "a mask without an image of its name",
        "colours.jpg": "A mask must have one channel of 8 bits, found colours.",
        "twice.jpg": "several images of this name",
        "twice.png": "several images of this name",
        "old.gif": "format that is not read (.gif)",
        "mask old.gif": "format that is not read (.gif)",
    }
    assert counts["rows_in"] == 3 + 11 == 3 + sum(counts["quarantined"].values())


def test_what_is_no_pal4vst_is_refused_at_once(tmp_path, capsys):
    pal4vst(tmp_path / "x", "a", square(0, 0, 1, 1), split="val")
    assert main(["data", "import", "pal4vst", str(tmp_path / "x"), "-o", str(tmp_path / "out")]) == 1
    assert "`split` can be val" in capsys.readouterr().err
    assert main(["data", "import", "pal4vst", str(tmp_path / "nothing"), "-o", str(tmp_path / "out")]) == 1
    assert "expected was the folder" in capsys.readouterr().err
    with pytest.raises(ValueError, match="`artifact` must be 1 or 255"):
        Pal4vst(artifact=2)
    assert not (tmp_path / "out").exists()


def test_folders_with_confidences_a_suffix_and_pixels_that_do_not_count(tmp_path):
    top = tmp_path / "images"
    soft = square(0, 0, 10, 10, 100) + square(20, 20, 30, 30, 200)
    for name, values in (("a", soft), ("deep/b", soft), ("sound", None)):
        picture(top / f"{name}.png")
        if values is not None:
            mask(tmp_path / f"masks/{name}_mask.png", values)
    out = tmp_path / "out"
    mask(tmp_path / "masks/a.png", soft)
    mask(tmp_path / "masks/a_mask.tif", soft)
    rows, quarantined, _ = imported(out, "folders", top, "--suffix", "_mask")
    assert quarantined == {
        "sound.png": "no mask of this name",
        "mask a.png": "a mask whose name does not end in '_mask'",
        "mask a_mask.tif": "a second mask of this name",
    }
    for name in ("a.png", "a_mask.tif"):
        (tmp_path / "masks" / name).unlink()
    assert all(np.array_equal(pixels(row["artifact_map"]), soft) for row in rows.values()) and len(rows) == 2
    arguments = ("folders", top, "--suffix", "_mask", "--sound-without", "--ignore", 100)
    rows, quarantined, _ = imported(tmp_path / "out2", *arguments, "--masks", tmp_path / "masks")
    assert not quarantined and not pixels(rows["sound.png"]["artifact_map"]).any()
    assert np.array_equal(pixels(rows["a.png"]["artifact_map"]), square(20, 20, 30, 30, 200))
    assert np.array_equal(pixels(rows["a.png"]["ignore_map"]), square(0, 0, 10, 10))


def test_folders_with_class_indices_and_damage(tmp_path):
    top = tmp_path / "images"
    for name in ("a", "b", "c"):
        picture(top / f"{name}.png")
    mask(top / "masks/a.png", square(0, 0, 10, 10, 1))
    mask(top / "masks/b.png", square(0, 0, 10, 10, 2))
    mask(top / "masks/c.png", square(0, 0, 10, 10, 1, (12, 10)))
    mask(top / "masks/d.png", square(0, 0, 10, 10, 1))
    rows, quarantined, _ = imported(tmp_path / "doubt", "folders", top)
    assert set(rows) == {"b.png"} and "`map_maximum=1`" in quarantined["a.png"]
    rows, quarantined, _ = imported(tmp_path / "out", "folders", top, "--map-maximum", "1")
    assert np.array_equal(pixels(rows["a.png"]["artifact_map"]), square(0, 0, 10, 10))
    # a mask of a quarter of its image's side is the schema's own, and no annotator's
    assert set(quarantined) == {"b.png", "c.png", "mask d.png"} and "12 x 10" in quarantined["c.png"]
    with pytest.raises(ValueError, match="`map_maximum` must be 1 or 255"):
        Folders(map_maximum=2)
    with pytest.raises(ValueError, match="`ignore` must be a value from 1 to 255"):
        Folders(ignore=0)


def test_an_import_that_was_stopped_goes_on_and_other_annotations_are_refused(tmp_path, capsys):
    top, out = tmp_path / "images", tmp_path / "out"
    for i in range(6):
        picture(top / f"{i}.png", seed=i)
        mask(tmp_path / f"masks/{i}.png", square(i, 0, 10 + i, 10))
    reader = Folders()
    shards = reader.find(top, shard_megabytes=0.007)
    assert len(shards) > 2
    assert run_stage(reader, shards, out, world_size=2, rank=0, show_progress=False) is None
    with pytest.raises(ValueError, match="not finished"):
        find_shards(out)
    whole = {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}
    counts = run_stage(reader, shards, out, show_progress=False)
    assert counts["rows_out"] == {"train": 6} and len(shards) == len(list(out.rglob("*.parquet"))) > len(whole)
    assert all(path.stat().st_mtime_ns == then for path, then in whole.items())
    elsewhere = pickle.loads(pickle.dumps((reader, shards)))  # as another process gets them
    run_stage(*elsewhere, tmp_path / "again", show_progress=False)
    for path in out.rglob("*.parquet"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(out)).read_bytes()
    mask(tmp_path / "masks/0.png", np.random.default_rng(0).integers(0, 255, SIZE[::-1]).astype(np.uint8))
    assert main(["data", "import", "folders", str(top), "-o", str(out), "--shard-size", "0.007"]) == 1
    assert "another input" in capsys.readouterr().err
