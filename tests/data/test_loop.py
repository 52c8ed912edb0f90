# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The loop: what it is told, what it skips, when it waits. Its commands are the real ones, with tiny models."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fixtures.rows import photo_bytes, write_rows

from diffdoctor import main
from diffusers_diffdoctor.cli.data_loop import WAITS
from diffusers_diffdoctor.data import find_shards, load_rows
from diffusers_diffdoctor.data.annotate import SKIPPED, Annotation, key_of, write_annotation
from diffusers_diffdoctor.data.loop import LoopSettings, read_settings
from diffusers_diffdoctor.data.loop.masks import masks_missing
from diffusers_diffdoctor.data.loop.rounds import fingerprint, weights_of_round
from diffusers_diffdoctor.data.loop.settings import arguments, named
from diffusers_diffdoctor.data.schema import encode_png
from diffusers_diffdoctor.detector.architectures import new_detector


SIZE = 32


# --- what it is told ---------------------------------------------------------------------------------------------------------------

LEAST = {"output_dir": "loop", "pool": "pool", "train_dataset": ["annotated"], "detector": "detector"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pool": 3}, "`pool`"),
        ({"detector": ""}, "`detector`"),
        ({"train_dataset": []}, "`train_dataset` is missing"),
        ({"train_dataset": [1]}, "`train_dataset`"),
        ({"train_dataset": ["a/x", "b/x"]}, "'x' twice"),
        ({"train_dataset": ["masks=a"]}, "'masks' is a name of the loop's own"),
        ({"eval_dataset": ["a/x", "b/x"]}, "`eval_dataset` has 'x' twice"),
        ({"rounds": 0}, "`rounds`"),
        ({"rounds": True}, "`rounds`"),
        ({"pseudo_from_round": -1}, "`pseudo_from_round`"),
        ({"mine": [1]}, "`mine`"),
        ({"annotate": {"people": 2}}, "`annotate` has `copies` and `share`, found people"),
        ({"annotate": {"copies": 0}}, "`annotate: copies`"),
        ({"annotate": {"share": 1.5}}, "`annotate: share`"),
        ({"prompts": {}}, "`prompts` and `synthesize` belong together"),
        ({"detector": None}, "trains the first one"),
    ],
)
def test_wrong_settings_are_refused_by_name(change, message):
    LoopSettings(**LEAST)
    with pytest.raises(ValueError, match=message):
        LoopSettings(**LEAST | change)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "expected"),
        ("- a", "must hold `name: value` lines"),
        ("pol: x", "there is no pol; a loop has annotate, balance"),
        ("pool: x", "`output_dir` is missing"),
        ("a: &a [1]\nb: *a", r"alias \*a"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, text, message):
    path = tmp_path / "loop.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_settings(path)
    assert str(path) in str(error.value)


def test_sections_become_words():
    section = {"batch_size": 3, "pipeline": ["a", "b"], "tile": True, "relabel": False, "width": None}
    assert arguments(section) == ["--batch-size", "3", "--pipeline", "a", "b", "--tile"]
    section = {"max_steps": 3, "use_cpu": True, "bf16": False, "source_weights": {"a": 1}}
    assert arguments(section, "_") == [
        *("--max_steps", "3", "--use_cpu", "true", "--bf16", "false"),
        *("--source_weights", '{"a": 1}'),
    ]
    assert named("a/b/c.parquet") == ("c", "a/b/c.parquet") and named("x=a/b:test") == ("x", "a/b:test")
    assert named("a/b:test") == ("b", "a/b:test")


def test_photographs_have_the_same_share_of_the_draws_in_every_round():
    weights = {"annotated": 1, "photos": 4, "masks": 2, "pseudo": 1}
    for sources, expected in (
        (["annotated", "photos"], {"annotated": 4, "photos": 4}),
        (["annotated", "photos", "masks"], {"annotated": 2, "photos": 4, "masks": 2}),
        (["annotated", "photos", "masks", "pseudo"], weights),
        (["rendered", "photos"], {"photos": 4}),  # which `train-detector` refuses by name
    ):
        assert weights_of_round(weights, sources) == expected


