# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Exports to Label Studio: read back by the reader, and by a decoder written from the format's description alone."""

import hashlib
import io
import json
import shutil
from urllib.parse import parse_qs, urlsplit
from xml.etree import ElementTree

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Features
from fixtures.annotations import SIZE, imported, pixels, square
from fixtures.rows import photo_bytes
from PIL import Image

from diffdoctor import main
from diffusers_diffdoctor.data.schema import FEATURES, OPTIONAL, conform, encode_png
from diffusers_diffdoctor.data.shards import write_shard


def uncover(packed: list[int], size: tuple[int, int]) -> np.ndarray:
    """The layer (H, W, 4) of a brush, bit by bit."""
    text = "".join(f"{byte:08b}" for byte in packed)
    at = 0

    def take(bits: int) -> int:
        nonlocal at
        at += bits
        return int(text[at - bits : at], 2)

    count, word, lengths = take(32), take(5) + 1, [take(4) + 1 for _ in range(4)]
    values: list[int] = []
    while len(values) < count:
        repeated = take(1)
        length = take(lengths[take(2)]) + 1
        values += [take(word)] * length if repeated else [take(word) for _ in range(length)]
    assert len(values) == count and len(text) - at < 8 and "1" not in text[at:]
    return np.array(values, np.uint8).reshape(size[1], size[0], 4)


def soft() -> np.ndarray:
    return np.tile(np.linspace(0, 255, SIZE[0]).round().astype(np.uint8), (SIZE[1], 1))


def write_dataset(folder, rows, file="train-00000.parquet"):
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    write_shard(path, [conform(row) for row in rows], Features(FEATURES | OPTIONAL))
    return str(folder)


def row(seed, artifact=None, source="human", ignored=None, content=None, **columns):
    columns |= {"image": {"bytes": content or photo_bytes(seed, SIZE), "path": f"some/{seed}.png"}, "source": source}
    columns |= {"artifact_map": None if artifact is None else encode_png(artifact)}
    return columns | {"ignore_map": None if ignored is None else encode_png(ignored)}


@pytest.fixture
def dataset(tmp_path):
    """Two shards: masks of people and others, soft ones, small ones, none; broken images and maps."""
    noise = (np.random.default_rng(0).random(SIZE[::-1]) < 0.5) * np.uint8(255)
    first = [
        row(0, noise, ignored=square(1, 1, 9, 9), prompt="a hand", category=["hand", "cup"], generator="flux"),
        row(1, soft(), "pseudo"),
        row(2, square(5, 5, 20, 20), "injected"),
        row(3, None, None),
        row(4, np.zeros(SIZE[::-1], np.uint8)),
        row(5, square(0, 0, 3, 3), content=b"no image"),
    ]
    small = np.zeros((10, 12), np.uint8)
    small[3:6, 4:8] = 255
    second = [row(6, small, "pseudo"), row(7, square(0, 0, 3, 3, size=(9, 9))), row(0, noise)]
    tiff = io.BytesIO()
    Image.open(io.BytesIO(photo_bytes(8, SIZE))).save(tiff, "TIFF")
    second.append(row(8, None, None, content=tiff.getvalue()))
    write_dataset(tmp_path / "dataset", first)
    return write_dataset(tmp_path / "dataset", second, "train-00001.parquet")


def export(dataset, output, *arguments, status=0):
    assert main(["data", "export", "label-studio", dataset, "-o", str(output), *map(str, arguments)]) == status
    return json.loads((output / "tasks.json").read_text()) if status == 0 else None


def masks_of(task):
    """label -> mask of what a task shows."""
    (view,) = [*task.get("annotations", []), *task.get("predictions", [])]
    found = {}
    for one in view["result"]:
        assert one["type"] == "brushlabels" and one["value"]["format"] == "rle"
        size = (one["original_width"], one["original_height"])
        layer = uncover(one["value"]["rle"], size)
        (label,) = one["value"]["brushlabels"]
        found[label] = layer[..., 3] >= 128
    return found


def test_tasks_show_the_masks_and_the_images(dataset, tmp_path, capsys):
    out = tmp_path / "for the team"
    tasks = export(dataset, out)
    said = capsys.readouterr().out
    assert "10 in = 8 out + 2 quarantined" in said
    assert "3 annotated, 3 predicted, 2 unlabelled" in said
    assert [(bool(t.get("annotations")), bool(t.get("predictions"))) for t in tasks] == [
        (True, False), (False, True), (False, True), (False, False), (True, False), (False, True), (True, False),
        (False, False),
    ]  # fmt: skip
    noise = pixels({"bytes": pq.read_table(f"{dataset}/train-00000.parquet").to_pylist()[0]["artifact_map"]["bytes"]})
    ignored = square(1, 1, 9, 9) > 0
    shown = masks_of(tasks[0])
    assert np.array_equal(shown["artifact"], (noise > 0) & ~ignored) and np.array_equal(shown["unsure"], ignored)
    assert np.array_equal(masks_of(tasks[1])["artifact"], soft() >= 128)
    assert masks_of(tasks[4]) == {}  # people say that nothing is wrong
    enlarged = masks_of(tasks[5])["artifact"]
    assert enlarged.shape == SIZE[::-1] and enlarged[14:22, 18:30].all() and enlarged.sum() < 16 * 20
    # the images are those of the rows, where the folder's parent is the root of what Label Studio serves
    for task, seed in zip(tasks, (0, 1, 2, 3, 4, 6, 0, 8)):
        (path,) = parse_qs(urlsplit(task["data"]["image"]).query)["d"]
        content = (tmp_path / path).read_bytes()
        assert content == photo_bytes(seed, SIZE) or (seed == 8 and path.endswith(".png"))
        with Image.open(io.BytesIO(content)) as found, Image.open(io.BytesIO(photo_bytes(seed, SIZE))) as wanted:
            assert np.array_equal(np.asarray(found), np.asarray(wanted))
    # what names what
    config = ElementTree.parse(out / "config.xml").getroot()
    image, brushes = config.find("Image"), config.find("BrushLabels")
    one = tasks[0]["annotations"][0]["result"][0]
    assert (one["from_name"], one["to_name"]) == (brushes.get("name"), image.get("name")) and image.get(
        "value"
    ) == "$image"
    assert brushes.get("toName") == image.get("name")
    assert {label.get("value") for label in brushes} == {"artifact", "unsure"}
    assert all(config.find("Header").get("value").removeprefix("$") in task["data"] for task in tasks)
    reasons = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [reason["path"] for reason in reasons] == ["some/5.png", "some/7.png"]
    assert {path.name for path in out.iterdir() if not path.name.startswith(".")} == {
        "tasks.json", "config.xml", "images", "quarantine.jsonl", "README.md",
    }  # fmt: skip
    assert str(tmp_path) not in (out / "tasks.json").read_text() + (out / "README.md").read_text()


