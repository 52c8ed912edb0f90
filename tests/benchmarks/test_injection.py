# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The benchmarks of injection: cells are kept, emoji are split by emoji, and tools of injection leave no traces."""

import json
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import emoji
import injection

from diffusers_diffdoctor.data.injection.decoys import WAYS
from diffusers_diffdoctor.miniature.renderer import render, sample_scene


@pytest.mark.parametrize(
    ("code", "category"),
    [
        ("1f44b", "hand"),
        ("1f44d", "hand"),
        ("1f918", "hand"),
        ("1f600", "face"),
        ("1f431", "animal"),
        ("1f996", "animal"),
        ("1f469", "person"),
        ("1f46b", "person"),
        ("1f550", None),  # clock face one oclock
        ("1f32d", None),  # hot dog
        ("1f334", None),  # palm tree
        ("1f4c7", None),  # card index
        ("1f3e0", None),
    ],
)
def test_emoji_are_chosen_by_name(code, category):
    assert emoji.category_of([int(code, 16)]) == category, unicodedata.name(chr(int(code, 16)))


def test_all_skin_tones_and_genders_of_an_emoji_are_on_one_side():
    files = ["1f44b", "1f44b-1f3fb", "1f44b-1f3ff"], ["1f469-200d-1f680", "1f468-1f3fd-200d-1f680", "1f9d1-200d-1f680"]
    keys = [{emoji.key_of(emoji.codes_of(Path(f"{name}.webp"))) for name in names} for names in files]
    assert [len(some) for some in keys] == [1, 1] and keys[0] != keys[1]
    splits = [emoji.split_of(str(number)) for number in range(2000)]
    shares = {split: splits.count(split) / 2000 for split in emoji.SPLITS}
    assert shares == pytest.approx({"report": 0.25, "development": 0.15, "train0": 0.3, "train1": 0.3}, abs=0.04)


def test_without_npm_the_emoji_are_skipped_with_a_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="Skipped: the emoji come by `npm pack @lobehub/fluent-emoji-3d`"):
        emoji.fetch(tmp_path)


@pytest.mark.slow
def test_the_emoji_benchmark_runs_and_keeps_its_cells(tmp_path, capsys):
    """With scenes of the renderer under the names of emoji."""
    folder = tmp_path / "cache" / emoji.VERSION / "package/assets"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for code in range(0x1F600, 0x1F616):
        scene = Image.fromarray(render(sample_scene(rng, 0.0, category="face"))[0])
        scene.resize((256, 256)).save(folder / f"{code:x}.webp", lossless=True)
    arguments = ["--without", "none", "omit", "--steps", "2", "--split", "report"]
    arguments += ["--cache", str(tmp_path / "cache"), "--results", str(tmp_path / "results")]
    cells = emoji.main(arguments)
    figures = cells["none"]["figures"]
    assert figures["untouched"]["images"] == figures["untouched"]["emoji"] > 0
    assert set(figures["injected"]) == set(injection.WEIGHTS) and set(cells["omit"]["figures"]["injected"]) == {"omit"}
    assert "| omit |" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "results").iterdir()}
    assert len(before) == 2 and emoji.main(arguments) == cells
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "results").iterdir()}


@pytest.mark.slow
def test_the_benchmark_on_the_renderer_runs_and_keeps_its_cells(tmp_path, monkeypatch):
    monkeypatch.setattr(injection, "TESTED", 8)
    folder = tmp_path / "results"
    for data in injection.DATA:
        settings = {"data": data, "split": "development", "seed": 0, "scenes": 48, "steps": 2}
        one = injection.cached(folder, settings, injection.cell, data, "development", 0, 48, 2)
        assert set(one["figures"]) == {"all", *injection.ARTIFACT_KINDS}
        assert injection.cached(folder, settings, lambda: pytest.fail("made again")) == one
    assert len(list(folder.glob("*.json"))) == 2
    cells = {data: [json.loads(path.read_text()) for path in folder.glob(f"{data}-*")] for data in injection.DATA}
    assert "| fused | " in injection.table(cells)


@pytest.mark.slow
@pytest.mark.parametrize("way", [*WAYS, injection.blurred], ids=lambda way: way.__name__)
def test_the_tools_of_injection_leave_no_traces(way):
    """What a network finds of regions that were only retouched is little more than it knows from where regions are."""
    found = injection.traces({"way": way}, count=300, steps=250)["way"]
    gain = found["changed"] - found["untouched"]
    if way is injection.blurred:  # it can find traces
        assert gain > 0.06, found
    else:
        assert gain < 0.03, found