def test_content_counts_and_not_when_it_was_written(tmp_path):
    folder, copy = tmp_path / "a", tmp_path / "b"
    (folder / "data").mkdir(parents=True)
    (folder / "data/x").write_bytes(bytes(3 * 2**20))
    (folder / ".hidden").write_text("1")
    before = fingerprint(str(folder))
    shutil.copytree(folder, copy)
    os.utime(copy / "data/x", (1, 1))
    (copy / ".hidden").write_text("2")
    assert fingerprint(str(copy)) == fingerprint(f"{copy}:hard") == before
    for place in (0, 3 * 2**20 - 1):
        content = bytearray(3 * 2**20)
        content[place] = 1
        (copy / "data/x").write_bytes(content)
        assert fingerprint(str(copy)) != before
    (copy / "data/x").rename(copy / "data/y")
    (copy / "data/y").write_bytes(bytes(3 * 2**20))
    assert fingerprint(str(copy)) != before
    assert fingerprint("someone/detector") == "someone/detector"


# --- a loop ------------------------------------------------------------------------------------------------------------------------


def dataset(folder: Path, count: int, first: int, labelled: bool = False) -> Path:
    rows = []
    for number in range(first, first + count):
        row = {"image": {"bytes": photo_bytes(number, (SIZE, SIZE)), "path": f"{number}.png"}, "category": ["hand"]}
        if labelled:
            mask = np.zeros((SIZE, SIZE), np.uint8)
            mask[: number % 3 * 8] = 255
            row |= {"artifact_map": encode_png(mask), "source": "human"}
        rows.append(row)
    write_rows(folder / "data/train-00000-of-00001.parquet", rows)
    return folder


def paint(mined: Path, queue: Path, value: int = 255) -> None:
    for number, row in enumerate(row for shard in find_shards(mined, "hard") for row in shard.read()):
        mask = np.zeros((SIZE, SIZE), np.uint8)
        mask[:8] = value
        annotation = Annotation(mask, SKIPPED if number == 2 else "done", ("hand",), seconds=30.0)
        write_annotation(queue, key_of(row), "anna", annotation)


def done_before(text: str) -> list[str]:
    return [line.split("] ")[1].split(":")[0] for line in text.splitlines() if line.endswith(": done before")]


