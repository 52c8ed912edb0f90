# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Photographs, mixtures, pseudo-labels and hard cases: what each stage does to its rows."""

import io
import json
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from datasets import load_dataset
from fixtures.broken_files import CONTENTS
from fixtures.rows import photo_bytes, write_rows
from fixtures.segformer import tiny_detector
from PIL import Image

from diffdoctor import main
from diffusers_diffdoctor import ArtifactDetectorForSemanticSegmentation
from diffusers_diffdoctor.data import Label, Merge, Photos, Score, find_shards, group_files, mine, run_stage, shares_of
from diffusers_diffdoctor.data.mine import choose
from diffusers_diffdoctor.data.schema import encode_png


BROKEN = {name: make() for name, make in CONTENTS.items()}


def rows_of(folder, split="train"):
    return [row for shard in find_shards(folder, split) for row in shard.read()]


def pixels(entry):
    return np.asarray(Image.open(io.BytesIO(entry["bytes"])))


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector")
    tiny_detector().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def pool(tmp_path):
    """60 unlabelled images of three sizes in 4 shards."""
    sizes = [(48, 40), (96, 64), (50, 33)]
    for part in range(4):
        rows = [
            {
                "image": {"bytes": photo_bytes(i, sizes[i % 3], "JPEG"), "path": f"{i}.jpg"},
                "category": ["hand", "dog"][i % 2],
            }
            for i in range(15 * part, 15 * part + 15)
        ]
        write_rows(tmp_path / f"pool/train-{part:05d}.parquet", rows)
    return tmp_path / "pool"


# --- photos ------------------------------------------------------------------------------------------------------------------------


def test_photos_of_a_folder_are_negatives_and_nothing_is_lost(tmp_path, capsys):
    folder = tmp_path / "photos"
    (folder / "inner").mkdir(parents=True)
    for i in range(6):
        (folder / "inner" / f"{i}.jpg").write_bytes(photo_bytes(i, (50, 33), "JPEG"))
    (folder / "strip.png").write_bytes(photo_bytes(0, (400, 20)))
    (folder / "cut.jpg").write_bytes(photo_bytes(1, (50, 33), "JPEG")[:200])
    (folder / "notes.txt").write_text("x")
    out = tmp_path / "out"
    assert main(["data", "photos", str(folder), "-o", str(out), "--category", "hand", "--shard-size", "0.003"]) == 0
    said = capsys.readouterr().out
    assert "9 found = 8 images + 1 skipped" in said and "8 in = 6 out + 2 quarantined" in said
    rows = rows_of(out)
    assert [row["image"]["path"] for row in rows] == [f"inner/{i}.jpg" for i in range(6)]
    assert all(row["image"]["bytes"] == photo_bytes(i, (50, 33), "JPEG") for i, row in enumerate(rows))
    assert {(row["source"], *row["category"]) for row in rows} == {("photo", "hand")}
    assert all(pixels(row["artifact_map"]).shape == (9, 13) and not pixels(row["artifact_map"]).any() for row in rows)
    assert len(find_shards(out)) > 1
    assert str(tmp_path) not in (out / "README.md").read_text() + (out / "stage.json").read_text()


def test_broken_files_are_quarantined_and_counted(tmp_path):
    files = []
    for i, (name, content) in enumerate(BROKEN.items()):
        path = tmp_path / f"{i:03d}.png"
        path.write_bytes(content)
        files.append((path, name))
    for i in range(20):
        path = tmp_path / f"good{i}.png"
        path.write_bytes(photo_bytes(i))
        files.append((path, path.name))
    counts = run_stage(Photos(), group_files(files, 0.05), tmp_path / "out", show_progress=False)
    assert counts["rows_in"] == len(files) and counts["rows_out"]["train"] == 20
    assert sum(counts["quarantined"].values()) == len(BROKEN)


