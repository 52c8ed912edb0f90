# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import without_training


@pytest.mark.slow
def test_the_benchmark_runs_and_keeps_its_cells(tmp_path, capsys):
    arguments = ["--split", "development", "--seeds", "0", "--count", "2", "--tries", "1", "--results", str(tmp_path)]
    cells = without_training.main(arguments)
    assert set(cells) == {"plain", "best_of", "guidance", "repair"}
    plain, best = (cells[way][0]["figures"] for way in ("plain", "best_of"))
    assert plain["images"] == 2 and best["detector"] <= plain["detector"]  # the plain image is one of the four
    assert "| guidance | " in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(before) == 4 and without_training.main(arguments) == cells
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