def test_a_round_waits_for_people_skips_what_is_done_and_does_again_what_has_changed(tmp_path, capsys):
    torch.manual_seed(0)
    new_detector("b0", image_size=SIZE).save_pretrained(tmp_path / "detector")
    content = {
        "output_dir": str(tmp_path / "loop"),
        "pool": str(dataset(tmp_path / "pool", 8, 100)),
        "train_dataset": [f"annotated={dataset(tmp_path / 'annotated', 6, 0, True)}"],
        "eval_dataset": [f"test={dataset(tmp_path / 'test', 3, 50, True)}"],
        "detector": str(tmp_path / "detector"),
        "rounds": 1,
        "balance": {"min_images": 1},
        "mine": {"count": 3},
        "train": {
            "config": "small",
            "image_size": SIZE,
            "max_steps": 2,
            "hold_out": 0,
            "eval_strategy": "no",
            "load_best_model_at_end": False,
            "dataloader_num_workers": 0,
            "per_device_train_batch_size": 2,
            "source_weights": {
                "annotated": 1,
                "masks": 2,
                "pseudo": 1,
            },  # there are no pseudo-labels in the first round
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
        },
    }
    config = tmp_path / "loop.yaml"
    config.write_text(yaml.safe_dump(content))
    command = ["data", "loop", "--config", str(config)]
    loop = tmp_path / "loop"
    mined, queue = loop / "round-1/mined", loop / "round-1/masks"

    assert main(command) == WAITS
    said = capsys.readouterr().out
    assert "Round 1 waits for people: 3 of 3 masks are missing." in said
    assert f"diffdoctor ui --annotate {mined}:hard --queue {queue} --restart" in said
    paint(mined, queue)
    assert masks_missing(f"{mined}:hard", queue) == (0, 3)
    assert masks_missing(f"{mined}:hard", queue, copies=2) == (3, 6)

    assert main(command) == 0
    said = capsys.readouterr().out
    assert done_before(said) == ["evaluate-test", "label", "balance", "mine"]
    assert "round 0" in said and "round 1" in said
    painted = load_rows(loop / "round-1/annotated")
    assert len(painted) == 2  # one was skipped
    for name in ("round.json", "report.html", "detector/model.safetensors"):
        assert (loop / "round-1" / name).is_file()
    assert '"minutes": 1.0' in (loop / "round-1/round.json").read_text()

    files = {path: path.stat().st_mtime_ns for path in loop.rglob("*.parquet")}
    weights = (loop / "round-1/detector/model.safetensors").read_bytes()
    assert main(command) == 0
    steps = ["evaluate-test", "label", "balance", "mine", "annotate", "train", "evaluate-test"]
    assert done_before(capsys.readouterr().out) == steps
    assert files == {path: path.stat().st_mtime_ns for path in loop.rglob("*.parquet")}

    paint(mined, queue, 0)  # people think again
    shutil.rmtree(loop / "round-1/balance")
    assert main(command) == 0
    assert done_before(capsys.readouterr().out) == ["evaluate-test", "label", "mine"]
    assert (loop / "round-1/detector/model.safetensors").read_bytes() != weights
    assert not any(np.array(row["artifact_map"]).any() for row in load_rows(loop / "round-1/annotated"))

    content["mine"]["count"] = 4
    config.write_text(yaml.safe_dump(content))
    assert main(command) == WAITS
    assert "1 of 4 masks are missing" in capsys.readouterr().out  # those that are painted stay

    for section, change, message in (
        ("mine", {"cuont": 3}, "did you mean --count?"),
        ("train", {"max_step": 2}, "max_step"),
        ("label", {"batch_size": "many"}, "invalid int value"),
    ):
        config.write_text(yaml.safe_dump(content | {section: content.get(section, {}) | change}))
        with pytest.raises((SystemExit, ValueError)) as end:
            main(command)
        assert message in capsys.readouterr().err + str(end.value)
    config.write_text(yaml.safe_dump(content | {"label": {"output": "x"}}))
    assert main(command) == 1
    assert "the loop gives `output` itself" in capsys.readouterr().err
    config.write_text(yaml.safe_dump(content | {"output_dir": str(tmp_path / "pool")}))
    assert main(command) == 1
    assert "which no loop has written" in capsys.readouterr().err


def test_what_would_fail_after_people_have_painted_is_said_before(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = ["data", "loop", "--config", "loop.yaml"]
    for content, message in (
        (LEAST, "annotated"),
        (LEAST | {"train_dataset": [str(dataset(tmp_path / "painted", 3, 0, True))]}, "`--model detector`"),
    ):
        Path("loop.yaml").write_text(yaml.safe_dump(content))
        assert main(command) == 1
        said = capsys.readouterr().err
        assert "'loop.yaml': " in said and message in said and not Path("loop").exists()


def test_a_command_that_fails_stops_the_loop_and_is_named(tmp_path, capsys):
    content = LEAST | {name: str(tmp_path / name) for name in ("output_dir", "pool", "detector")}
    content["train_dataset"] = [str(dataset(tmp_path / "annotated", 3, 0, True))]
    new_detector("b0", image_size=SIZE).save_pretrained(tmp_path / "detector")
    (tmp_path / "loop.yaml").write_text(yaml.safe_dump(content))
    assert main(["data", "loop", "--config", str(tmp_path / "loop.yaml")]) == 1
    assert "Round 1, label: `diffdoctor data` ended with status 1" in capsys.readouterr().err