def test_what_comes_back_is_what_went_out(dataset, tmp_path):
    out = tmp_path / "out"
    tasks = export(dataset, out)
    arguments = ("label-studio", out / "tasks.json", "--images", out / "images", "--labels", "artifact")
    arguments += ("--ignore-labels", "unsure")
    assert main(["data", "import", *map(str, arguments), "--predictions", "-o", str(tmp_path / "back")]) == 0
    table = pq.read_table(tmp_path / "back/data").to_pylist()
    painted = [task for task in tasks if "annotations" in task or "predictions" in task]
    assert len(table) == len(painted) == 6
    for found, task in zip(table, painted):
        wanted = masks_of(task)
        nothing = np.zeros(SIZE[::-1], bool)
        assert np.array_equal(pixels(found["artifact_map"]), wanted.get("artifact", nothing) * np.uint8(255))
        ignored = None if found["ignore_map"] is None else pixels(found["ignore_map"])
        assert (ignored is None) == ("unsure" not in wanted)
        assert ignored is None or np.array_equal(ignored, wanted["unsure"] * np.uint8(255))
    assert [one["source"] for one in table] == ["human", "pseudo", "pseudo", "human", "pseudo", "human"]
    assert (table[0]["prompt"], table[0]["category"], table[0]["generator"]) == ("a hand", ["hand", "cup"], "flux")
    assert table[0]["image"]["bytes"] == photo_bytes(0, SIZE)
    rows, quarantined, _ = imported(tmp_path / "people", *arguments)
    assert set(quarantined.values()) == {"nobody has annotated the task"} and len(quarantined) == 5 and len(rows) == 3


def test_a_given_address_stands_before_the_names(dataset, tmp_path, capsys):
    tasks = export(dataset, tmp_path / "out", "--image-prefix", "https://example.com/a/", "--threshold", "0.25")
    names = {path.name for path in (tmp_path / "out/images").iterdir()}
    assert {task["data"]["image"] for task in tasks} == {f"https://example.com/a/{name}" for name in names}
    assert np.array_equal(masks_of(tasks[1])["artifact"], soft() >= 64)
    for arguments, words in (
        (("--image-prefix", "https://example.com/a"), "must end in a slash"),
        (("--threshold", "0"), "`threshold` must lie in (0, 1]"),
    ):
        export(dataset, tmp_path / "other", *arguments, status=1)
        assert words in capsys.readouterr().err


def digests(folder):
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and ".diffdoctor" not in path.as_posix()
    }


def test_an_export_goes_on_where_it_was(dataset, tmp_path, monkeypatch):
    from diffusers_diffdoctor.data import export as module

    whole = tmp_path / "whole/out"
    export(dataset, whole)
    out, encode, seen = tmp_path / "stopped/out", module.encode_brush, []

    def stopped(mask):
        seen.append(mask)
        if len(seen) == 5:  # in the second shard
            raise KeyboardInterrupt
        return encode(mask)

    monkeypatch.setattr(module, "encode_brush", stopped)
    export(dataset, out, status=130)
    assert not (out / "tasks.json").exists()
    seen[:] = [None] * 5
    export(dataset, out)
    assert len(seen) == 5 + 2  # those of the second shard
    assert digests(out) == digests(whole)


def test_nothing_is_mixed(dataset, tmp_path, capsys):
    out, other = tmp_path / "out", write_dataset(tmp_path / "other", [row(9, square(1, 1, 5, 5))])
    export(dataset, out)
    before = digests(out)
    export(other, out, status=1)
    assert "another input" in capsys.readouterr().err and digests(out) == before
    (out / "images/mine.txt").write_text("mine")
    tasks = export(other, out, "--restart")
    assert len(tasks) == 1
    names = {path.name for path in (out / "images").iterdir()}
    assert names == {"mine.txt", tasks[0]["data"]["image"].rpartition("/")[2]}
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    export(other, foreign, "--restart", status=1)
    assert "holds 'notes.txt', which no export has written" in capsys.readouterr().err
    shutil.rmtree(out / "images")
    (out / "images").mkdir()
    export(other, out, status=1)
    assert "1 images were removed" in capsys.readouterr().err
