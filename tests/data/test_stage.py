# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Stages: counted, resumable, the same for any number of workers, and refused where they do not fit what lies there."""

import json
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Features, Image, Value, load_dataset
from filelock import FileLock
from fixtures.rows import photo_bytes, write_rows
from PIL import Image as PILImage

from diffusers_diffdoctor.data import FEATURES, Stage, find_shards, group_files, run_stage
from diffusers_diffdoctor.data.schema import conform, decode_map, encode_png, reduced_size, row_seed
from diffusers_diffdoctor.data.shards import Quarantined, split_name
from diffusers_diffdoctor.data.stage import LEFT_OUT, read_marker
from diffusers_diffdoctor.files import LOCK, FolderInUse


@dataclass(frozen=True)
class Sort(Stage):
    """Rows by the number that their prompt is: left out below 2, quarantined at multiples of 5, even and odd apart."""

    shift: int = 0

    name: ClassVar[str] = "sort"
    splits: ClassVar[tuple[str, ...]] = ("even", "odd")
    columns: ClassVar[dict] = {"number": Value("int64")}

    def process(self, rows, shard):
        for row in rows:
            number = int(row["prompt"]) + self.shift
            if number < 2:
                yield LEFT_OUT
            elif number % 5 == 0:
                yield Quarantined(row["image"]["path"], "a multiple of 5")
            else:
                yield ("odd" if number % 2 else "even"), {**row, "number": number}


@pytest.fixture
def source(tmp_path):
    """30 rows in 3 shards."""
    for part in range(3):
        rows = [
            {"image": {"bytes": photo_bytes(i), "path": f"{i}.png"}, "prompt": str(i)}
            for i in range(10 * part, 10 * part + 10)
        ]
        write_rows(tmp_path / f"source/data/train-{part:05d}-of-00003.parquet", rows)
    return tmp_path / "source"


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix in (".parquet", ".jsonl", ".json") and "rank-" not in str(path)
    }


def test_rows_are_counted_and_sorted_and_can_be_loaded(source, tmp_path):
    counts = run_stage(Sort(), find_shards(source), tmp_path / "out", show_progress=False)
    assert counts["rows_in"] == 30 and counts["left_out"] == 2
    assert counts["rows_out"] == {"even": 12, "odd": 11} and counts["quarantined"] == {"a multiple of 5": 5}
    loaded = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert loaded["even"]["number"] == [n for n in range(2, 30) if n % 5 and n % 2 == 0]
    assert loaded["odd"]["number"] == [n for n in range(2, 30) if n % 5 and n % 2]
    assert isinstance(loaded["odd"][0]["image"], PILImage.Image) and loaded["odd"][0]["image"].size == (48, 40)
    quarantine = [json.loads(line) for file in sorted((tmp_path / "out/quarantine").iterdir()) for line in file.open()]
    assert [row["path"] for row in quarantine] == [f"{n}.png" for n in (5, 10, 15, 20, 25)]
    card = (tmp_path / "out/README.md").read_text()
    assert "| even | 12 |" in card and "| a multiple of 5 | 5 |" in card


@pytest.mark.parametrize(
    "pattern",
    ["{}-00000-of-00001.parquet", "{}-00000-of-00001-a09b74b3ef9c3b56.parquet", "{}-0.parquet", "{}.parquet"]
    + ["{}-00000-of-00001#2.parquet", "{}#2.parquet", "{}%232.parquet", "a#b/{}-0.parquet", "a%23b/{}.parquet"],
)
def test_splits_of_file_names_are_told_apart(pattern, tmp_path):
    for count, split in enumerate(("train", "test"), 1):
        write_rows(tmp_path / "data" / pattern.format(split), [{"image": photo_bytes(i)} for i in range(count)])
    assert [sum(shard.rows for shard in find_shards(tmp_path, split)) for split in ("train", "test")] == [1, 2]
    with pytest.raises(ValueError, match=r"no split 'val'.*test, train"):
        find_shards(tmp_path, "val")


