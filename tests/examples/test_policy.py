# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The examples of policy gradients and of preferences, from the command line, on the miniature in few steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffdoctor import main


EXAMPLES = Path(__file__).parents[2] / "examples"
REWARD = "def score(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n"
SETTINGS = ["--pipeline", "miniature", "--use_cpu", "--report_to", "none", "--dataloader_pin_memory", "false"]
SETTINGS += ["--num_inference_steps", "2", "--max_steps", "2", "--logging_steps", "1", "--eval_num_images", "2"]


def start(example, folder, *arguments):
    (folder / "reward.py").write_text(REWARD)
    command = [sys.executable, str(EXAMPLES / f"{example}.py"), *SETTINGS, "--output_dir", "out", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "home"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((folder / "out/treatment.json").read_text())["step"] == 2
    for name in ("pytorch_lora_weights.safetensors", "README.md", "training_report.html"):
        assert (folder / "out" / name).stat().st_size > 0, name
    return done.stdout, [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_ddpo(tmp_path):
    said, log = start("ddpo", tmp_path, "--reward", "reward.py:score", "--num_images_per_prompt", "2")
    assert "rollouts of 4 images of 64x64 pixels, 2 of a prompt, in 2 steps" in said
    assert {"reward", "reward_std", "loss/policy"} <= log[0].keys()


@pytest.mark.slow
def test_dpo_draws_its_pairs(tmp_path):
    arguments = ["--num_pairs", "3", "--images_per_pair", "2", "--per_device_train_batch_size", "2"]
    said, log = start("dpo", tmp_path, "--reward", "reward.py:score", *arguments)
    assert "3 pairs in out/pairs; 0 prompts" in said and "3 pairs, 2 of 64x64 pixels per update" in said
    assert {"preference/accuracy", "loss/chosen"} <= log[0].keys()
    assert len(list((tmp_path / "out/pairs").glob("*-chosen.png"))) == 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["ddpo", "--reward", "brightness"], "There is no reward 'brightness'.*FILE.py:FUNCTION"),
        (["ddpo", "--reward", "none.py:score"], "there is no file 'none.py'"),
        (["ddpo", "--reward", "reward.py:other"], "'reward.py' has no function 'other'"),
        (["ddpo", "--reward", "reward.py:score", "--prompts", "none.txt"], "there is no file 'none.txt'"),
        (["dpo", "--num_pairs", "0"], "`--num_pairs` is 0, but must be at least 1"),
    ],
)
def test_wrong_use_is_told(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reward.py").write_text(REWARD)
    with pytest.raises(SystemExit, match=message):
        main([*arguments, *SETTINGS, "--output_dir", "out"])
