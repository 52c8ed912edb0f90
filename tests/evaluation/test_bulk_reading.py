# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Folders as they are: found = diagnosed + quarantined + skipped, whatever is in them, and however often a run is killed."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from fixtures import killed_runs
from fixtures.broken_files import DIAGNOSED, QUARANTINED, WAYS, build_tree, unlock


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="pipes, permissions and forks are needed")


@pytest.fixture
def open_folder():
    """A temporary folder that a user without rights can reach, unlike `tmp_path` of root."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    unlock(folder)
    shutil.rmtree(folder)


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def outcomes(output):
    """path -> what became of it; a path in two rows would be a path too many."""
    pairs = [(row["path"], DIAGNOSED) for row in rows(output / "diagnosis.jsonl")]
    pairs += [(row["path"], QUARANTINED) for row in rows(output / "quarantine.jsonl")]
    pairs += [(row["path"], row["reason"]) for row in rows(output / "skipped.jsonl")]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


@pytest.mark.parametrize(
    ("files", "broken", "kills", "seconds"),
    [(150, len(WAYS), 3, 60), pytest.param(1500, 500, 20, 300, marks=pytest.mark.slow)],
)
def test_each_file_is_in_one_table_however_often_the_run_is_killed(open_folder, files, broken, kills, seconds):
    vanishing = 3
    expected = build_tree(open_folder / "images", files - vanishing, broken - vanishing)
    expected |= {str(open_folder / "images/vanishing" / f"{index}.png"): QUARANTINED for index in range(vanishing)}
    assert len(expected) == files and len(WAYS) >= 40
    output = open_folder / "output"
    output.mkdir()
    output.chmod(0o777)
    done = subprocess.run(
        [sys.executable, killed_runs.__file__, str(open_folder / "images"), str(output), str(kills), str(vanishing)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == str(kills)
    assert outcomes(output / "whole") == expected
    counts = Counter(expected.values())
    assert counts[DIAGNOSED] == files - broken and counts[QUARANTINED] > 0.5 * broken
    tables = [f"{name}.{kind}" for name in ("diagnosis", "quarantine", "skipped") for kind in ("jsonl", "csv")]
    for name in (*tables, "report.html", "settings.json"):
        assert (output / "killed" / name).read_bytes() == (output / "whole" / name).read_bytes(), name
    for name, each in (("overlays", 1), ("report_files", 2)):
        whole, killed = (sorted(os.listdir(output / run / name)) for run in ("whole", "killed"))
        assert whole == killed and len(whole) == each * counts[DIAGNOSED]
    assert len(os.listdir(output / "killed")) == len(os.listdir(output / "whole"))
