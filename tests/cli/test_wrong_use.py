# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What a newcomer gets wrong, without a network: at most three lines that name the argument, the value and the remedy, soon."""

import logging
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fixtures.pipelines import tiny_flux
from fixtures.trainer import tiny_detector
from huggingface_hub import constants
from PIL import Image
from transformers import CLIPTextConfig

from diffdoctor import LEFT_OUT, command_module, main


ROOT = Path(__file__).parents[2]
TREAT = "treat --config flux_schnell --output_dir out"
CONVERT = "diffdoctor convert-detector"

# what is typed, in a folder with `detector`, `pipeline`, `lora`, `other`, `empty`, `one.txt` and `images`
# -> words of the answer: flag and value, and the remedy
WRONG = {
    "no detector": (TREAT, "`--detector` is missing", CONVERT),
    "no detector to diagnose with": ("diagnose images --output out", "`--detector` is missing", CONVERT),
    "detector not reached": (
        f"{TREAT} --pipeline pipeline --detector some/detector",
        "--detector some/detector",
        CONVERT,
    ),
    "detector not reached to diagnose with": (
        "diagnose images --output out --detector some/detector",
        "--detector some/detector",
        CONVERT,
    ),
    "missing folder": (f"{TREAT} --pipeline pipeline --detector not/here/", "--detector not/here/", "check the path"),
    "LoRA as detector": (
        f"{TREAT} --pipeline pipeline --detector lora",
        "--detector lora` is a folder with a LoRA",
        CONVERT,
    ),
    "other model as detector": (f"{TREAT} --pipeline pipeline --detector other", "--detector other", CONVERT),
    "missing judge": (
        f"{TREAT} --pipeline pipeline --detector detector --judge judge/",
        "--judge judge/",
        "check the path",
    ),
    "missing photos": (
        f"{TREAT} --pipeline pipeline --detector detector --regularization_dataset photos/",
        "--regularization_dataset photos/",
        "check the path",
    ),
    "missing prompts": (
        f"{TREAT} --pipeline pipeline --detector detector --prompts prompts.txt",
        "--prompts prompts.txt",
        "no file",
    ),
    "single prompt": (
        f"{TREAT} --pipeline pipeline --detector detector --prompts one.txt",
        "--prompts one.txt",
        "--eval_prompts",
    ),
    "pipeline not reached": (
        f"{TREAT} --detector detector",
        "--pipeline black-forest-labs/FLUX.1-schnell",
        "name a folder",
    ),
    "folder without pipeline": (
        f"{TREAT} --pipeline empty --detector detector",
        "--pipeline empty",
        "save_pretrained",
    ),
    # what is cheap to look at is said before a detector is loaded, or the Hub is asked for anything
    "photos without prompts": (
        f"{TREAT} --detector hollow --judge some/judge --regularization_dataset images",
        "--regularization_dataset images",
        "metadata.jsonl",
    ),
    "prompts without photos": (
        f"{TREAT} --detector hollow --judge some/judge --regularization_dataset texts",
        '--regularization_dataset texts` has no column "image"',
        "Rename one",
    ),
    "a row without prompt": (
        f"{TREAT} --detector hollow --judge some/judge --eval_prompts texts",
        "--eval_prompts texts` has no prompt in row 1",
        "give it a text",
    ),
    "detector without weights": (
        f"{TREAT} --pipeline pipeline --detector hollow",
        "--detector hollow",
        "model.safetensors",
    ),
    "negative count": (f"{TREAT} --report_images -1", "--report_images` is -1", "0 for no report"),
    "missing checkpoint": (f"{TREAT} --resume_from_checkpoint out/checkpoint-9", "out/checkpoint-9", "say `true`"),
    "no checkpoint": (f"{TREAT} --resume_from_checkpoint true", "'out'", "checkpoint"),
    "used output folder": (
        "treat --config flux_schnell --output_dir used --detector hollow",
        "`output_dir` is 'used'",
        "--overwrite_output_dir",
    ),
    "misspelt flag": (f"{TREAT} --lora_rnak 8", "--lora_rnak", "did you mean --lora_rank?"),
    "misspelt flag of diagnose": ("diagnose images --ouput out", "--ouput", "did you mean --output?"),
    "misspelt flag of export-lora": ("export-lora lora --fromat=kohya", "--fromat", "did you mean --format?"),
    "misspelt flag of convert-detector": (
        "convert-detector a.bin --image_size 64",
        "--image_size",
        "did you mean --image-size?",
    ),
    "misspelt flag of miniature": ("miniature render --cuont 3", "--cuont", "did you mean --count?"),
    "misspelt reward": ("score images --reward hspv2", "There is no reward 'hspv2'", "did you mean 'hpsv2'"),
    "reward not reached": ("score images --reward hpsv2 --prompt a", "--reward xswu/HPSv2", "does not answer"),
    "CLIP not reached": ("score images --reward clip --prompt a", "openai/clip-vit-large-patch14", ""),
    "reward of treat": (f"{TREAT} --reward hspv2", "`--reward`: There is no reward 'hspv2'", "NAME=WHERE"),
    "misspelt flag of all": ("--tracebak diagnose images", "--tracebak", "did you mean --traceback?"),
    "misspelt recipe": ("treat --config sdlx --output_dir out", "--config sdlx", "sdxl"),
    "size that does not fit": (
        f"{TREAT} --pipeline pipeline --detector detector --resolution 17",
        "`height` is 17",
        "multiple of",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    tiny_detector().save_pretrained(folder / "detector")
    tiny_flux().save_pretrained(folder / "pipeline")
    CLIPTextConfig().save_pretrained(folder / "other")
    for name in ("lora", "empty", "images", "texts", "hollow", "used"):
        (folder / name).mkdir()
    (folder / "lora/pytorch_lora_weights.safetensors").touch()
    (folder / "hollow/config.json").write_text((folder / "detector/config.json").read_text())
    Image.new("RGB", (8, 8)).save(folder / "images/0.png")
    (folder / "texts/train.jsonl").write_text('{"prompt": "a hand"}\n{"prompt": null}\n')
    (folder / "used/metrics.jsonl").write_text("{}\n")
    (folder / "one.txt").write_text("a hand\n")
    return folder


@pytest.fixture
def no_network(monkeypatch):
    """Nobody listens where the Hub would be, and the libraries may try."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but not listening: refused at once
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield


@pytest.mark.parametrize("case", WRONG)
def test_the_answer_is_short_and_soon(case, folder, no_network, monkeypatch, capfd):
    typed, found, remedy = WRONG[case]
    monkeypatch.chdir(folder)
    start = time.monotonic()
    try:
        status = main(typed.split())
    except SystemExit as end:
        status = end.code
    assert time.monotonic() - start < 10
    printed = capfd.readouterr().err
    printed += status if isinstance(status, str) else ""  # which Python prints on leaving
    shown = [line for line in printed.replace("\r", "\n").splitlines() if line.strip()]
    lines = [line for line in shown if "it/s]" not in line]  # the bars of loading
    assert status and len(lines) <= 3, printed
    assert found in printed and remedy in printed, printed
    assert not (folder / "out").exists() or not any((folder / "out").iterdir())


@pytest.mark.parametrize("program", [[str(ROOT / "examples/treat_flux.py")], ["-m", "diffdoctor", "treat"]])
def test_a_process_of_its_own_answers_as_short(program, folder):
    """Without the warnings of other libraries, from the first import on. By -m it is started on several GPUs."""
    command = [sys.executable, *program, "--detector", "some/detector", "--output_dir", "out"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "`--detector some/detector`" in done.stderr and "HF_HUB_OFFLINE is set" in done.stderr


def test_a_program_that_imports_the_package_filters_nothing():
    code = (
        "import logging, diffusers_diffdoctor, diffdoctor\n"
        "print([name for name in diffdoctor.LEFT_OUT if logging.getLogger(name).filters])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]"


def test_only_the_words_are_left_out(caplog):
    command_module("miniature")
    for name, words in LEFT_OUT.items():
        logging.getLogger(name).warning(f"x {words} y")
        logging.getLogger(name).warning("something else of %s", name)
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"something else of {name}" for name in LEFT_OUT]
