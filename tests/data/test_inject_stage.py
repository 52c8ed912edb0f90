# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`data inject`: which rows are spoiled, what they say afterwards, and what is refused."""

import io

import datasets
import numpy as np
import pytest
from fixtures.broken_files import CONTENTS
from fixtures.pipelines import tiny_flux, tiny_pixart, tiny_qwen, tiny_sdxl
from fixtures.rows import photo_bytes, write_rows
from PIL import Image

from diffdoctor import main
from diffusers_diffdoctor.data import FEATURES, Inject, find_shards, run_stage
from diffusers_diffdoctor.data.inject import boxes_of
from diffusers_diffdoctor.data.schema import conform, decode_image, decode_map, encode_png, no_artifact
from diffusers_diffdoctor.data.shards import write_shard
from diffusers_diffdoctor.miniature.renderer import render, sample_scene


def rows_of(folder):
    return [row for shard in find_shards(folder, "train") for row in shard.read()]


def pixels(entry):
    return np.asarray(Image.open(io.BytesIO(entry["bytes"])))


def scene_row(seed: int, **columns) -> dict:
    image, _ = render(sample_scene(np.random.default_rng(seed), 0.0))
    labels = {"artifact_map": no_artifact((64, 64)), "source": "rendered", "prompt": f"scene {seed}"}
    return {"image": encode_png(image, f"{seed}.png"), **labels, **columns}


@pytest.fixture
def sound(tmp_path):
    """12 sound scenes in 3 shards."""
    for part in range(3):
        write_rows(tmp_path / f"sound/train-{part}.parquet", [scene_row(i) for i in range(4 * part, 4 * part + 4)])
    return tmp_path / "sound"


def test_a_share_of_the_rows_is_spoiled_and_says_where_and_how(sound, tmp_path):
    counts = run_stage(Inject(seed=0), find_shards(sound), tmp_path / "out", show_progress=False)
    assert counts["rows_in"] == counts["rows_out"]["train"] == 12
    before, after = rows_of(sound), rows_of(tmp_path / "out")
    spoiled = [row for row in after if row["source"] == "injected"]
    assert 4 <= len(spoiled) <= 11
    for old, new in zip(before, after):
        assert (new["prompt"], new["image"]["path"]) == (old["prompt"], old["image"]["path"])
        image, artifact_map = decode_image(new), decode_map(new, (64, 64))
        if new["source"] == "injected":
            assert new["injected"] and artifact_map.size == image.size and artifact_map.getextrema() == (0, 255)
            assert (np.asarray(image) != pixels(old["image"])).any()
        else:
            assert new["source"] == "rendered" and new["injected"] == []
            assert artifact_map.getextrema() == (0, 0)
    read = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert sum(bool(kinds) for kinds in read["injected"]) == len(spoiled)


def test_workers_and_shards_do_not_change_a_row(sound, tmp_path):
    write_rows(tmp_path / "one/train-0.parquet", rows_of(sound))
    stage = Inject(seed=2)
    run_stage(stage, find_shards(sound), tmp_path / "a", workers=2, show_progress=False)
    run_stage(stage, find_shards(tmp_path / "one"), tmp_path / "b", show_progress=False)
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "b")
    run_stage(Inject(seed=3), find_shards(sound), tmp_path / "c", show_progress=False)
    assert rows_of(tmp_path / "a") != rows_of(tmp_path / "c")


def test_what_may_be_wrong_is_not_taught_as_sound(tmp_path):
    wrong = encode_png(np.full((64, 64), 255, np.uint8))
    broken = {name: {"image": make(), "source": "photo"} for name, make in CONTENTS.items()}
    rows = [
        scene_row(0, artifact_map=wrong, source="human"),
        scene_row(1, artifact_map=None, source=None),
        scene_row(2, artifact_map=encode_png(np.zeros((5, 5), np.uint8))),
        {"image": photo_bytes(0, (40, 12)), "source": "photo"},
        {"image": photo_bytes(1, (70, 50), "JPEG"), "source": "photo"},  # the only good one
        *broken.values(),
    ]
    write_rows(tmp_path / "in/train-0.parquet", rows)
    counts = run_stage(
        Inject(share=0.0, decoys=0.0), find_shards(tmp_path / "in"), tmp_path / "out", show_progress=False
    )
    good = [row for row in rows_of(tmp_path / "out") if row["image"]["bytes"] == rows[4]["image"]]
    assert len(good) == 1 and good[0]["source"] == "photo"  # its file is kept as it was
    assert decode_map(good[0], (70, 50)).getextrema() == (0, 0)
    reasons = counts["quarantined"]
    assert reasons["not known to be sound: its map is not zero"] == 1
    assert reasons["not known to be sound: it has no map and is no photograph"] == 1
    assert reasons["a side shorter than 16 pixels"] >= 1
    assert sum(reasons.values()) + counts["rows_out"]["train"] == len(rows)


