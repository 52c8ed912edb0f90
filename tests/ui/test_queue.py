# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Who paints what, and what lies on the disk: without a server."""

import json
import subprocess
import sys

import numpy as np
import pytest
from fixtures.rows import photo_bytes, write_rows
from PIL import Image

from diffdoctor import main
from diffusers_diffdoctor.data import find_shards, load_rows
from diffusers_diffdoctor.data.annotate import (
    ANNOTATIONS,
    DONE,
    DRAFT,
    SKIPPED,
    Annotation,
    annotation_path,
    intersection_over_union,
    merge_masks,
    read_annotation,
    write_annotation,
)
from diffusers_diffdoctor.data.schema import encode_png
from diffusers_diffdoctor.files import FolderInUse
from diffusers_diffdoctor.ui import Queue
from diffusers_diffdoctor.ui.queue import Refused


SIZE = (31, 23)  # width, height: no multiple of anything
PAGES = ("page-one", "page-two", "page-three")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def dataset(tmp_path):
    rows = [{"image": {"bytes": photo_bytes(seed, SIZE), "path": f"{seed}.png"}} for seed in range(3)]
    half = np.zeros((6, 8), np.uint8)  # a quarter of the side, rounded up
    half[:3] = 255
    rows[1] |= {"artifact_map": encode_png(half), "source": "pseudo"}
    rows.insert(1, {"image": {"bytes": b"no image", "path": "broken.png"}})
    write_rows(tmp_path / "dataset/train-00000-of-00001.parquet", rows)
    return tmp_path / "dataset"


@pytest.fixture
def opened(dataset, tmp_path, clock):
    queues = []

    def open_queue(**options):
        for queue in queues:
            queue.close()
        queues.append(Queue(find_shards(dataset), tmp_path / "queue", clock=clock, loan_seconds=60, **options))
        return queues[-1]

    yield open_queue
    for queue in queues:
        queue.close()


def random_mask(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.array([0, 128, 255], np.uint8), SIZE[::-1])


def paint(queue: Queue, annotator: str, page: str, mask: np.ndarray, state: str = DONE, **options) -> str:
    lent = queue.claim(annotator, page)
    queue.save(lent["key"], lent["loan"], mask, state, **options)
    return lent["key"]


def test_images_that_cannot_be_read_are_counted_and_the_rest_is_lent_in_order(opened):
    queue = opened()
    assert [item.name for item in queue.items.values()] == ["0.png", "1.png", "2.png"]
    assert [bad["name"] for bad in queue.quarantined] == ["broken.png"]
    assert [queue.claim("anna", page)["name"] for page in PAGES] == ["0.png", "1.png", "2.png"]
    assert queue.claim("anna", "page-four") is None
    assert queue.image(next(iter(queue.items))).size == SIZE


def test_a_page_gets_its_image_back_and_its_older_self_is_refused(opened):
    queue = opened()
    first = queue.claim("anna", PAGES[0])
    again = queue.claim("anna", PAGES[0])  # reloaded, or a copy of the tab
    assert again["key"] == first["key"] and again["loan"] != first["loan"]
    with pytest.raises(Refused):
        queue.save(first["key"], first["loan"], random_mask(0))
    assert queue.annotation(first["key"], "anna") is None
    queue.save(again["key"], again["loan"], random_mask(1))
    assert np.array_equal(queue.annotation(first["key"], "anna").mask, random_mask(1))


def test_a_loan_ends_unless_the_page_is_still_there(opened, clock):
    queue = opened()
    lent = queue.claim("anna", PAGES[0])
    clock.now += 59
    assert queue.claim("berta", PAGES[1])["key"] != lent["key"]
    queue.renew(lent["key"], lent["loan"])
    clock.now += 59
    assert queue.claim("berta", PAGES[1])["key"] != lent["key"]
    clock.now += 2
    queue.save(lent["key"], lent["loan"], random_mask(0))  # late, but nobody else got it
    clock.now += 61
    assert queue.claim("carla", PAGES[2])["key"] == lent["key"]
    for late in (
        lambda: queue.save(lent["key"], lent["loan"], random_mask(1)),
        lambda: queue.renew(lent["key"], lent["loan"]),
    ):
        with pytest.raises(Refused):
            late()
    assert np.array_equal(queue.annotation(lent["key"], "anna").mask, random_mask(0))


def test_loans_and_drafts_outlive_the_process(opened, clock):
    queue = opened()
    key = paint(queue, "Anna", PAGES[0], random_mask(0), DRAFT, kinds=["hand"], seconds=2.5)
    held = queue.claim("anna", PAGES[0])
    queue = opened()
    assert queue.claim("berta", PAGES[1])["key"] != key  # still lent
    queue.save(key, held["loan"], random_mask(1), kinds=["hand"], seconds=4)
    clock.now += 61
    again = queue.claim("anna", "a-new-page")  # what one has begun comes first
    assert (again["key"], again["state"], again["revision"]) == (key, DRAFT, 2)
    assert (again["kinds"], again["seconds"]) == (["hand"], 4)