def test_datasets_reads_what_lies_there_whatever_other_folders_of_this_name_held(tmp_path, monkeypatch):
    cache = str(tmp_path / "cache")
    for count, place in ((3, "a"), (5, "b"), (7, "a")):
        files = []
        for i in range(count):
            path = tmp_path / f"{i}.png"
            path.write_bytes(photo_bytes(i))
            files.append((path, path.name))
        out = tmp_path / place / "photos"
        run_stage(Photos(), group_files(files, 1), out, restart=True, show_progress=False)
        assert len(load_dataset(str(out), split="train", cache_dir=cache)) == count
        monkeypatch.chdir(tmp_path / place)
        assert len(load_dataset("photos", split="train", cache_dir=cache)) == count


# --- merge -------------------------------------------------------------------------------------------------------------------------


def test_proportions_are_kept_as_large_as_can_be_and_no_row_comes_twice(tmp_path):
    for name, count in (("a", 40), ("b", 30)):
        for part in range(2):
            numbers = range(part * count // 2, (part + 1) * count // 2)
            rows = [{"image": {"bytes": photo_bytes(i), "path": f"{name}{i}"}, "source": "human"} for i in numbers]
            write_rows(tmp_path / f"{name}/{part}.parquet", rows)
    assert shares_of([40, 30], None) == (1, 1)
    assert shares_of([40, 30], [1, 2]) == (15 / 40, 1)
    shards = [shard for number, name in enumerate("ab") for shard in find_shards(tmp_path / name, number=number)]
    counts = run_stage(Merge(shares_of([40, 30], [1, 2])), shards, tmp_path / "out", show_progress=False)
    assert counts["rows_in"] == 70 and counts["rows_out"] == {"train": 45} and counts["left_out"] == 25
    names = [row["image"]["path"] for row in rows_of(tmp_path / "out")]
    taken = sorted(int(name[1:]) for name in names if name.startswith("a"))
    assert len(set(names)) == 45 and len(taken) == 15
    assert max(np.diff(taken)) <= 3  # spread over the whole
    for wrong in ([1], [1, 0], [1, float("nan")]):
        with pytest.raises(ValueError, match="weights"):
            shares_of([40, 30], wrong)


def test_a_map_that_does_not_fit_is_quarantined(tmp_path):
    maps = [np.zeros((40, 48), np.uint8), np.zeros((10, 12), np.uint8), np.zeros((12, 10), np.uint8)]
    rows = [
        {"image": photo_bytes(i), "artifact_map": encode_png(one), "source": "human"} for i, one in enumerate(maps)
    ]
    rows.append({"image": b"no image"})
    write_rows(tmp_path / "a.parquet", rows)
    counts = run_stage(Merge((1.0,)), find_shards(tmp_path / "a.parquet"), tmp_path / "out", show_progress=False)
    assert counts["rows_out"] == {"train": 2} and sum(counts["quarantined"].values()) == 2


# --- label -------------------------------------------------------------------------------------------------------------------------


def expected_map(model, row):
    """By hand, an image at a time: the logits brought to a quarter of the image's side."""
    image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        full = model.confidence(tensor)
    return F.interpolate(full, (-(-image.height // 4), -(-image.width // 4)), mode="area")[0, 0]


def test_labels_are_the_detectors_own_at_a_quarter_of_the_side(pool, detector, tmp_path):
    out = tmp_path / "out"
    counts = run_stage(Label.by(detector, batch_size=7), find_shards(pool), out, show_progress=False)
    assert counts["rows_in"] == 60 and counts["rows_out"] == {"train": 60}
    model = ArtifactDetectorForSemanticSegmentation.from_pretrained(detector).eval()
    before, after = rows_of(pool), rows_of(out)
    for old, new in zip(before, after):
        assert new["image"] == old["image"] and new["source"] == "pseudo" and new["category"] == old["category"]
        found, wanted = pixels(new["artifact_map"]) / 255, expected_map(model, old).numpy()
        assert found.shape == wanted.shape and np.abs(found - wanted).mean() < 0.02
    assert len({row["artifact_map"]["bytes"] for row in after}) > 30


def test_maps_of_full_size_are_those_of_confidence(pool, detector, tmp_path):
    run_stage(Label.by(detector, full_size=True), find_shards(pool), tmp_path / "out", show_progress=False)
    model = ArtifactDetectorForSemanticSegmentation.from_pretrained(detector).eval()
    for row in rows_of(tmp_path / "out")[:6]:
        image = torch.from_numpy(pixels(row["image"]).copy()).permute(2, 0, 1)[None].float() / 255
        difference = pixels(row["artifact_map"]) / 255 - model.confidence(image)[0, 0].detach().numpy()
        assert np.abs(difference).max() < 0.02


def test_what_is_below_the_floor_is_labelled_sound(pool, detector, tmp_path):
    run_stage(Label.by(detector), find_shards(pool), tmp_path / "all", show_progress=False)
    whole = [pixels(row["artifact_map"]) for row in rows_of(tmp_path / "all")]
    floor = float(np.median(whole[0])) / 255
    run_stage(Label.by(detector, floor=floor), find_shards(pool), tmp_path / "floor", show_progress=False)
    cut = [pixels(row["artifact_map"]) for row in rows_of(tmp_path / "floor")]
    for before, after in zip(whole, cut):
        sure, faint = before > 255 * floor + 1, before < 255 * floor - 1  # values are rounded to 8 bits
        assert (after[sure] == before[sure]).all() and not after[faint].any()
    assert any((before < 255 * floor - 1).any() for before in whole)
    with pytest.raises(ValueError, match=r"`floor` must lie in \[0, 1\], got 2"):
        Label.by(detector, floor=2)


def test_threads_and_ranks_change_no_byte(pool, detector, tmp_path):
    shards, made = find_shards(pool), {}
    for name, decoders, world in (("a", 1, 1), ("b", 5, 1), ("c", 2, 3)):
        for rank in range(world):
            stage = Label.by(detector, decoders=decoders)
            run_stage(stage, shards, tmp_path / name, rank=rank, world_size=world, show_progress=False)
        made[name] = [path.read_bytes() for path in sorted((tmp_path / name / "data").iterdir())]
    assert len(made["a"]) == 4 and made["a"] == made["b"] == made["c"]


def test_better_labels_stay_unless_they_are_to_go(detector, tmp_path):
    label = encode_png(np.full((40, 48), 255, np.uint8))
    sources = ("human", "photo", "pseudo", "injected", None)
    rows = [{"image": photo_bytes(i), "artifact_map": label, "source": source} for i, source in enumerate(sources)]
    rows.append({"image": photo_bytes(9), "source": "human"})  # of a person, but not labelled
    write_rows(tmp_path / "a.parquet", rows)
    shards = find_shards(tmp_path / "a.parquet")
    run_stage(Label.by(detector), shards, tmp_path / "kept", show_progress=False)
    kept = [row["artifact_map"] == label for row in rows_of(tmp_path / "kept")]
    assert kept == [True, True, False, True, False, False]
    run_stage(Label.by(detector, relabel=True), shards, tmp_path / "replaced", show_progress=False)
    assert all(row["artifact_map"] != label and row["source"] == "pseudo" for row in rows_of(tmp_path / "replaced"))


def test_bad_images_are_quarantined_among_good_ones(detector, tmp_path):
    rows = [{"image": {"bytes": content, "path": name}} for name, content in BROKEN.items()]
    rows += [{"image": {"bytes": photo_bytes(0, (600, 20)), "path": "strip"}}]  # which the detector refuses
    rows = [row for pair in zip(rows, [{"image": photo_bytes(i)} for i in range(len(rows))]) for row in pair]
    write_rows(tmp_path / "a.parquet", rows)
    counts = run_stage(Label.by(detector), find_shards(tmp_path / "a.parquet"), tmp_path / "out", show_progress=False)
    assert counts["rows_in"] == len(rows) and counts["rows_out"]["train"] == len(rows) // 2
    assert sum(counts["quarantined"].values()) == len(rows) // 2
    named = [json.loads(line)["path"] for line in (tmp_path / "out/quarantine/00000.jsonl").open()]
    assert sorted(named) == sorted([*BROKEN, "strip"])


def test_another_detector_at_the_same_address_is_refused(pool, detector, tmp_path):
    stage = Label.by(detector)
    other = Label(stage.detectors, ("0" * 64,))
    with pytest.raises(ValueError, match="other weights"):
        run_stage(other, find_shards(pool), tmp_path / "out", show_progress=False)
    run_stage(stage, find_shards(pool), tmp_path / "labelled", show_progress=False)
    with pytest.raises(ValueError, match="weights_sha256"):
        run_stage(other, find_shards(pool), tmp_path / "labelled", show_progress=False)


def test_large_images_are_seen_in_tiles_too(detector, tmp_path):
    write_rows(tmp_path / "a.parquet", [{"image": photo_bytes(0, (300, 200))}])
    shards = find_shards(tmp_path / "a.parquet")
    maps = []
    for tile in (False, True):
        run_stage(Label.by(detector, tile=tile), shards, tmp_path / str(tile), show_progress=False)
        maps.append(pixels(rows_of(tmp_path / str(tile))[0]["artifact_map"]).astype(int))
    assert maps[0].shape == maps[1].shape == (50, 75) and (maps[1] >= maps[0] - 2).all() and (maps[1] > maps[0]).any()


def test_datatrove_runs_a_stage_and_finds_what_was_killed(pool, detector, tmp_path):
    from datatrove.executor import LocalPipelineExecutor

    from diffusers_diffdoctor.data.datatrove import StageStep

    stage, shards = Label.by(detector), find_shards(pool)
    run_stage(stage, shards, tmp_path / "alone", show_progress=False)
    step = StageStep(stage, shards, tmp_path / "out")

    def executor():
        return LocalPipelineExecutor([step], tasks=4, workers=1, logging_dir=str(tmp_path / "logs"))

    executor().run()
    made = [path.read_bytes() for path in sorted((tmp_path / "out/data").iterdir())]
    assert made == [path.read_bytes() for path in sorted((tmp_path / "alone/data").iterdir())]
    assert json.loads((tmp_path / "out/stage.json").read_text())["counts"]["rows_in"] == 60


# --- mine --------------------------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_a_loop_written_by_hand(pool, detector, tmp_path):
    run_stage(Score.by(detector, scales=(2.0,)), find_shards(pool), tmp_path / "scores", show_progress=False)
    files = sorted((tmp_path / "scores/data").iterdir())
    table = [row for file in files for row in pq.read_table(file).to_pylist()]
    assert [row["position"] for row in table] == list(range(15)) * 4 and table[0]["category"] == ["hand"]
    model = ArtifactDetectorForSemanticSegmentation.from_pretrained(detector).eval()
    for number in (0, 7, 44):
        image = torch.from_numpy(pixels(rows_of(pool)[number]["image"]).copy()).permute(2, 0, 1)[None].float() / 255
        size = model.config.image_size
        views = []
        for side, mirrored in ((size, False), (size, True), (2 * size, False)):
            model.config.image_size = side
            seen = image.flip(-1) if mirrored else image
            view = F.interpolate(model.confidence(seen), scale_factor=0.25, mode="area")[0, 0]
            views.append((view.flip(-1) if mirrored else view).detach().numpy())
        spread, mean = 2 * np.std(views, axis=0), np.mean(views, axis=0)
        unsure = 1 - np.abs(2 * mean - 1)
        worst = max(1, round(0.01 * spread.size))
        assert table[number]["disagreement"] == pytest.approx(np.sort(spread, None)[-worst:].mean(), abs=0.05)
        assert table[number]["uncertainty"] == pytest.approx(np.sort(unsure, None)[-worst:].mean(), abs=0.05)
        assert table[number]["hardness"] == pytest.approx(
            (table[number]["disagreement"] + table[number]["uncertainty"]) / 2
        )


def test_the_hardest_are_chosen_and_flagged_categories_first():
    def row(position, hardness, category):
        return {"position": position, "hardness": hardness, "chance": position / 10, "category": [category]}

    scores = [[row(0, 0.9, "dog"), row(1, 0.1, "hand"), row(2, 0.8, "dog")], [row(0, 0.2, "hand"), row(1, 0.7, "cat")]]
    assert choose(scores, 3) == [[0, 2], [1]]
    assert choose(scores, 4, flagged=["hand"]) == [[0, 1, 2], [0]]
    assert choose(scores, 2, flagged=["hand"], flagged_share=0.5) == [[0], [0]]
    assert choose(scores, 99) == [[0, 1, 2], [0, 1]]
    drawn = [choose(scores, 2, at_random=True, seed=seed) for seed in range(40)]
    counts = np.zeros(5)
    for first, second in drawn:
        counts[first] += 1
        counts[[3 + position for position in second]] += 1
    assert counts.sum() == 80 and counts.min() >= 6 and drawn[0] == choose(scores, 2, at_random=True, seed=0)


def test_a_dataset_is_divided_and_the_command_goes_on(pool, detector, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["data", "mine", str(pool), "--detector", detector, "--count", "10", "--flagged", "dog", "-o", str(out)]
    assert main([*command, "--device", "cpu"]) == 0
    assert "60 in = 50 simple + 10 hard + 0 quarantined" in capsys.readouterr().out
    hard, simple = rows_of(out, "hard"), rows_of(out, "simple")
    loaded = load_dataset(str(out), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"hard": 10, "simple": 50}
    names = {row["image"]["path"] for row in [*hard, *simple]}
    assert names == {f"{i}.jpg" for i in range(60)}
    assert sum(row["category"] == ["dog"] for row in hard) >= 5
    assert main([*command, "--device", "cpu"]) == 0
    with pytest.raises(ValueError, match="count"):
        mine(Score.by(detector), find_shards(pool), tmp_path / "x", 0)
    flagged = tmp_path / "balance.json"
    flagged.write_text(json.dumps({"flagged": ["dog"]}))
    again = [*command[:-3], str(flagged), "-o", str(tmp_path / "again"), "--device", "cpu"]
    assert main(again) == 0
    assert rows_of(tmp_path / "again", "hard") == hard


def test_wrong_use_is_said_on_one_line(pool, detector, tmp_path, capsys):
    cases = [
        (["data", "label", str(pool), "--detector", str(tmp_path), "-o", str(tmp_path / "o")], "no config.json"),
        (
            ["data", "label", str(pool), "--detector", detector, "-o", str(tmp_path / "o"), "--rank", "1"],
            "belong together",
        ),
        (["data", "merge", str(pool), "--weights", "1", "2", "-o", str(tmp_path / "o")], "2 numbers for 1 datasets"),
        (["data", "photos", str(pool), "-o", str(tmp_path / "o"), "--shard-size", "0"], "must be positive"),
        (["data", "merge", f"{pool}:validation", "-o", str(tmp_path / "o")], "no split 'validation'"),
    ]
    for command, words in cases:
        assert main(command) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("diffdoctor data: error: ") and words in error


@pytest.mark.slow
def test_launched_processes_share_the_work(pool, detector, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "diffdoctor"]
    command += ["data", "label", str(pool), "--detector", detector, "-o", str(out), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("60 in = 60 out + 0 quarantined") >= 1
    run_stage(Label.by(detector), find_shards(pool), tmp_path / "alone", show_progress=False)
    made = [path.read_bytes() for path in sorted((out / "data").iterdir())]
    assert made == [path.read_bytes() for path in sorted((tmp_path / "alone/data").iterdir())]
