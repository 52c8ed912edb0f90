# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The examples as a user starts them, on pipelines small enough for a test, from the command line to the report."""

import json
import os
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from fixtures.classic_pipelines import tiny_kolors
from fixtures.pipelines import add_lora, tiny_flux, tiny_sdxl
from fixtures.trainer import photos, tiny_detector

from diffusers_diffdoctor.cli.treat import RECIPES
from diffusers_diffdoctor.rollout import DifferentiableRollout
from diffusers_diffdoctor.treatment.adapter import save_lora


ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def folder(tmp_path):
    """Everything but the pipeline that a command names."""
    tiny_detector(0).save_pretrained(tmp_path / "detector")
    tiny_detector(1).save_pretrained(tmp_path / "judge")
    (tmp_path / "photos").mkdir()
    with open(tmp_path / "photos/metadata.jsonl", "w") as file:
        for i, row in enumerate(photos(3)):
            row["image"].save(tmp_path / f"photos/{i}.png")
            file.write(json.dumps({"file_name": f"{i}.png", "prompt": row["prompt"]}) + "\n")
    (tmp_path / "prompts.txt").write_text("".join(f"prompt number {i}\n" for i in range(20)))
    return tmp_path


def assert_whole(folder: Path, steps: int) -> None:
    report = json.loads((folder / "out/report.json").read_text())
    assert set(report["artifact_frequency"]) == {"judge", "detector"}
    assert [image["prompt"] for image in report["images"]] == ["prompt number 0", "prompt number 10"] * 2  # held out
    assert [image["seed"] for image in report["images"]] == [1_000_000 + i for i in range(4)]
    assert json.loads((folder / "out/treatment.json").read_text())["step"] == steps
    card = (folder / "out/README.md").read_text()
    frequency = report["artifact_frequency"]["judge"]
    assert f"| artifact frequency, judge | {frequency['before']:.1%} | {frequency['after']:.1%} |" in card
    assert "(report.png)" in card and "4 images of held-out prompts by the untreated pipeline" in card
    for name in ("pytorch_lora_weights.safetensors", "README.md", "report.html", "report.png", "training_report.html"):
        assert (folder / "out" / name).stat().st_size > 0, name


def test_treat_flux_under_accelerate(folder, monkeypatch):
    tiny_flux().save_pretrained(folder / "flux")
    (folder / "recipe.yaml").write_text(
        f"pipeline: {folder}/flux\ndetector: {folder}/detector\nmax_steps: 9\nresolution: 16\nmax_sequence_length: 16\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(EXAMPLES / "accelerate/single_process.yaml"), str(EXAMPLES / "treat_flux.py")]
    command += ["--config", "recipe.yaml", "--output_dir", "out", "--prompts", "prompts.txt", "--judge", "judge"]
    command += ["--regularization_dataset", "photos", "--max_steps", "2", "--per_device_train_batch_size", "2"]
    command += ["--report_images", "4", "--eval_strategy", "steps", "--eval_steps", "2", "--eval_num_images", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "home"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    assert_whole(folder, steps=2)
    monkeypatch.chdir(folder)
    exec(textwrap.dedent(done.stdout.partition("To use it:\n")[2]), loaded := {})
    assert loaded["image"].size == (16, 16)
    assert loaded["pipe"].get_active_adapters() and loaded["pipe"].dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize(("example", "build"), [("treat_sdxl", tiny_sdxl), ("treat_kolors", tiny_kolors)])
def test_treat_sdxl_and_kolors_with_their_recipes(folder, example, build, monkeypatch, capsys):
    """The recipe decides all but the sizes: guidance, the window of a quarter, the 8-bit optimizer, accumulation."""
    monkeypatch.chdir(folder)
    build().save_pretrained("pipeline")
    command = (
        f"{example}.py --pipeline pipeline --detector detector --judge judge --prompts prompts.txt --output_dir out"
    )
    command += f" --regularization_dataset {folder / 'photos'} --use_cpu --resolution 32 --num_inference_steps 4"
    command += " --max_steps 1 --eval_steps 1 --eval_num_images 2 --report_images 4"
    command += " --lora_rank 2 --logging_steps 1 --report_to none"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EXAMPLES / f"{example}.py"), run_name="__main__")
    assert end.value.code == 0
    assert_whole(folder, steps=1)
    used = json.loads((folder / "out/treatment.json").read_text())["args"]
    recipe = yaml.safe_load((EXAMPLES / "recipes" / f"{example.removeprefix('treat_')}.yaml").read_text())
    for name in ("guidance_scale", "gradient_fraction", "gradient_accumulation_steps", "optim", "offline_weight"):
        assert used[name] == recipe[name], name
    log = json.loads((folder / "out/report.json").read_text())["training_log"]
    assert any(entry.get("loss/offline", 0) > 0 for entry in log)


def test_a_personalised_pipeline_is_treated_on_its_instance_prompt(folder, monkeypatch):
    """Held out are other places; and the printed lines draw what was treated, upon the LoRA that it wears."""
    monkeypatch.chdir(folder)
    tiny_sdxl().save_pretrained("pipeline")
    personal = tiny_sdxl()
    add_lora(personal)
    save_lora(personal, "unet", "dog")
    command = "dreambooth_treat.py --pipeline pipeline --base_lora dog --detector detector --output_dir out --use_cpu"
    command += (
        " --resolution 32 --num_inference_steps 2 --max_steps 1 --eval_strategy no --report_images 2 --lora_rank 2"
    )
    command += (
        " --learning_rate 0.1 --optim adamw_torch --gradient_accumulation_steps 1 --report_to none --save_strategy no"
    )
    monkeypatch.setattr(sys, "argv", [*command.split(), "--instance_prompt", "a sks dog"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EXAMPLES / "dreambooth_treat.py"), run_name="__main__")
    assert end.value.code == 0
    report = json.loads((folder / "out/report.json").read_text())
    prompts = [image["prompt"] for image in report["images"]]
    assert len(set(prompts)) == 2 and all(prompt.startswith("a sks dog ") for prompt in prompts)
    page = (folder / "out/README.md").read_text()
    assert "pipe.fuse_lora(lora_scale=1)" in page and "| `base_lora` | dog |" in page
    loading, _, call = report["loading_code"].rpartition("\n")
    exec(loading, loaded := {})
    assert loaded["pipe"].get_active_adapters() and prompts[0] in call
    after = DifferentiableRollout(loaded["pipe"], height=32, width=32, num_inference_steps=2, guidance_scale=5.0)
    image = after.generate(prompts[:1], [report["images"][0]["seed"]])
    found = tiny_detector(0).confidence(image).max().item()
    assert found == pytest.approx(report["images"][0]["detector"]["after"], abs=1e-4)


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_found_beside_the_examples(recipe):
    assert (EXAMPLES / "recipes" / recipe.name).resolve() == recipe.resolve()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("accelerate/*.yaml")), ids=lambda path: path.stem)
def test_accelerate_configurations_load(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == yaml.safe_load(path.read_text())["num_processes"]
    assert config.mixed_precision == "no"
