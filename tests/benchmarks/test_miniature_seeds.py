# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""A benchmark of several seeds runs each once, and its table holds what the runs reported."""

import json
import runpy
from pathlib import Path

import pytest

from diffusers_diffdoctor import miniature


SCRIPT = Path(__file__).parents[2] / "benchmarks/miniature_seeds.py"


@pytest.fixture(scope="module")
def benchmark():
    return runpy.run_path(str(SCRIPT))


def cell(seed, after, fidelity=(90.0, 91.8), pixels=-0.1):
    sides = {"before": 0.8, "after": after}
    return {
        "seed": seed,
        "commit": "abc",
        "torch": "2",
        "processor": "x",
        "figures": {
            "judge": sides,
            "detector": sides,
            "plain": {"before": 0.0, "after": 0.0},
            "fidelity": dict(zip(sides, fidelity)),
            "diversity_pixels": pixels,
            "diversity_CLIP": None,
            "change": {"inside": 0.08, "outside": None},
            "images": 576,
        },
    }


def test_the_table_has_mean_and_range(benchmark):
    lines = benchmark["table"]([cell(42, 0.1), cell(43, 0.2, (90.0, 90.0), -0.06), cell(44, 0.15)]).splitlines()
    assert lines[2].startswith(
        "| seed 42 | 80.0 % → 10.0 % | 80.0 % → 10.0 % | 0.0 % → 0.0 % | 90.00 → 91.80 (+2.0 %) |"
    )
    assert lines[2].endswith("| -10.0 % / - | 0.080 / - |")
    columns = [text.strip() for text in lines[-1].strip("|").split("|")]
    assert columns[:2] == ["mean of 3 (range)", "80.0 % → 15.0 (10.0 to 20.0) %"]
    assert columns[4:] == ["+1.3 (+0.0 to +2.0) %", "-8.7 (-10.0 to -6.0) % / -", "0.080 (0.080 to 0.080) / -"]
    assert len({line.count("|") for line in lines}) == 1
    assert len(benchmark["table"]([cell(42, 0.1)]).splitlines()) == 3  # one seed has no range


def test_a_cell_is_named_by_its_settings_and_not_run_again(benchmark, tmp_path, capsys):
    names = {
        benchmark["cell_name"](seed, split, threads, flags)
        for seed in (42, 43)
        for split in ("final", "development")
        for threads in (1, 2)
        for flags in ([], ["--drift_weight", "0"], ["--drift_weight", "0.5"])
    }
    assert len(names) == 24 and "seed42-final-threads2-drift-weight-0.5" in names
    for seed in (42, 43):
        (tmp_path / f"seed{seed}-final-threads1.json").write_text(json.dumps(cell(seed, 0.1)))
    arguments = ["--seeds", "42", "43", "--threads", "1", "--results", str(tmp_path), "--runs", str(tmp_path / "no")]
    assert [found["seed"] for found in benchmark["main"](arguments)] == [42, 43]
    assert "| seed 43 |" in capsys.readouterr().out and not (tmp_path / "no").exists()


@pytest.mark.slow
def test_a_seed_from_the_command_to_the_table(benchmark, tmp_path, capsys):
    arguments = ["--seeds", "7", "--split", "development", "--threads", "1"]
    arguments += ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs"), "--use_cpu"]
    arguments += ["--max_steps", "1", "--num_inference_steps", "2", "--per_device_train_batch_size", "2"]
    (found,) = benchmark["main"]([*arguments, "--report_images", "8"])
    assert found["split"] == "development" and found["figures"]["images"] == 8 and found["seconds"] > 0
    assert "| seed 7 |" in capsys.readouterr().out
    (path,) = (tmp_path / "results").glob("seed7-development-threads1-*.json")
    assert json.loads(path.read_text()) == found
    report = json.loads((tmp_path / "runs" / path.stem / "report.json").read_text())
    assert report["images"][0]["seed"] == 1234
    development = {row["prompt"] for row in miniature.prompts("development")}
    assert {image["prompt"] for image in report["images"]} <= development
