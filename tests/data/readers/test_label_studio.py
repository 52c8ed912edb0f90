# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Exports of Label Studio. Brushes are packed by a writer of our own, from the format's description, and by Label Studio's where it is
installed."""

import json
from itertools import pairwise

import numpy as np
import pytest
from fixtures.annotations import SIZE, imported, picture, pixels, square
from PIL import Image, ImageDraw

from diffdoctor import main
from diffusers_diffdoctor.data.brushes import decode_brush, encode_brush


WIDTH, HEIGHT = SIZE
LENGTHS = (3, 4, 8, 16)  # bits of the lengths that Label Studio chooses from


def pack(mask: np.ndarray) -> list[int]:
    """The brush of a mask: its layer, RGBA, as a text of bits, runs of equal values alone or, where they are short, together."""
    layer = np.repeat(mask.astype(np.uint8)[..., None] * 255, 4, axis=-1).ravel()
    text = f"{layer.size:032b}{8 - 1:05b}" + "".join(f"{bits - 1:04b}" for bits in LENGTHS)

    def run(values: np.ndarray, repeated: bool) -> str:
        which = next(i for i, bits in enumerate(LENGTHS) if len(values) <= 2**bits)
        head = f"{int(repeated)}{which:02b}{len(values) - 1:0{LENGTHS[which]}b}"
        return head + "".join(f"{value:08b}" for value in (values[:1] if repeated else values))

    borders = [0, *(np.flatnonzero(np.diff(layer)) + 1), layer.size]
    short: list[np.ndarray] = []
    for begin, end in pairwise(borders):
        piece = layer[begin:end]
        if len(piece) < 8 and sum(map(len, short)) < 1000:
            short.append(piece)
            continue
        if short:
            text += run(np.concatenate(short), False)
            short = []
        for at in range(0, len(piece), 2**16):
            text += run(piece[at : at + 2**16], True)
    if short:
        text += run(np.concatenate(short), False)
    text += "0" * (-len(text) % 8)
    return [int(text[at : at + 8], 2) for at in range(0, len(text), 8)]


def masks() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "square": square(10, 5, 30, 20) > 0,
        "nothing": np.zeros(SIZE[::-1], bool),
        "everything": np.ones(SIZE[::-1], bool),
        "noise": rng.random(SIZE[::-1]) < 0.5,
        "more and more": rng.random((100, 151)) < np.linspace(0, 1, 151),
        "blocks": np.kron(rng.random((10, 12)) < 0.3, np.ones((17, 13), bool)),
    }


@pytest.mark.parametrize("mask", masks().values(), ids=masks().keys())
def test_brushes_are_what_was_packed(mask):
    assert np.array_equal(decode_brush(pack(mask), mask.shape[::-1]), mask)


@pytest.mark.parametrize("mask", masks().values(), ids=masks().keys())
def test_brushes_are_what_label_studio_packed(mask):
    brush = pytest.importorskip("label_studio_sdk.converter.brush")
    packed = brush.mask2rle(mask.astype(np.uint8) * 255)
    assert np.array_equal(decode_brush(list(packed), mask.shape[::-1]), mask)


@pytest.mark.parametrize("mask", masks().values(), ids=masks().keys())
def test_packed_brushes_are_read_by_us_and_by_label_studio(mask):
    packed = encode_brush(mask)
    assert np.array_equal(decode_brush(packed, mask.shape[::-1]), mask)
    brush = pytest.importorskip("label_studio_sdk.converter.brush")
    assert np.array_equal(brush.decode_rle(packed).reshape(*mask.shape, 4), mask[..., None] * np.repeat(255, 4))


def test_what_is_no_brush_is_refused():
    packed = pack(square(10, 5, 30, 20) > 0)
    for content, size, words in (
        (packed[:-1], SIZE, "cut short"),
        (packed[:9], SIZE, "cut short"),
        ([], SIZE, "cut short"),
        (packed, (40, 40), "has 7680 values"),
        ([256, *packed[1:]], SIZE, "no list of bytes"),
        ("eJw=", SIZE, "no list of bytes"),
        ([*packed[:4], 0, *packed[5:]], SIZE, "values of 1 bits"),
    ):
        with pytest.raises(ValueError, match=words):
            decode_brush(content, size)


def region(kind, value, label="hand", **changes):
    labels = {} if label is None else {f"{kind}labels": [label]}
    result = {"type": f"{kind}labels", "original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0}
    return result | {"value": value | labels} | changes


def rectangle(left, top, right, bottom, label="hand", **changes):
    value = {"x": left / WIDTH * 100, "y": top / HEIGHT * 100, "rotation": changes.pop("rotation", 0)}
    value |= {"width": (right - left) / WIDTH * 100, "height": (bottom - top) / HEIGHT * 100}
    return region("rectangle", value, label, **changes)


def brush(mask, label="hand"):
    return region("brush", {"format": "rle", "rle": pack(mask > 0)}, label)


def task(number, *annotations, name=None, **changes):
    return {
        "id": number,
        "data": {"image": name or f"/data/upload/1/{number}.png"},
        "annotations": [{"result": result} for result in annotations],
    } | changes


def export(top, *tasks):
    (top / "export.json").write_text(json.dumps(tasks))
    for i in range(12):
        picture(top / f"images/{i}.png", i)
    return top / "export.json", "--images", top / "images"


def test_regions_of_all_kinds_become_maps(tmp_path):
    polygon = {"points": [[10, 10], [60, 20], [30, 90]]}
    choice = {"type": "choices", "value": {"choices": ["ugly"]}}
    tasks = [
        task(0, [brush(square(10, 5, 30, 20)), rectangle(40, 30, 48, 40, "face"), choice]),
        task(1, [region("polygon", polygon)]),
        task(2, [rectangle(20, 10, 30, 14, rotation=90)]),
        task(3, []),
        task(4, [rectangle(0, 0, 9, 9, "unsure"), rectangle(5, 5, 20, 20)]),
        task(5, [region("brush", {"format": "rle", "rle": pack(square(1, 1, 5, 5) > 0)}, None, type="brush")]),
    ]
    rows, quarantined, _ = imported(
        tmp_path / "out", "label-studio", *export(tmp_path, *tasks), "--ignore-labels", "unsure"
    )
    assert not quarantined and list(rows) == [f"{i}.png" for i in range(6)]
    found = [pixels(row["artifact_map"]) for row in rows.values()]
    assert np.array_equal(found[0], square(10, 5, 30, 20) | square(40, 30, 48, 40))
    large = Image.new("L", (WIDTH * 16, HEIGHT * 16))  # the centres of pixels of another drawing of it
    ImageDraw.Draw(large).polygon([(x * WIDTH * 0.16, y * HEIGHT * 0.16) for x, y in polygon["points"]], fill=255)
    assert (found[1] != np.asarray(large)[8::16, 8::16]).mean() < 0.005
    assert np.array_equal(found[2], square(16, 10, 20, 20))  # turned clockwise around its upper left corner
    assert not found[3].any() and np.array_equal(found[4], square(5, 5, 20, 20))
    ignored = np.where(square(5, 5, 20, 20), 0, square(0, 0, 9, 9))
    assert np.array_equal(pixels(rows["4.png"]["ignore_map"]), ignored)
    assert np.array_equal(found[5], square(1, 1, 5, 5))
    assert [row["category"] for row in rows.values()] == [["face", "hand"], ["hand"], ["hand"], [], ["hand"], []]


def test_several_people_make_shares(tmp_path):
    ones = [[rectangle(0, 0, 10, 10)], [rectangle(5, 0, 15, 10)], [rectangle(30, 30, 40, 40, "unsure")]]
    cancelled = {"result": [rectangle(0, 0, 48, 40)], "was_cancelled": True}
    one = task(0, *ones)
    one["annotations"].append(cancelled)
    rows, *_ = imported(tmp_path / "out", "label-studio", *export(tmp_path, one), "--ignore-labels", "unsure")
    votes = square(0, 0, 10, 10, 1).astype(int) + square(5, 0, 15, 10, 1)
    assert np.array_equal(pixels(rows["0.png"]["artifact_map"]), votes * 85)
    assert np.array_equal(pixels(rows["0.png"]["ignore_map"]), square(30, 30, 40, 40))


def test_images_are_found_whatever_the_task_calls_them(tmp_path):
    path, *images = export(tmp_path)
    picture(tmp_path / "images/deep/0.png", 50)
    picture(tmp_path / "images/a b.png", 51)
    names = {
        "/data/upload/3/0a1b2c3d-1.png": "1.png",
        "/data/local-files/?d=images/deep/0.png": "deep/0.png",
        "s3://bucket/some/2.png": "2.png",
        "https://example.com/x/a%20b.png?token=1": "a b.png",
        "/home/someone/images/3.png": "3.png",
        "../../images/4.png": "4.png",
    }
    path.write_text(json.dumps([task(i, [], name=name) for i, name in enumerate(names)]))
    rows, quarantined, _ = imported(tmp_path / "out", "label-studio", path, *images)
    assert not quarantined and list(rows) == list(names.values())


def test_damage_is_counted_and_named(tmp_path):
    good = [rectangle(0, 0, 9, 9)]
    tasks = [
        task(0, good),
        task(1),
        task(2, good, name="/data/upload/1/absent.png"),
        task(3, [rectangle(0, 0, 9, 9, "dog")]),
        task(4, [rectangle(0, 0, float("nan"), 9)]),
        task(5, [rectangle(0, 0, 9, 9, original_width=99)]),
        task(6, [region("brush", {"format": "rle", "rle": pack(square(0, 0, 9, 9) > 0)[:-2]})]),
        task(7, [region("ellipse", {"x": 1, "y": 1, "radiusX": 3, "radiusY": 3})]),
        task(8, [rectangle(0, 0, 9, 9, image_rotation=90)]),
        task(9, good, data={"text": "hello"}),
        task(10, "none"),
        {"id": 11},
        "text",
        task(12, [{"type": "rectanglelabels"}], name="11.png"),
        task(13, good, annotations=[{"result": good, "was_cancelled": True}], name="11.png"),
    ]
    arguments = (*export(tmp_path, *tasks), "--labels", "hand", "--skip-labels", "face")
    rows, quarantined, counts = imported(tmp_path / "out", "label-studio", *arguments)
    assert set(rows) == {"0.png"} and counts["rows_in"] == len(tasks)
    nobody = "nobody has annotated the task"
    assert counts["quarantined"][nobody] == 2
    assert quarantined == {
        "1.png": nobody,
        "task 2": "no image of this name",
        "3.png": "unknown label 'dog': name it among labels, ignore_labels or skip_labels",
        "4.png": "a region has coordinates that are not finite",
        "5.png": "An image of 48 x 40 pixels is annotated as one of 99 x 40.",
        "6.png": "a brush is cut short",
        "7.png": "unknown kind of region 'ellipselabels'",
        "8.png": "a region was drawn on the image turned",
        "task 9": "the task has no 'image'",
        "10.png": "an annotation has no list of results",
        "task 11": "the task has no 'image'",
        "?": "a task is no object",
        "11.png": nobody,
    }


def test_other_exports_are_refused_at_once(tmp_path, capsys):
    for content, words in (({"a": 1}, "no list of tasks"), ([{"image": "a.png", "tag": []}], "not as JSON-MIN")):
        (tmp_path / "x.json").write_text(json.dumps(content))
        assert main(["data", "import", "label-studio", str(tmp_path / "x.json"), "-o", str(tmp_path / "out")]) == 1
        assert words in capsys.readouterr().err
