# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Image


sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import loop

from diffusers_diffdoctor.data import load_rows


@pytest.mark.slow
def test_the_loop_in_miniature_outlives_kills(tmp_path):
    """How well its detectors are is not asked of so few images and updates."""
    result = loop.main(["--output", str(tmp_path), "--share", "0.05", "--kills", "2"])
    assert result["killed"] == 2 and len(result["false_alarms"]) == 3
    truth = {f"pool-{i}": mask for i, (_, mask, _) in enumerate(loop.scenes("pool", 90, 0))}
    seen = 0
    for number in (1, 2):
        painted = load_rows(tmp_path / f"loop/round-{number}/annotated").cast_column("image", Image(decode=False))
        assert len(painted) == 12
        for row in painted:
            if (mask := truth.get(row["image"]["path"])) is not None:
                seen += 1
                assert np.array_equal(np.array(row["artifact_map"]), np.where(mask >= 128, 255, 0))
    assert seen > 0
