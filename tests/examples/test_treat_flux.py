# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The example as a user starts it, on a pipeline small enough for a test; its recipes; how it reads data."""

import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml
from fixtures.pipelines import tiny_flux
from fixtures.trainer import photos, tiny_detector

from diffusers_diffdoctor import miniature
from diffusers_diffdoctor.miniature.renderer import CATEGORIES, PRONE_CATEGORIES


ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("treat_flux", EXAMPLES / "treat_flux.py")
    module = sys.modules["treat_flux"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_treat_flux_from_start_to_report(tmp_path):
    tiny_flux().save_pretrained(tmp_path / "flux")
    tiny_detector(0).save_pretrained(tmp_path / "detector")
    tiny_detector(1).save_pretrained(tmp_path / "judge")
    (tmp_path / "photos").mkdir()
    with open(tmp_path / "photos/metadata.jsonl", "w") as file:
        for i, row in enumerate(photos(3)):
            row["image"].save(tmp_path / f"photos/{i}.png")
            file.write(json.dumps({"file_name": f"{i}.png", "prompt": row["prompt"]}) + "\n")
    (tmp_path / "prompts.txt").write_text("".join(f"prompt number {i}\n" for i in range(20)))
    (tmp_path / "recipe.yaml").write_text(
        f"pipeline: {tmp_path}/flux\ndetector: {tmp_path}/detector\nmax_steps: 9\nresolution: 16\nmax_sequence_length: 16\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(EXAMPLES / "accelerate/single_process.yaml"), str(EXAMPLES / "treat_flux.py")]
    command += ["--config", "recipe.yaml", "--output_dir", "out", "--prompts", "prompts.txt", "--judge", "judge"]
    command += ["--regularization_dataset", "photos", "--max_steps", "2", "--per_device_train_batch_size", "2"]
    command += ["--report_images", "4", "--eval_strategy", "steps", "--eval_steps", "2", "--eval_num_images", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert set(report["artifact_frequency"]) == {"judge", "detector"}
    assert len(report["images"]) == 4
    assert {"prompt number 0", "prompt number 10"} == {image["prompt"] for image in report["images"]}  # held out
    assert json.loads((tmp_path / "out/treatment.json").read_text())["step"] == 2
    for name in ("pytorch_lora_weights.safetensors", "README.md", "report.html", "report.png", "training_report.html"):
        assert (tmp_path / "out" / name).stat().st_size > 0, name
    assert "load_lora_weights" in done.stdout


def test_the_recipe_states_the_papers_values_and_parses(example, tmp_path):
    argv = ["--config", str(EXAMPLES / "recipes/flux_schnell.yaml"), "--output_dir", str(tmp_path)]
    script, args = example.parse(argv)
    assert script.pipeline == "black-forest-labs/FLUX.1-schnell"
    assert (args.num_inference_steps, args.gradient_fraction, args.offline_weight) == (4, 0.25, 0.25)
    assert (args.lora_rank, args.learning_rate, args.pixel_threshold) == (16, 1e-4, 0.1)
    assert example.parse([*argv, "--lora_rank", "8"])[1].lora_rank == 8


def test_prompts_are_read_from_files_and_held_out(example, tmp_path):
    (tmp_path / "a.txt").write_text("# a comment\na cup\n\na dog\n")
    (tmp_path / "a.jsonl").write_text('{"text": "a cup"}\n{"text": "a dog"}\n')
    (tmp_path / "a.csv").write_text('prompt\n"a cup"\n"a dog"\n')
    for name, column in (("a.txt", "prompt"), ("a.jsonl", "text"), ("a.csv", "prompt")):
        assert example.read_dataset(str(tmp_path / name), column)["prompt"][:] == ["a cup", "a dog"]
    prompts, held_out = example.read_prompts(example.ScriptArguments())
    assert len(prompts) == 72 and len(held_out) == 8
    assert not set(prompts["prompt"]) & set(held_out["prompt"])


def test_the_miniature_brings_its_own_recipe(example):
    assert example.wants_miniature(["--output_dir", "x", "--pipeline", "miniature"])
    assert example.wants_miniature(["--pipeline=miniature"])
    assert not example.wants_miniature(["--pipeline", "black-forest-labs/FLUX.1-schnell"])


def test_the_miniature_from_its_parts_to_the_report(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(miniature, "regularization_dataset", partial(miniature.regularization_dataset, 8))
    argv = ["--pipeline", "miniature", "--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--use_cpu"]
    argv += ["--per_device_train_batch_size", "2", "--num_inference_steps", "2", "--report_images", "80"]
    monkeypatch.setattr(sys, "argv", ["treat_flux.py", *argv])
    example.main()

    report = json.loads((tmp_path / "out/report.json").read_text())
    assert set(report["categories"]) == set(CATEGORIES)
    prone = [image["category"] for image in report["images"]]
    assert len(prone) == 80 and set(prone) == set(PRONE_CATEGORIES)  # the plain ones count in no frequency
    final = {row["prompt"] for row in miniature.prompts("final")}
    assert {image["prompt"] for image in report["images"]} <= final
    assert min(image["seed"] for image in report["images"]) == 1_000_000
    for name in ("judge", "detector"):
        assert 0 <= report["artifact_frequency"][name]["after"] <= 1
    for figure in ("fidelity", "diversity"):
        assert report[figure]["before"] > 0 and report[figure]["after"] > 0
    assert set(report["change"]) >= {"inside", "outside"}
    assert report["judge_error_rates"] == json.loads((miniature.load("judge") / "error_rates.json").read_text())
    printed = capsys.readouterr().out
    assert "The judge's own errors: on scenes (true positive rate" in printed and "load_lora_weights" in printed
    assert (tmp_path / "out/report.png").exists() and (tmp_path / "out/curves.png").exists()


def test_a_miniature_without_its_parts_says_how_to_get_them(example, tmp_path, monkeypatch):
    monkeypatch.setattr(example.miniature, "WEIGHTS", tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["treat_flux.py", "--pipeline", "miniature", "--output_dir", str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit, match=r"error: The miniature's .* Build it: diffdoctor miniature build"):
        example.main()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("accelerate/*.yaml")), ids=lambda path: path.stem)
def test_accelerate_configurations_load(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == yaml.safe_load(path.read_text())["num_processes"]
    assert config.mixed_precision == "no"