@pytest.mark.parametrize("state", [DONE, SKIPPED])
def test_what_is_finished_or_skipped_does_not_come_again_but_can_be_asked_for(opened, state):
    queue = opened()
    key = paint(queue, "anna", PAGES[0], random_mask(0), state)
    assert queue.claim("anna", PAGES[0])["key"] != key
    assert queue.claim("berta", PAGES[1])["name"] == ("2.png" if state == DONE else "0.png")
    assert queue.progress("anna")["yours"] == [key]
    if state == SKIPPED:
        with pytest.raises(Refused):
            queue.claim("anna", PAGES[0], key)
        return
    assert queue.claim("anna", PAGES[0], key)["state"] == state


def test_a_finished_mask_that_is_amended_stays_finished(opened, clock):
    queue = opened()
    key = paint(queue, "anna", PAGES[0], random_mask(0), kinds=["hand"])
    lent = queue.claim("anna", PAGES[0], key)
    for seed in (1, 2):  # strokes; the page keeps the image
        queue.save(key, lent["loan"], random_mask(seed), DRAFT, kinds=["face"])
        found = queue.annotation(key, "anna")
        assert np.array_equal(found.mask, random_mask(seed)) and found.state == DONE and found.kinds == ("face",)
    again = queue.claim("anna", PAGES[0])  # reloaded
    assert (again["key"], again["state"], again["revision"]) == (key, DONE, 3)
    assert queue.progress()["annotators"]["anna"] == {DONE: 1, SKIPPED: 0, DRAFT: 0}
    # the page is left, and another process goes on
    clock.now += 61
    queue = opened()
    assert queue.progress("anna")["yours"] == [key] and queue.progress()["finished"] == 1
    assert queue.claim("berta", PAGES[1])["key"] != key and queue.claim("anna", "a-new-page")["key"] != key
    # what was skipped is begun by a stroke
    other = paint(queue, "anna", "a-new-page", random_mask(3), SKIPPED)
    lent = queue.claim("anna", "a-new-page", other)
    queue.save(other, lent["loan"], random_mask(4), DRAFT)
    assert queue.annotation(other, "anna").state == DRAFT


def test_several_annotators_and_their_agreement(opened, tmp_path, dataset):
    queue = opened(copies=2)
    first, second = np.zeros(SIZE[::-1], np.uint8), np.zeros(SIZE[::-1], np.uint8)
    first[:10, :10] = 255
    second[:10, 5:15] = 255
    key = paint(queue, "anna", PAGES[0], first, kinds=["hand"])
    assert paint(queue, "berta", PAGES[1], second, kinds=["hand", "face"]) == key
    assert queue.claim("carla", PAGES[2])["key"] != key
    paint(queue, "anna", PAGES[0], np.zeros_like(first))
    found = queue.progress()
    assert (found["finished"], found["missing"]) == (1, 3)
    assert found["annotators"]["anna"] == {DONE: 2, SKIPPED: 0, DRAFT: 0}
    assert queue.agreement() == {("anna", "berta"): (1, pytest.approx(50 / 150))}

    out = tmp_path / "out"
    assert main(["data", "annotate", str(dataset), "--queue", str(queue.folder), "--output", str(out)]) == 0
    counts = json.loads((out / "stage.json").read_text())["counts"]
    assert (counts["rows_in"], counts["rows_out"], counts["left_out"]) == (4, {"train": 2}, 2)
    row = load_rows(out)[0]
    both, one = np.zeros_like(first), np.zeros_like(first)
    both[:10, 5:10], one[:10, :5], one[:10, 10:15] = 255, 255, 255
    assert row["source"] == "human"
    assert np.array_equal(np.array(row["artifact_map"]), both)
    assert np.array_equal(np.array(row["ignore_map"]), one)


def test_the_dataset_changes_with_the_masks_only(opened, tmp_path, dataset, capsys):
    queue, out = opened(), tmp_path / "out"
    command = ["data", "annotate", str(dataset), "--queue", str(queue.folder), "--output", str(out)]
    assert main(command) == 1 and "holds no annotation" in capsys.readouterr().err
    paint(queue, "anna", PAGES[0], random_mask(0))
    assert main(command) == 0
    before = sorted(out.rglob("*.parquet"))[0].read_bytes()
    assert main(command) == 0
    assert sorted(out.rglob("*.parquet"))[0].read_bytes() == before
    paint(queue, "anna", PAGES[0], random_mask(1))
    assert main(command) == 1 and "--restart" in capsys.readouterr().err
    assert main([*command, "--restart"]) == 0
    assert len(load_rows(out)) == 2


