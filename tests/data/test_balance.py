# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Balance: groups that were planted are found, chance is not, and the counts are those of a loop."""

import csv
import json
import math
import statistics

import numpy as np
import pytest
from fixtures.rows import photo_bytes, write_rows
from PIL import Image

import diffdoctor
from diffusers_diffdoctor.data import balance, find_shards, stand_out
from diffusers_diffdoctor.data.schema import encode_png
from diffusers_diffdoctor.pictures import forest_plot


# --- the rule ------------------------------------------------------------------------------------------------------------------


def groups(rng, count, share, spread=0.0, least=20, most=2000):
    """Group -> (images, artifacts): log-odds of the true share vary by `spread` between groups, sizes by a factor of 100."""
    images = np.exp(rng.uniform(math.log(least), math.log(most), count)).astype(int)
    odds = math.log(share / (1 - share)) + spread * rng.standard_normal(count)
    return {
        f"{i}": (int(n), int(rng.binomial(n, 1 / (1 + math.exp(-o))))) for i, (n, o) in enumerate(zip(images, odds))
    }


@pytest.mark.parametrize("spread", [0.0, 0.4])
@pytest.mark.parametrize("share", [0.03, 0.3, 0.8])
def test_without_outliers_hardly_any_group_stands_out(share, spread):
    rng = np.random.default_rng(0)
    found = [abs(z) >= 3.5 for _ in range(200) for z in stand_out(groups(rng, 40, share, spread)).values()]
    assert sum(found) / len(found) < 0.005
    # and where nothing but chance is at work, deviations are as wide as a standard normal distribution, or narrower
    if not spread:
        deviations = [z for _ in range(50) for z in stand_out(groups(rng, 40, share)).values()]
        assert 0.5 < statistics.pstdev(deviations) < 1.15


@pytest.mark.parametrize("spread", [0.0, 0.4])
def test_planted_outliers_are_found_and_hide_nobody(spread):
    """A sixth of the groups stand out, all upward: they widen no scale and drag no middle."""
    rng = np.random.default_rng(1)
    high, low, others = [], [], []
    for _ in range(50):
        counts = groups(rng, 30, 0.2, spread)
        counts |= {f"high {i}": (200, int(rng.binomial(200, 0.85))) for i in range(5)}
        counts["low"] = (400, int(rng.binomial(400, 0.01)))
        deviations = stand_out(counts)
        high += [deviations[f"high {i}"] >= 3.5 for i in range(5)]
        low.append(deviations["low"] <= -3.5)
        others += [abs(deviations[f"{i}"]) >= 3.5 for i in range(30)]
    assert sum(high) / len(high) > 0.95 and sum(low) / len(low) > 0.9
    assert sum(others) / len(others) < 0.01


def test_a_small_group_has_to_differ_by_more():
    counts = {f"{i}": (500, 100 + i) for i in range(9)}
    deviations = stand_out(counts | {"small": (20, 8), "large": (2000, 800), "tiny": (19, 19)})
    assert 0 < deviations["small"] < 3.5 < deviations["large"]
    assert deviations["tiny"] is None
    assert stand_out({"tiny": (3, 1)}) == {"tiny": None} and stand_out({}) == {}


def test_a_small_difference_never_counts_however_sure_it_is():
    counts = {f"{i}": (10**6, 500_000) for i in range(9)}
    deviations = stand_out(counts | {"a bit": (10**6, 570_000), "much": (10**6, 600_000)})
    assert 2 < deviations["a bit"] < 3.5 < deviations["much"]


def test_the_rule_as_by_hand():
    counts = {"a": (100, 10), "b": (100, 20), "c": (100, 30), "d": (100, 80), "e": (50, 0)}
    odds = {name: math.log((k + 0.5) / (n - k + 0.5)) for name, (n, k) in counts.items()}
    chance = {name: 1 / (k + 0.5) + 1 / (n - k + 0.5) for name, (n, k) in counts.items()}
    middle = odds["b"]
    distances = sorted(abs(value - middle) for value in odds.values())
    variance = (1.4826 * distances[2]) ** 2 - sorted(chance.values())[2]
    expected = {name: (odds[name] - middle) / math.sqrt(variance + chance[name]) for name in counts}
    assert stand_out(counts) == pytest.approx(expected)


# --- a dataset -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """(folder, rows): 400 labelled images in 4 shards; hands are wrong in four of five, the rest in one of ten."""
    folder = tmp_path_factory.mktemp("labelled")
    rng, rows = np.random.default_rng(0), []
    names = ["cat", "dog", "tree", "house", "car", "boat", "=1+1"]
    for number in range(400):
        category = [names[number % 7]] + ["hand"] * (number % 3 == 0) + ["rare"] * (3 <= number < 6)
        wrong = rng.random() < (0.8 if "hand" in category else 0.1)
        array = np.full((10, 12), 20, np.uint8)
        array[2:4, 3:6] = rng.integers(128, 256) if wrong else rng.integers(20, 128)
        row = {
            "image": {"bytes": photo_bytes(number % 5), "path": f"{number}.png"},
            "artifact_map": encode_png(array),
            "category": [] if number >= 390 else [*category, category[0]],
            "generator": ["flux", "sdxl", None][number % 3],
            "source": "human" if number % 50 == 0 else "pseudo",
        }
        if number % 50 == 1:
            row["artifact_map"] = None
        if number % 100 == 2:
            row["artifact_map"] = {"bytes": b"no png", "path": None}
        rows.append((row, array))
    for part in range(4):
        path = folder / f"data/train-{part:05d}-of-00004.parquet"
        write_rows(path, [row for row, _ in rows[100 * part : 100 * part + 100]])
    return folder, rows