def test_boxes_of_a_column_say_where(tmp_path):
    features = datasets.Features({**FEATURES, "hands": datasets.List(datasets.List(datasets.Value("float32")))})
    boxes = [[[8, 8, 30, 30]], [[30, 30, 8, 8]], [], None, [[-50, 0, 40, 400]], [[1, 2, 3]]] * 3
    rows = [{**conform(scene_row(i)), "hands": hands} for i, hands in enumerate(boxes)]
    (tmp_path / "in").mkdir()
    write_shard(tmp_path / "in/train-0.parquet", rows, features)
    stage = Inject(share=1.0, decoys=0.0, boxes="hands", most_size=0.9)
    counts = run_stage(stage, find_shards(tmp_path / "in"), tmp_path / "out", show_progress=False)
    assert counts["rows_out"]["train"] == 15 and sum(counts["quarantined"].values()) == 3
    (reason,) = counts["quarantined"]
    assert "x1, y1, x2, y2" in reason and "[1.0, 2.0, 3.0]" in reason
    outside = np.ones((64, 64), bool)
    outside[2:36, 2:36] = False
    held = 0
    for row in rows_of(tmp_path / "out"):
        if row["hands"] and min(row["hands"][0]) == 8:
            assert not np.asarray(decode_map(row, (64, 64)))[outside].any()
            held += bool(row["injected"])
    assert held >= 3


def test_a_column_of_boxes_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"no column 'faces'.*image, prompt"):
        boxes_of({"image": None, "prompt": "x"}, "faces", (64, 64))
    assert boxes_of({"faces": [[60, 70, 10, -5], [3, 3, 3, 9]]}, "faces", (64, 64)) == [[60.0, 64.0, 10.0, 0.0]]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"share": 1.5}, "`share`.*1.5"),
        ({"decoys": -0.1}, "`decoys`.*-0.1"),
        ({"kinds": {"sixth finger": 1}}, "`kinds`.*duplicate.*sixth finger"),
        ({"kinds": {}}, "`kinds`"),
        ({"kinds": {"omit": 0}}, "`kinds`"),
        ({"counts": {"0": 1}}, "`counts`.*from 1"),
        ({"counts": {"1": -1}}, "`counts`.*at least 0"),
        ({"least_size": 0.5, "most_size": 0.2}, "`least_size`.*0.5.*0.2"),
    ],
)
def test_wrong_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        Inject(**settings)


def test_the_command_injects_what_it_is_told(sound, tmp_path, capsys):
    out = str(tmp_path / "out")
    command = ["data", "inject", str(sound), "--output", out, "--share", "1", "--counts", "1", "--least-size", "0.2"]
    assert main([*command, "--kinds", "omit=9", "watermark"]) == 0
    assert "12 in = 12 out + 0 quarantined" in capsys.readouterr().out
    kinds = [kind for row in rows_of(out) for kind in row["injected"]]
    assert set(kinds) == {"omit", "watermark"} and kinds.count("omit") > kinds.count("watermark")
    assert main([*command, "--kinds", "omit=much"]) != 0
    assert "`--kinds` takes NAME=WEIGHT" in capsys.readouterr().err


# --- regions drawn anew by a pipeline --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [tiny_flux, tiny_sdxl, tiny_qwen])
def test_a_pipeline_draws_regions_anew(build, tmp_path):
    build().save_pretrained(tmp_path / "pipeline")
    write_rows(tmp_path / "in/train-0.parquet", [scene_row(i) for i in range(3)])
    settings = {"pipeline": str(tmp_path / "pipeline"), "steps": 2, "size": 64, "least_size": 0.3, "share": 1.0}
    stage = Inject(**settings, decoys=0.0, counts={"1": 1.0})
    run_stage(stage, find_shards(tmp_path / "in"), tmp_path / "out", show_progress=False)
    before, after = rows_of(tmp_path / "in"), rows_of(tmp_path / "out")
    assert sum(row["injected"] == ["repaint"] for row in after) >= 2
    for old, new in zip(before, after):
        difference = np.abs(pixels(new["image"]).astype(int) - pixels(old["image"])).max(-1)
        inside = np.asarray(decode_map(new, (64, 64))) > 0
        assert difference[~inside].max() <= 18
        assert (difference == 0).mean() > 0.3  # what lies outside of the region is not touched at all
    run_stage(stage, find_shards(tmp_path / "in"), tmp_path / "again", show_progress=False)
    assert rows_of(tmp_path / "again") == after


def test_a_pipeline_that_cannot_inpaint_is_named(tmp_path):
    tiny_pixart().save_pretrained(tmp_path / "pixart")
    write_rows(tmp_path / "in/train-0.parquet", [scene_row(0)])
    with pytest.raises(ValueError, match=r"`pipeline` '.*pixart' cannot be loaded"):
        run_stage(Inject(pipeline=str(tmp_path / "pixart")), find_shards(tmp_path / "in"), tmp_path / "out")
    with pytest.raises(ValueError, match="`kinds` must give some of duplicate"):
        Inject(kinds={"repaint": 1})
    with pytest.raises(ValueError, match="`strength` lie in"):
        Inject(pipeline="x", strength=0.0)
