# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The benchmark runs, and what should cost next to nothing does."""

import json
import runpy
import sys
from pathlib import Path


SCRIPT = Path(__file__).parents[2] / "benchmarks/augmentation.py"


def test_it_runs_and_writes_its_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setattr(sys, "argv", ["augmentation.py", "--images", "1", "--rounds", "3", "--results", str(tmp_path)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    result = json.loads((tmp_path / "512.json").read_text())
    ratios = result["ratio_to_decoding"]
    assert ratios["decoding"] == 1 and ratios["mirror"] < ratios["blur"]
    assert ratios["prepared, none"] > 1 and len(ratios) == len(capsys.readouterr().out.splitlines())