def test_the_number_of_workers_changes_nothing(source, tmp_path):
    # the stage lies in a test module, which processes find by its path only
    from diffusers_diffdoctor.data import Merge

    shards = find_shards(source)
    for name, options in (("one", {}), ("two", {"workers": 2})):
        run_stage(Merge((0.7,)), shards, tmp_path / name, show_progress=False, **options)
    for rank in (1, 2, 0):
        last = run_stage(Merge((0.7,)), shards, tmp_path / "ranks", rank=rank, world_size=3, show_progress=False)
        assert (last is None) == (rank != 0)
    one = contents(tmp_path / "one")
    assert len(one) == 3 + 3 + 3 + 1
    assert one == contents(tmp_path / "two") == contents(tmp_path / "ranks")


@pytest.mark.parametrize("harm", ["marker lost", "marker cut", "file lost", "file cut", "half written"])
def test_only_what_is_not_whole_is_done_again(source, tmp_path, harm):
    shards, out = find_shards(source), tmp_path / "out"
    run_stage(Sort(), shards, out, show_progress=False)
    whole, times = contents(out), {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}
    file, marker = out / "data/even-00001-of-00003.parquet", out / ".diffdoctor/00001.json"
    if harm == "half written":
        (out / "data/.even-00001-of-00003.parquet.unfinished").mkdir()
        (out / "data/.even-00001-of-00003.parquet.unfinished/even-00001-of-00003.parquet").write_bytes(b"PAR1")
        marker.unlink()
    else:
        victim = marker if "marker" in harm else file
        victim.unlink() if "lost" in harm else victim.write_bytes(victim.read_bytes()[:20])
    assert read_marker(out, 1) is None
    assert run_stage(Sort(), shards, out, show_progress=False)["rows_in"] == 30
    assert contents(out) == whole
    again = {path.name for path in times if path.stat().st_mtime_ns != times[path]}
    assert again == {"even-00001-of-00003.parquet", "odd-00001-of-00003.parquet"}


def test_another_plan_is_refused_and_named_unless_it_replaces(source, tmp_path):
    shards, out = find_shards(source), tmp_path / "out"
    run_stage(Sort(), shards, out, show_progress=False)
    with pytest.raises(ValueError, match=r"shift 0, here 1.*--restart"):
        run_stage(Sort(shift=1), shards, out, show_progress=False)
    with pytest.raises(ValueError, match=r"another input .30 rows in 3 shards"):
        run_stage(Sort(), shards[:2], out, show_progress=False)
    assert run_stage(Sort(shift=1), shards[:2], out, restart=True, show_progress=False)["rows_in"] == 20
    assert sorted(path.name for path in (out / "data").iterdir())[0] == "even-00000-of-00002.parquet"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("do not lose me")
    for restart in (False, True):
        with pytest.raises(ValueError, match=r"thesis.txt"):
            run_stage(Sort(), shards, tmp_path / "mine", restart=restart, show_progress=False)


def test_a_stage_that_was_stopped_is_no_input(source, tmp_path):
    assert run_stage(Sort(), find_shards(source), tmp_path / "out", rank=0, world_size=2, show_progress=False) is None
    with pytest.raises(ValueError, match=r"not finished.*again"):
        find_shards(tmp_path / "out", "even")


def test_one_run_at_a_time(source, tmp_path):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / LOCK), pytest.raises(FolderInUse, match="in use by another process"):
        run_stage(Sort(), find_shards(source), tmp_path / "out", show_progress=False)


def test_a_stage_must_answer_for_each_row(source, tmp_path):
    class Forgetful(Sort):
        def process(self, rows, shard):
            yield from list(rows)[1:]

    with pytest.raises(RuntimeError, match="got 10 rows and answered 9"):
        run_stage(Forgetful(), find_shards(source), tmp_path / "out", show_progress=False)
    assert not list((tmp_path / "out/.diffdoctor").glob("*.json"))


@pytest.mark.parametrize(
    "row, words",
    [
        ({"image": None}, "`image` must hold the bytes of an image file, found NoneType"),
        ({"image": {"bytes": None, "path": "/etc/passwd"}}, "found only a path"),
        ({"prompt": 3}, "`prompt` must be a text"),
        ({"source": "guess"}, "`source` must be one of human, photo"),
        ({"category": [""]}, "`category` must be"),
        ({"artifact_map": "map.png"}, "`artifact_map` must hold the bytes"),
    ],
)
def test_rows_are_checked_on_entry(row, words):
    with pytest.raises(ValueError, match=words):
        conform({"image": {"bytes": b"1", "path": None}} | row)


