# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""COCO files and SynthScars. Run lengths are written by pycocotools, which is another's code; polygons are compared with its own."""

import json

import numpy as np
import pytest
from fixtures.annotations import SIZE, imported, picture, pixels, square

from diffdoctor import main
from diffusers_diffdoctor.data.readers.coco import decode_rle, polygons_mask, unpack_counts


WIDTH, HEIGHT = SIZE
TRIANGLE = [5.0, 5.0, 40.0, 8.0, 12.0, 35.0]


def blobs(seed: int, size=SIZE) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.random((10, 15)) < rng.choice([0.02, 0.3, 0.7])
    return np.kron(coarse, np.ones((20, 20), bool))[: size[1], : size[0]] ^ (rng.random(size[::-1]) < 0.02)


@pytest.mark.parametrize("seed", range(12))
def test_run_lengths_are_what_pycocotools_packed(seed):
    masks = pytest.importorskip("pycocotools.mask")
    size = [SIZE, (1, 1), (300, 200), (7, 100)][seed % 4]
    values = blobs(seed, size) if seed < 8 else np.full(size[::-1], seed % 2 == 0)
    packed = masks.encode(np.asfortranarray(values.astype(np.uint8)))
    assert packed["size"] == list(values.shape)
    for counts in (packed["counts"], packed["counts"].decode()):
        assert np.array_equal(decode_rle(packed | {"counts": counts}, size), values)
    runs = unpack_counts(packed["counts"])
    again = masks.frPyObjects({"size": packed["size"], "counts": runs}, *packed["size"])
    assert again["counts"] == packed["counts"] and sum(runs) == values.size
    assert np.array_equal(decode_rle({"size": packed["size"], "counts": runs}, size), values)


def test_run_lengths_go_down_the_columns():
    mask = decode_rle({"size": [3, 2], "counts": [1, 2, 3]}, (2, 3))
    assert mask.tolist() == [[False, False], [True, False], [True, False]]


@pytest.mark.parametrize("seed", range(8))
def test_polygons_are_those_of_pycocotools_but_for_their_borders(seed):
    masks = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(seed)
    polygons = []
    for _ in range(2):
        angles = 2 * np.pi * (np.arange(9) + rng.random(9) * 0.5) / 9
        radius = rng.uniform(20, 60, 9)
        points = rng.uniform(60, 140, 2) + radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        polygons.append(points.ravel().tolist())
    theirs = masks.decode(masks.merge(masks.frPyObjects(polygons, 200, 200))).astype(bool)
    ours = polygons_mask(polygons, (200, 200))
    padded = np.pad(theirs, 1, mode="edge")
    neighbours = [padded[y : y + 200, x : x + 200] for y in range(3) for x in range(3)]
    border = np.any(neighbours, axis=0) & ~np.all(neighbours, axis=0)
    assert not ((ours != theirs) & ~border).any()
    assert (ours & theirs).sum() / (ours | theirs).sum() > 0.97


@pytest.mark.parametrize(
    "segmentation, words",
    [
        ({"counts": [1]}, "has no size"),
        ({"size": [3, 3], "counts": [6]}, "annotated as one of 3 x 3"),
        ({"size": [3, 2], "counts": [5]}, "do not fill"),
        ({"size": [3, 2], "counts": [7, -1]}, "other counts"),
        ({"size": [3, 2], "counts": [float("nan")]}, "other counts"),
        ({"size": [3, 2], "counts": None}, "other counts"),
        ({"size": [3, 2], "counts": "P"}, "cut short"),
        ({"size": [3, 2], "counts": "5 "}, "none of theirs"),
        ({"size": [3, 2], "counts": "o" * 10**6}, "no image is large enough"),
    ],
)
def test_what_are_no_run_lengths_is_refused(segmentation, words):
    with pytest.raises(ValueError, match=words):
        decode_rle(segmentation, (2, 3))


def coco(top, images, annotations, categories=("hand", "face", "unsure")):
    for image in images:
        if image.pop("there", True):
            picture(top / image["file_name"], image["id"])
    content = {
        "images": images,
        "annotations": [{"id": 100 + i} | one for i, one in enumerate(annotations)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(categories)],
    }
    (top / "coco.json").write_text(json.dumps(content))
    return top / "coco.json"


def image(number, **changes):
    return {"id": number, "file_name": f"images/{number}.png", "width": WIDTH, "height": HEIGHT} | changes


def test_a_coco_file_becomes_maps(tmp_path):
    run_lengths = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT, HEIGHT * (WIDTH - 1)]}
    path = coco(
        tmp_path,
        [image(0), image(1), image(2), image(3, file_name="/home/someone/images/3.png", there=False)],
        [
            {"image_id": 0, "category_id": 0, "segmentation": [TRIANGLE, [0, 0, 4, 0, 4, 4, 0, 4]]},
            {"image_id": 0, "category_id": 1, "segmentation": run_lengths, "iscrowd": 1},
            {"image_id": 0, "category_id": 2, "bbox": [0, 0, 10, 10]},
            {"image_id": 1, "category_id": 1, "bbox": [4, 5, 6, 7]},
        ],
    )
    picture(tmp_path / "images/3.png")
    rows, quarantined, _ = imported(tmp_path / "out", "coco", path, "--ignore-labels", "unsure")
    assert not quarantined and list(rows) == [f"images/{i}.png" for i in range(4)]
    first = pixels(rows["images/0.png"]["artifact_map"]) == 255
    expected = polygons_mask([TRIANGLE], SIZE) | (square(0, 0, 4, 4) | square(0, 0, 1, HEIGHT) > 0)
    assert np.array_equal(first, expected)
    assert np.array_equal(pixels(rows["images/0.png"]["ignore_map"]) > 0, (square(0, 0, 10, 10) > 0) & ~expected)
    assert np.array_equal(pixels(rows["images/1.png"]["artifact_map"]), square(4, 5, 10, 12))
    assert not pixels(rows["images/2.png"]["artifact_map"]).any()
    assert [row["category"] for row in rows.values()] == [["face", "hand"], ["face"], [], []]