def test_the_first_layer_is_the_row_s_own_map_or_the_detector_s(opened, tmp_path, dataset):
    queue = opened()
    keys = list(queue.items)
    assert not queue.first_layer(keys[0]).any()
    layer = queue.first_layer(keys[1])
    assert layer.shape == SIZE[::-1] and set(np.unique(layer)) == {0, 255}
    assert layer[:10].all() and not layer[13:].any()

    asked = []

    def suggest(image: Image.Image) -> np.ndarray:
        asked.append(image)
        return np.full(SIZE[::-1], 128 - len(asked), np.uint8)  # below a half the second time

    queue = opened(suggest=suggest)
    assert queue.first_layer(keys[0]).all() is np.False_  # 127 / 255 is below a half
    assert queue.suggestion(keys[0])[0, 0] == 127
    assert len(asked) == 1
    assert opened(suggest=suggest).suggestion(keys[0])[0, 0] == 127 and len(asked) == 1


def test_a_mask_of_another_size_or_with_other_values_is_refused(opened):
    queue = opened()
    lent = queue.claim("anna", PAGES[0])
    with pytest.raises(ValueError, match=r"The mask is \(10, 10\)"):
        queue.save(lent["key"], lent["loan"], np.zeros((10, 10), np.uint8))
    with pytest.raises(ValueError, match="found 7"):
        queue.save(lent["key"], lent["loan"], np.full(SIZE[::-1], 7, np.uint8))
    with pytest.raises(ValueError, match="`kinds`"):
        queue.save(lent["key"], lent["loan"], random_mask(0), kinds=["nose"])
    with pytest.raises(ValueError, match="`state`"):
        queue.save(lent["key"], lent["loan"], random_mask(0), "gone")
    assert not list(queue.folder.rglob("annotations/*/*.png"))


@pytest.mark.parametrize("name", ["", "../anna", "a/b", "a" * 41, ".hidden", "anna\n", "anna.png", "a\0b", "ä"])
def test_names_that_are_no_names_are_refused(opened, name):
    queue = opened()
    with pytest.raises(ValueError, match="annotator's name"):
        queue.claim(name, PAGES[0])


@pytest.mark.parametrize("key", ["", "../../etc/passwd", "0" * 23, "0" * 25, "0" * 24 + "\n", "A" * 24])
def test_keys_that_are_none_are_refused(opened, tmp_path, key):
    with pytest.raises(ValueError, match="There is no image"):
        annotation_path(tmp_path, key, "anna")
    with pytest.raises(ValueError, match="There is no image"):
        opened().claim("anna", PAGES[0], key)


def test_one_process_has_a_queue_and_another_dataset_is_refused(opened, tmp_path, dataset):
    queue = opened()
    code = (
        "import sys; from diffusers_diffdoctor.data import find_shards; from diffusers_diffdoctor.ui import Queue; "
        "Queue(find_shards(sys.argv[1]), sys.argv[2])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(dataset), str(queue.folder)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode and FolderInUse.__name__ in done.stderr
    queue.close()
    write_rows(tmp_path / "other/train-00000-of-00001.parquet", [{"image": photo_bytes(9)}])
    with pytest.raises(ValueError, match="another dataset"):
        Queue(find_shards(tmp_path / "other"), queue.folder)


def test_a_write_that_was_cut_short_leaves_the_annotation_before_it(tmp_path, monkeypatch):
    key = "0" * 24
    write_annotation(tmp_path, key, "anna", Annotation(random_mask(0), seconds=1))
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_annotation(tmp_path, key, "anna", Annotation(random_mask(1), seconds=2))
    monkeypatch.undo()
    found = read_annotation(annotation_path(tmp_path, key, "anna"))
    assert np.array_equal(found.mask, random_mask(0)) and found.seconds == 1
    assert [file.name for file in (tmp_path / ANNOTATIONS / key).iterdir()] == ["anna.png"]


def test_a_damaged_annotation_is_named(tmp_path):
    path = annotation_path(tmp_path, "0" * 24, "anna")
    path.parent.mkdir(parents=True)
    path.write_bytes(encode_png(random_mask(0))["bytes"])  # a mask, but nothing of its state
    with pytest.raises(ValueError, match=r"anna\.png' is no annotation"):
        read_annotation(path)


def test_agreement_counts_where_both_are_sure():
    first = np.array([[255, 255, 0, 128, 255]], np.uint8)
    second = np.array([[255, 0, 0, 255, 128]], np.uint8)
    assert intersection_over_union(first, second) == 1 / 2
    assert intersection_over_union(first * 0, second * 0) == 1
    artifact, ignore = merge_masks([first, second])
    assert artifact.tolist() == [[255, 0, 0, 0, 0]]
    assert ignore.tolist() == [[0, 255, 0, 255, 255]]
