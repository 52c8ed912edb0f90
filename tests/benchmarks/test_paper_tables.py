# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The paper's tables in miniature: every rung runs, and cells are not computed twice."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
QUICK = "--steps 2 --annotated 36 --photos 36 --pool 48 --hard 8 --tested 24 --threads 1 --seeds 0"


@pytest.mark.slow
def test_the_ladder_runs_and_keeps_its_cells(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/paper_tables.py"), "--table", "1", *QUICK.split()]
    command += ["--results", str(tmp_path / "results"), "--cache", str(tmp_path / "cache")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    outputs = []
    for _ in range(2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-2000:]
        outputs.append(done.stdout)
    rungs = ("annotated", "photos", "mined", "random", "pseudo", "dynamic", "injected")
    assert all(f"| {rung} | " in outputs[0] for rung in rungs)
    assert "train_runtime" in outputs[0] and "train_runtime" not in outputs[1]
    assert outputs[0].split("Mean (lowest")[1] == outputs[1].split("Mean (lowest")[1]
    assert len(list((tmp_path / "results").glob("*.json"))) == len(rungs)