def test_rows_of_others_conform(tmp_path):
    row = conform({"image": b"1", "category": "hand", "uid": 7})
    assert row["image"] == {"bytes": b"1", "path": None} and row["category"] == ["hand"]
    assert list(row) == [*FEATURES, "uid"]
    # a column of ours that has another type in the file
    features = Features({"image": Image(), "category": Value("string"), "uid": Value("int32")})
    table = pa.Table.from_pylist(
        [{"image": {"bytes": photo_bytes(0)}, "category": "dog", "uid": 7}], features.arrow_schema
    )
    pq.write_table(table, tmp_path / "x.parquet")
    (shard,) = find_shards(tmp_path / "x.parquet")
    counts = run_stage(_Keep(), [shard], tmp_path / "out", show_progress=False)
    assert counts["facts"]["category/dog"] == 1
    loaded = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"), split="train")
    assert loaded.features == Features(FEATURES | {"uid": Value("int32")}) and loaded[0]["category"] == ["dog"]


@dataclass(frozen=True)
class _Keep(Stage):
    name: ClassVar[str] = "keep"

    def process(self, rows, shard):
        yield from rows


def test_maps_have_the_size_of_their_image_or_a_quarter_of_its_side():
    assert reduced_size((50, 33)) == (13, 9)
    for size in ((50, 33), (13, 9)):
        row = {"artifact_map": encode_png(np.full(size[::-1], 200, np.uint8))}
        assert decode_map(row, (50, 33)).size == size
    with pytest.raises(ValueError, match=r"50 x 33 pixels has a map of 12 x 9; .* 13 x 9"):
        decode_map({"artifact_map": encode_png(np.zeros((9, 12), np.uint8))}, (50, 33))
    assert decode_map({"artifact_map": None}, (50, 33)) is None


def test_the_seed_of_a_row_follows_from_its_image():
    rows = [{"image": {"bytes": bytes([i])}} for i in range(2)]
    assert (
        row_seed(0, rows[0]) == row_seed(0, {**rows[0], "prompt": "x"}) != row_seed(0, rows[1]) != row_seed(1, rows[1])
    )


def test_what_is_no_dataset_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder nor a dataset"):
        find_shards(tmp_path / "nothing here")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no Parquet file.*data photos"):
        find_shards(tmp_path / "empty")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"a.parquet.*no whole Parquet file"):
        find_shards(tmp_path / "broken")
    pq.write_table(pa.table({"picture": [1]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="no column `image`; it has picture"):
        find_shards(tmp_path / "x.parquet")


def test_splits_are_taken_by_name(source, tmp_path):
    run_stage(Sort(), find_shards(source), tmp_path / "out", show_progress=False)
    assert sum(shard.rows for shard in find_shards(tmp_path / "out", "odd")) == 11
    with pytest.raises(ValueError, match="no split 'train'; it has even, odd"):
        find_shards(tmp_path / "out")
    assert split_name("a/b:odd") == ("a/b", "odd") and split_name("a/b") == ("a/b", "train")
    assert split_name("https://x") == ("https://x", "train")


def test_files_are_grouped_by_their_size(tmp_path):
    files = []
    for i, size in enumerate((400_000, 500_000, 200_000, 2_000_000, 1)):
        path = tmp_path / f"{i}.png"
        path.write_bytes(b"x" * size)
        files.append((path, path.name))
    groups = group_files(files, 1)
    assert [[name for _, name in group.files] for group in groups] == [
        ["0.png", "1.png"],
        ["2.png"],
        ["3.png", "4.png"],
    ][:2] + [["3.png"], ["4.png"]]
    assert [group.first for group in groups] == [0, 2, 3, 4]
    (tmp_path / "0.png").unlink()
    missing, read = groups[0].read()
    assert missing == Quarantined("0.png", "No such file or directory") and read["image"]["path"] == "1.png"


def test_a_full_disk_is_named_and_costs_nothing(source, tmp_path, monkeypatch):
    shards, out = find_shards(source), tmp_path / "out"

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(OSError, match=r"out cannot be written .No space left.*run the same command again"):
        run_stage(Sort(), shards, out, show_progress=False)
    monkeypatch.undo()
    assert run_stage(Sort(), shards, out, show_progress=False)["rows_in"] == 30
