# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""RichHF-18K: records that protobuf wrote, images of a folder or of Pick-a-Pic; damage is counted and named."""

import io
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fixtures.annotations import imported, picture, pixels, square
from fixtures.rows import photo_bytes
from fixtures.tfrecords import example, record
from PIL import Image

from diffdoctor import main
from diffusers_diffdoctor.data import run_stage
from diffusers_diffdoctor.data.readers import RichHF


SIDE = (32, 32)  # of heatmaps; 512 in the original


def heatmap(seed: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(SIDE, Image.Resampling.BICUBIC))


def encoded(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def features(uid: str, seed: int = 0, **changes) -> dict:
    return {
        "filename": [f"train/{uid}.png".encode()],
        "aesthetics_score": [0.25],
        "artifact_score": [seed / 16],
        "misalignment_score": [1.0],
        "overall_score": [0.5],
        "artifact_map": [encoded(heatmap(seed))],
        "misalignment_map": [encoded(heatmap(seed + 100))],
        "prompt_misalignment_label": [b"1 1 0"],
    } | changes


def write(path, *records: dict | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(record(one if isinstance(one, bytes) else example(one)) for one in records))


def test_records_find_their_images_in_a_folder(tmp_path):
    uids = [f"0f-{i}" for i in range(5)]
    write(tmp_path / "richhf/train.tfrecord", *(features(uid, i) for i, uid in enumerate(uids)))
    contents = [picture(tmp_path / f"images/sub/{uid}.jpg", i, SIDE) for i, uid in enumerate(uids)]
    rows, quarantined, _ = imported(
        tmp_path / "out", "richhf", tmp_path / "richhf", "--images", tmp_path / "images", "--shard-size", "0.002"
    )
    assert not quarantined and list(rows) == uids and len(list((tmp_path / "out/data").iterdir())) > 1
    for i, uid in enumerate(uids):
        row = rows[uid]
        assert row["image"]["bytes"] == contents[i] and row["uid"] == uid
        assert np.array_equal(pixels(row["artifact_map"]), heatmap(i))
        assert row["artifact_score"] == i / 16 and row["overall_score"] == 0.5 and row["misalignment_score"] == 1.0


def pickapic(path, uids, seed: int, struct: bool = False, group: int = 2) -> dict[str, tuple[bytes, str, str]]:
    """A Parquet file like Pick-a-Pic's, with pairs of these uids; uid -> (image, caption, model)."""
    columns = {name: [] for name in ("jpg_0", "jpg_1", "image_0_uid", "image_1_uid", "caption", "model_0", "model_1")}
    content = {}
    for row, pair in enumerate(zip(uids[::2], uids[1::2])):
        columns["caption"].append(f"prompt {seed}-{row}")
        for side, uid in enumerate(pair):
            image = photo_bytes(seed * 100 + row * 2 + side, (64, 64), "JPEG")
            columns[f"jpg_{side}"].append({"bytes": image, "path": None} if struct else image)
            columns[f"image_{side}_uid"].append(uid)
            columns[f"model_{side}"].append(f"model/{side}")
            content[uid] = (image, f"prompt {seed}-{row}", f"model/{side}")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return content


@pytest.mark.parametrize("struct", [False, True])
def test_records_find_their_images_in_pick_a_pic(tmp_path, struct):
    content = {}
    for part in range(2):
        uids = [f"u{part}{i}" for i in range(10)]
        name = f"pickapic/data/train-{part:05d}-of-00002-b66ac786bf6fb553.parquet"
        content |= pickapic(tmp_path / name, uids, part, struct)
    wanted = ["u13", "u00", "nowhere", "u08", "u19", "u01", "u13"]
    write(tmp_path / "a.tfrecord", *(features(uid, i) for i, uid in enumerate(wanted)))
    rows, quarantined, counts = imported(
        tmp_path / "out", "richhf", tmp_path / "a.tfrecord", "--images", tmp_path / "pickapic"
    )
    reader = RichHF(images=str(tmp_path / "pickapic"))
    run_stage(*pickle.loads(pickle.dumps((reader, reader.find(tmp_path / "a.tfrecord")))), tmp_path / "again")
    assert len(list((tmp_path / "out/data").iterdir())) == 1
    for path in (tmp_path / "out/data").iterdir():
        assert path.read_bytes() == (tmp_path / "again/data" / path.name).read_bytes()
    assert quarantined == {"nowhere": "no image of this uid"} and counts["rows_in"] == 7
    assert set(rows) == set(wanted) - {"nowhere"}
    for uid, row in rows.items():
        assert (row["image"]["bytes"], row["prompt"], row["generator"]) == content[uid]
        seed = len(wanted) - 1 - wanted[::-1].index(uid)
        enlarged = Image.fromarray(heatmap(seed)).resize((64, 64), Image.Resampling.BILINEAR)
        assert np.array_equal(pixels(row["artifact_map"]), np.asarray(enlarged))


def test_damage_is_counted_and_named(tmp_path):
    path = tmp_path / "x.tfrecord"
    good, *others = (record(example(features(uid, i))) for i, uid in enumerate(("good", "spoiled", "cut")))
    spoiled = bytearray(others[0])
    spoiled[40] ^= 1
    bad = [
        features("no map", artifact_map=[]),
        features("broken map", artifact_map=[b"\x89PNG and so on"]),
        features("oblong"),
        features("absent"),
        features("", filename=[]),
        features("text for a score", overall_score=[b"high"]),
        b"\x0a\xff",
    ]
    path.write_bytes(good + bytes(spoiled) + b"".join(record(b if isinstance(b, bytes) else example(b)) for b in bad))
    with open(path, "ab") as file:
        file.write(others[1][:-1])
    for name in ("good", "spoiled", "no map", "broken map", "text for a score", "cut"):
        picture(tmp_path / f"images/{name}.png", size=SIDE)
    picture(tmp_path / "images/oblong.png", size=(32, 24))
    rows, quarantined, counts = imported(tmp_path / "out", "richhf", path, "--images", tmp_path / "images")
    assert set(rows) == {"good"} and counts["rows_in"] == 1 + 1 + 7 + 1
    assert quarantined.pop("broken map")
    assert quarantined == {
        "x.tfrecord, record 2": "the checksum of the record's data does not fit",
        "no map": "the record has no artifact_map",
        "oblong": "An image of 32 x 24 pixels is annotated as one of 32 x 32.",
        "absent": "no image of this uid",
        "x.tfrecord, record 7": "the record has no filename",
        "text for a score": "overall_score of the record is no float",
        "x.tfrecord, record 9": "no tf.train.Example: a number is cut",
        "x.tfrecord, record 10": "the record is cut short",
    }


def test_what_cannot_be_an_import_is_refused_at_once(tmp_path, capsys):
    write(tmp_path / "x.tfrecord", features("a"))
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match="`images` is missing"):
        RichHF().find(tmp_path / "x.tfrecord")
    pq.write_table(pa.table({"image": [1]}), tmp_path / "other.parquet")
    out = str(tmp_path / "out")
    for source, images, words in (
        ("x.tfrecord", "other.parquet", "no file of Pick-a-Pic: it has no image_0_uid"),
        ("nothing", "images", "no file or folder"),
        ("images", "images", "no TFRecord files"),
    ):
        assert (
            main(["data", "import", "richhf", str(tmp_path / source), "--images", str(tmp_path / images), "-o", out])
            == 1
        )
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_heatmaps_of_other_values_stay_what_they_are(tmp_path):
    """A heatmap whose highest value is 1 is a faint one, no mask."""
    write(tmp_path / "x.tfrecord", features("a", artifact_map=[encoded(square(0, 0, 5, 5, 1, SIDE))]))
    picture(tmp_path / "images/a.png", size=SIDE)
    rows, *_ = imported(tmp_path / "out", "richhf", tmp_path / "x.tfrecord", "--images", tmp_path / "images")
    assert np.array_equal(pixels(rows["a"]["artifact_map"]), square(0, 0, 5, 5, 1, SIDE))