def test_damage_of_a_coco_file_is_counted_and_named(tmp_path):
    box = {"category_id": 0, "bbox": [4, 5, 6, 7]}
    path = coco(
        tmp_path,
        [
            image(0),
            image(1, there=False),
            image(2, width=WIDTH + 1),
            image(3),
            image(4),
            image(5),
            image(6),
            image(6, file_name="images/7.png"),
            image(8, file_name="../secret.png", there=False),
            image(9),
        ],
        [
            *({"image_id": i} | box for i in (0, 1, 2, 6, 8)),
            {"image_id": 3, "category_id": 7, "bbox": [4, 5, 6, 7]},
            {"image_id": 4, "category_id": 0, "segmentation": [[1, 1, float("nan"), 1, 9, 9]]},
            {"image_id": 5, "category_id": 1, "bbox": [4, 5, 6, 7]},
            {"image_id": 9, "category_id": 0},
            {"image_id": 55} | box,
            {"image_id": None} | box,
        ],
    )
    picture(tmp_path.parent / "secret.png")
    arguments = ("--labels", "hand", "--ignore-labels", "unsure")
    rows, quarantined, counts = imported(tmp_path / "out", "coco", path, *arguments)
    assert set(rows) == {"images/0.png"} and counts["rows_in"] == 10 + 2
    assert quarantined == {
        "images/1.png": "no image of this name",
        "images/2.png": "An image of 48 x 40 pixels is annotated as one of 49 x 40.",
        "images/3.png": "unknown category 7",
        "images/4.png": "a region has coordinates that are not finite",
        "images/5.png": "unknown label 'face': name it among labels, ignore_labels or skip_labels",
        "images/6.png": "several images of the id 6",
        "images/7.png": "several images of the id 6",
        "../secret.png": "no image of this name",
        "images/9.png": "a region's coordinates are not pairs of numbers",
        "annotation 109": "an annotation of an unknown image 55",
        "annotation 110": "an annotation of an unknown image None",
    }
    rows, quarantined, _ = imported(tmp_path / "skip", "coco", path, *arguments, "--skip-labels", "face")
    assert "images/5.png" not in quarantined and not pixels(rows["images/5.png"]["artifact_map"]).any()


@pytest.mark.parametrize(
    "content, words",
    [("[", "no JSON"), ("[]", "no COCO file"), ('{"images": []}', "no list of"), ("", "no JSON")],
)
def test_what_is_no_coco_file_is_refused_at_once(tmp_path, capsys, content, words):
    (tmp_path / "x.json").write_text(content)
    assert main(["data", "import", "coco", str(tmp_path / "x.json"), "-o", str(tmp_path / "out")]) == 1
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(["data", "import", "coco", "nowhere.json", "-o", str(tmp_path / "out")]) == 1
    assert "no file 'nowhere.json'" in capsys.readouterr().err
    both = ["--labels", "a", "--skip-labels", "a"]
    assert main(["data", "import", "coco", str(tmp_path / "x.json"), "-o", str(tmp_path / "out"), *both]) == 1
    assert "'a' is named twice" in capsys.readouterr().err


def test_synthscars(tmp_path):
    def entry(name, *polygons, **changes):
        refs = [{"sentence": "a sixth finger", "segmentation": [p], "bbox": [0, 0, 1, 1]} for p in polygons]
        return {"refs": refs, "caption": "The hand has six fingers.", "img_file_name": name} | changes

    for name in ("good", "sound", "nan", "no refs", "no polygons"):
        picture(tmp_path / f"images/{name}.jpg")
    entries = {
        "1": entry("good.jpg", TRIANGLE, [0, 0, 4, 0, 4, 4, 0, 4]),
        "2": entry("sound.jpg", caption=None),
        "3": entry("nan.jpg", [1, 1, float("nan"), 1, 9, 9]),
        "4": entry("no refs.jpg", refs=None),
        "5": entry("no polygons.jpg", refs=[{"sentence": "x"}]),
        "6": entry("absent.jpg", TRIANGLE),
        "7": entry(None, TRIANGLE),
        "8": "text",
    }
    (tmp_path / "annotations").mkdir()
    path = tmp_path / "annotations/train.json"
    path.write_text(json.dumps(entries))
    rows, quarantined, _ = imported(tmp_path / "out", "synthscars", path, "--images", tmp_path / "images")
    assert set(rows) == {"good.jpg", "sound.jpg"} and rows["sound.jpg"]["caption"] is None
    assert rows["good.jpg"]["caption"] == "The hand has six fingers." and rows["good.jpg"]["prompt"] is None
    expected = polygons_mask([TRIANGLE], SIZE) | (square(0, 0, 4, 4) > 0)
    assert np.array_equal(pixels(rows["good.jpg"]["artifact_map"]) > 0, expected)
    assert not pixels(rows["sound.jpg"]["artifact_map"]).any()
    assert quarantined == {
        "nan.jpg": "a region has coordinates that are not finite",
        "no refs.jpg": "the entry has no list of refs",
        "no polygons.jpg": "a region has no polygons",
        "6": "no image of this name",
        "7": "the annotation names no image",
        "8": "the entry is no object",
    }
