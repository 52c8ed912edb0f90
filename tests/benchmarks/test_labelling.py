# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""A short form of the benchmark of labelling, and whether it would see a difference."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_killed_labelling_ends_as_others_do(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/labelling.py"), "kills", "--kills", "4", "--results", tmp_path]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(command, check=True, env=environment, timeout=600)
    found = json.loads((tmp_path / "kills.json").read_text())
    assert found["differing_files"] == [] and found["broken"] == 100
    assert sum(count for fate, count in found["fates"].items() if fate.startswith("killed")) >= 4


def test_a_difference_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    labelling = importlib.import_module("labelling")
    for name in ("one", "two"):
        for file in (
            "data/train-00000-of-00001.parquet",
            "quarantine/00000.jsonl",
            ".diffdoctor/00000.json",
            "stage.json",
        ):
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(file)
    assert labelling.difference(tmp_path / "one", tmp_path / "two") == []
    (tmp_path / "two/quarantine/00000.jsonl").write_text("x")
    (tmp_path / "two/stage.json").unlink()
    assert labelling.difference(tmp_path / "one", tmp_path / "two") == ["quarantine/00000.jsonl", "stage.json"]
