# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""A short form of the benchmark of faults: some kills and damages of each trainer, and whether it would see a difference."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_killed_and_damaged_runs_end_as_others_do(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "benchmarks/faults.py"),
        "--kills",
        "6",
        "--damages",
        "8",
        "--results",
        tmp_path,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(command, check=True, env=environment, timeout=600)
    cells = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    for kind in ("treatment", "detector"):
        kills = [cell for cell in cells if cell["kind"] == kind and "kills" in cell]
        assert sum(cell["kills"] for cell in kills) >= 6 and sum(cell["in_a_save"] for cell in kills) >= 1
        assert sum(cell["kind"] == kind and "way" in cell for cell in cells) == 8
    assert [
        cell for cell in cells if cell["differs"] or not cell.get("named", True) or cell.get("failed_starts")
    ] == []


@pytest.mark.slow
def test_a_difference_is_seen(tmp_path):
    """Another random state in the last checkpoint, another weight, another line of the log."""
    code = f"""
import json, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import faults, shutil, torch
torch.set_num_threads(1)
one, two = Path({str(tmp_path)!r}, "one/run"), Path({str(tmp_path)!r}, "two/run")
faults.in_a_fork(lambda: faults.finish("detector", one))
shutil.copytree(one, two)
found = [faults.difference(two, one)]
for name in ("rng_state.pth", "optimizer.pt"):
    path = two / faults.LAST / name
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    found.append(faults.difference(two, one))
    path.write_bytes(content)
lines = (two / "metrics.jsonl").read_text().splitlines()
(two / "metrics.jsonl").write_text(chr(10).join(lines[1:]) + chr(10))
print(json.dumps([*found, faults.difference(two, one)]))
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [None, "rng_state.pth", "optimizer.pt", "the log"]
