# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""A detector on a labelled dataset against a loop that calls `confidence` image by image."""

import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.rows import photo_bytes, write_rows
from fixtures.segformer import tiny_detector
from PIL import Image

from diffdoctor import main
from diffusers_diffdoctor.data import Compare, evaluate_detector, find_or_load_shards, find_shards
from diffusers_diffdoctor.data.schema import decode_image, encode_png, no_artifact
from diffusers_diffdoctor.detector.tiling import tiled_confidence
from diffusers_diffdoctor.evaluation import DetectorFigures
from diffusers_diffdoctor.images import to_image_tensor


SIZES = [(48, 40), (96, 64), (50, 33)]


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector") / "tiny"
    tiny_detector().save_pretrained(folder)
    return str(folder)


def labelled_row(number: int) -> dict:
    """Images of three sizes with a square, or a quarter-sized map of zeros, or no label."""
    size = SIZES[number % 3]
    row = {
        "image": {"bytes": photo_bytes(number, size), "path": f"inner/{number}.png"},
        "category": [["hand", "face"], ["hand"], []][number % 3],
        "generator": ["flux", None][number % 2],
        "source": "photo" if number % 4 == 0 else "human",
    }
    array = np.zeros(size[::-1], np.uint8)
    array[4:20, 8 : 20 + number] = 255
    row["artifact_map"] = no_artifact(size) if number % 4 == 0 else encode_png(array)
    return row


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """(folder, the good rows): 14 rows in 2 shards, of which one is not labelled, one has a broken image and two bad maps."""
    folder, rows = tmp_path_factory.mktemp("labelled"), [labelled_row(number) for number in range(14)]
    good = [row for number, row in enumerate(rows) if number not in (3, 5, 6, 11)]
    rows[3]["artifact_map"] = None
    rows[5]["image"]["bytes"] = b"no image"
    rows[6]["artifact_map"] = {"bytes": b"no image", "path": None}
    rows[11]["artifact_map"] = encode_png(np.zeros((7, 7), np.uint8))
    for part in range(2):
        write_rows(folder / f"data/train-{part:05d}-of-00002.parquet", rows[7 * part : 7 * part + 7])
    return folder, good


def by_a_loop(rows, threshold=0.5, tile=False):
    model, figures = tiny_detector(), DetectorFigures(threshold)
    for row in rows:
        image = to_image_tensor(decode_image(row))[None]
        truth = to_map(row)
        if truth.shape[-2:] != image.shape[-2:]:
            assert not truth.any()
        with torch.no_grad():
            confidence = tiled_confidence(model, image, 64) if tile else model.confidence(image)
        # zeros at a quarter of the side: the detector's map at that size
        confidence = torch.nn.functional.interpolate(
            torch.logit(confidence.double()), truth.shape[-2:], mode="bilinear"
        )
        figures.update(confidence.sigmoid().float(), truth, [row["category"]], [row["generator"]], [row["source"]])
    return figures.compute()


def to_map(row):
    array = np.asarray(Image.open(io.BytesIO(row["artifact_map"]["bytes"])))
    return torch.from_numpy(array.copy())[None, None] / 255


def assert_close(found, expected, rel=1e-4):
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_close(found[name], value, rel)
        else:
            undefined = value is None or math.isnan(value)
            assert (found[name] is None) == undefined and (
                undefined or found[name] == pytest.approx(value, rel=rel)
            ), name


def full_size_only(rows):
    return [row for row in rows if row["source"] != "photo"]


def test_figures_are_those_of_confidence_image_by_image(labelled, detector, tmp_path):
    folder, good = labelled
    stage = Compare.by(detector, batch_size=3)
    result = evaluate_detector(stage, find_shards(folder), tmp_path, show_progress=False)
    assert (result["labelled"], result["left_out"], sum(result["quarantined"].values())) == (10, 1, 3)
    assert sum(reason.startswith("artifact_map") for reason in result["quarantined"]) == 2
    expected = by_a_loop(good)
    assert_close(result["figures"]["with_artifacts"], by_a_loop(full_size_only(good))["all"])
    assert result["figures"]["photographs"]["images"] == 4 == expected["photographs"]["images"]
    # the loop goes by way of the whole size, which resamples once more
    assert_close(result["figures"]["photographs"], expected["photographs"], rel=0.05)
    assert list(result["figures"]["categories"]) == ["face", "hand"] and list(result["figures"]["generators"]) == [
        "flux"
    ]
    assert result["figures"]["categories"]["face"]["images"] == expected["categories"]["face"]["images"]
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written == json.loads(json.dumps(result))