def test_counts_are_those_of_a_loop(labelled, tmp_path):
    folder, rows = labelled
    result = balance(find_shards(folder), tmp_path, threshold=0.6, show_progress=False)
    good = [
        (row, array / 255)
        for number, (row, array) in enumerate(rows)
        if number % 50 not in (0, 1) and number % 100 != 2
    ]
    assert result["images"] == len(good) and result["left_out"] == 16 and sum(result["quarantined"].values()) == 4
    assert result["without_category"] == sum(not row["category"] for row, _ in good)
    for kind, members in (
        ("categories", lambda row: set(row["category"])),
        ("generators", lambda row: {row["generator"]} - {None}),
    ):
        assert {group["name"] for group in result[kind]} == set().union(*(members(row) for row, _ in good))
        for group in result[kind]:
            own = [confidence for row, confidence in good if group["name"] in members(row)]
            assert group["images"] == len(own)
            assert group["artifacts"] == sum(confidence.max() >= 0.6 for confidence in own)
            assert group["share"] == group["artifacts"] / group["images"]
            assert group["interval"][0] < group["share"] < group["interval"][1] or group["share"] in (0, 1)
            assert group["max_confidence"] == pytest.approx(np.mean([c.max() for c in own]), rel=1e-5)
            assert group["area_ratio"] == pytest.approx(np.mean([(c >= 0.6).mean() for c in own]), rel=1e-5)
    assert result["flagged"] == ["hand"] and result["flagged_generators"] == []
    assert result["categories"][-1]["name"] == "rare" and result["categories"][-1]["deviation"] is None


def test_what_people_read(labelled, tmp_path):
    result = balance(find_shards(labelled[0]), tmp_path, show_progress=False)
    assert json.loads((tmp_path / "balance.json").read_text()) == json.loads(json.dumps(result))
    table = list(csv.DictReader((tmp_path / "categories.csv").open()))
    assert [row["flag"] for row in table] == ["high"] + [""] * 8 and table[0]["name"] == "hand"
    assert int(table[0]["images"]) == result["categories"][0]["images"]
    assert "'=1+1" in {row["name"] for row in table}  # no formula of a spreadsheet
    page = (tmp_path / "report.html").read_text()
    assert "hand" in page and "1 of 8" in page and page.count("data:image/png") == 2
    with Image.open(tmp_path / "categories.png") as picture:
        assert picture.width == 960 and picture.height > 300


def test_it_goes_on_where_it_was_and_a_second_rule_needs_no_second_reading(labelled, tmp_path):
    shards = find_shards(labelled[0])
    first = balance(shards, tmp_path, show_progress=False)
    read = sorted((tmp_path / ".diffdoctor/confidences/data").iterdir())
    times = [path.stat().st_mtime_ns for path in read]
    read[2].unlink()
    assert balance(shards, tmp_path, show_progress=False) == first
    stricter = balance(shards, tmp_path, cutoff=100, show_progress=False)
    assert stricter["flagged"] == [] and stricter["categories"][0]["name"] == "hand"
    again = [path.stat().st_mtime_ns != time for path, time in zip(read, times)]
    assert again == [False, False, True, False]
    with pytest.raises(ValueError, match=r"threshold 0\.5, here 0\.3"):  # areas are other ones
        balance(shards, tmp_path, threshold=0.3, show_progress=False)


def test_wrong_input_is_named(labelled, tmp_path):
    shards = find_shards(labelled[0])
    with pytest.raises(ValueError, match=r"No image has a map of the source photo: .*diffdoctor data label"):
        balance(shards, tmp_path, sources=["photo"], show_progress=False)
    with pytest.raises(ValueError, match=r"`sources` must be some of human, .*found photos"):
        balance(shards, tmp_path, sources=["photos"])
    with pytest.raises(ValueError, match=r"`threshold` must be in \(0, 1\]"):
        balance(shards, tmp_path, threshold=0)
    with pytest.raises(ValueError, match="`min_images` must be at least 1"):
        balance(shards, tmp_path, min_images=0)


def test_the_command(labelled, tmp_path, capsys):
    assert diffdoctor.main(["data", "balance", str(labelled[0]), "-o", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "1 of 8 categories stand out; 1 more have fewer than 20 images" in said
    assert "high" in said and "hand" in said and (tmp_path / "out/report.html").is_file()


# --- the picture ---------------------------------------------------------------------------------------------------------------


def test_the_forest_plot_colours_what_stands_out(tmp_path):
    names = ["hand", "$x^2$ a_b", "手", "n" * 300]
    path = forest_plot(
        names,
        [0.9, 0.5, 0.1, 0.4],
        [(0.8, 0.95), (0, 1), (0, 0.2), (0.3, 0.5)],
        ["high", "", "low", ""],
        tmp_path / "x.png",
    )
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3).tolist()
    assert [0xC0, 0x39, 0x2B] in pixels and [0x3B, 0x6F, 0xB6] in pixels
    with pytest.raises(ValueError, match="found lengths 1, 0, 1 and 1"):
        forest_plot(["a"], [], [(0, 1)], [""], tmp_path / "y.png")