def test_batches_and_processes_make_no_difference(labelled, detector, tmp_path):
    shards, results = find_shards(labelled[0]), []
    for size in (1, 8):
        stage = Compare.by(detector, batch_size=size)
        results.append(evaluate_detector(stage, shards, tmp_path / str(size), show_progress=False))
    stage, options = Compare.by(detector), {"world_size": 2, "show_progress": False}
    assert evaluate_detector(stage, shards, tmp_path / "ranks", rank=1, **options) is None
    results.append(evaluate_detector(stage, shards, tmp_path / "ranks", rank=0, **options))
    for result in results[1:]:
        assert_close(result["figures"], results[0]["figures"], rel=1e-6)


@pytest.mark.parametrize(("threshold", "tile"), [(0.3, False), (0.5, True)])
def test_threshold_and_tiles(labelled, detector, tmp_path, threshold, tile):
    stage = Compare.by(detector, threshold=threshold, tile=tile)
    result = evaluate_detector(stage, find_shards(labelled[0]), tmp_path, show_progress=False)
    expected = by_a_loop(full_size_only(labelled[1]), threshold, tile)
    assert_close(result["figures"]["with_artifacts"], expected["all"], rel=1e-3)


def test_the_report_shows_the_worst(labelled, detector, tmp_path):
    result = evaluate_detector(
        Compare.by(detector),
        find_shards(labelled[0]),
        tmp_path,
        pictures=3,
        dataset_name="/home/x/<b>d</b>",
        show_progress=False,
    )
    assert result["dataset"] == "b>"  # the last component of a path
    page = (tmp_path / "report.html").read_text()
    assert "The worst false alarms" in page and "The worst misses" in page and "category hand" in page
    shown = re.findall(r"<figcaption>\s*(\d+)\.png", page)
    assert len(shown) == 6
    # the misses, the worst first, by the loop
    rows = {row["image"]["path"]: row for row in labelled[1]}
    misses = {path: by_a_loop([row])["all"]["kl_misses"] for path, row in rows.items()}
    worst = sorted(misses, key=misses.get, reverse=True)[:3]
    assert [f"inner/{number}.png" for number in shown[3:]] == worst


def test_a_folder_of_images_with_metadata(labelled, detector, tmp_path, capsys):
    """What people have at hand: images, masks, and a metadata.jsonl that says what belongs together."""
    folder = tmp_path / "pairs"
    (folder / "maps").mkdir(parents=True)
    lines = []
    for row in full_size_only(labelled[1]):
        name = row["image"]["path"].replace("inner/", "")
        (folder / name).write_bytes(row["image"]["bytes"])
        (folder / "maps" / name).write_bytes(row["artifact_map"]["bytes"])
        rest = {key: row[key] for key in ("category", "generator", "source")}
        lines.append(json.dumps({"file_name": name, "artifact_map_file_name": f"maps/{name}", **rest}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    command = [
        "evaluate-detector",
        str(folder),
        "--detector",
        detector,
        "-o",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "6 labelled, 0 left out, 0 quarantined" in said
    assert re.search(r"^all +6 ", said, re.M) and re.search(r"^category hand +\d", said, re.M)
    result = json.loads((tmp_path / "out/figures.json").read_text())
    assert_close(result["figures"], by_a_loop(full_size_only(labelled[1])))
    assert result["detector"] == "tiny" and result["dataset"] == "pairs"
    card = Path(detector, "README.md")
    assert main([*command, "--card"]) == 0  # nothing is left to measure
    assert "Measured on pairs" in card.read_text() and "| category hand |" in card.read_text()
    card.write_text("mine")
    assert main([*command, "--card"]) == 0
    assert "was edited and is kept" in capsys.readouterr().out and card.read_text() == "mine"
    assert main([*command[:3], "user/detector", *command[4:], "--card"]) == 1


def test_a_dataset_reads_no_file_outside_of_its_folder(tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(photo_bytes(0))
    (folder / "a.png").symlink_to(tmp_path / "secret.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png"}')
    (shard,) = find_or_load_shards(folder)
    (row,) = shard.read()
    assert "outside of the folder" in row.reason


def test_wrong_input_is_named(labelled, detector, tmp_path):
    stage = Compare.by(detector)
    write_rows(tmp_path / "bare/train.parquet", [labelled_row(1) | {"artifact_map": None}])
    with pytest.raises(ValueError, match=r"No row .* 1 of 1 have no map"):
        evaluate_detector(stage, find_shards(tmp_path / "bare"), tmp_path / "out", show_progress=False)
    with pytest.raises(ValueError, match=r"`threshold` must be in \(0, 1\]"):
        Compare.by(detector, threshold=0)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/metadata.jsonl").write_text("no json")
    with pytest.raises(ValueError, match="cannot be read as a folder of images"):
        find_or_load_shards(tmp_path / "bad")
    with pytest.raises(ValueError, match=r"threshold 0\.5, here 0\.4"):
        evaluate_detector(stage, find_shards(labelled[0]), tmp_path / "two", show_progress=False)
        evaluate_detector(
            Compare.by(detector, threshold=0.4), find_shards(labelled[0]), tmp_path / "two", show_progress=False
        )
