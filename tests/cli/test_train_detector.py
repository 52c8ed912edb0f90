# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor train-detector`: its arguments and recipes, what it reads, and a training from files to a detector."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from fixtures.runs import squares
from fixtures.segformer import tiny_detector
from transformers import pipeline

from diffdoctor import main
from diffusers_diffdoctor.cli import train_detector
from diffusers_diffdoctor.cli.train_detector import (
    DEFAULT_RECIPE,
    RECIPES,
    ScriptArguments,
    hold_out,
    parse,
    read_data,
    read_names,
    recipes,
)
from diffusers_diffdoctor.cli.training import Parser
from diffusers_diffdoctor.detector import ArtifactDetectorTrainingArguments
from diffusers_diffdoctor.detector.model_card import licence_of


ROOT = Path(__file__).parents[2]
FEATURES = Features(
    {
        "image": ImageFeature(),
        "artifact_map": ImageFeature(),
        "category": List(Value("string")),
        "source": Value("string"),
    }
)


def write_dataset(folder, count, source, split="train", seed=0, labelled=True):
    rows = [row | {"category": ["square"], "source": source} for row in squares(count, seed)]
    if source == "photo":
        rows = [row | {"artifact_map": row["artifact_map"].point(lambda value: 0)} for row in rows]
    rows = rows if labelled else [row | {"artifact_map": None} for row in rows]
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=FEATURES).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    tiny_detector(image_size=32).save_pretrained("start")
    write_dataset(tmp_path / "annotated/data", 12, "human")
    write_dataset(tmp_path / "annotated/data", 4, "human", "validation", seed=1)
    write_dataset(tmp_path / "photos", 8, "photo", seed=2)
    return tmp_path


RUN = "--model start --output_dir out --use_cpu --report_to none --disable_tqdm true --dataloader_num_workers 0"
RUN += " --max_steps 2 --eval_steps 1 --save_steps 1 --logging_steps 1 --warmup_steps 0"


# --- arguments -----------------------------------------------------------------------------------------------------------


def test_help_groups_what_is_asked_and_where_it_is_from(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train-detector", "--help"])
    assert end.value.code == 0
    _, *sections = re.split(r"^(\S.*):$", capsys.readouterr().out, flags=re.M)
    flags = {title: set(re.findall(r"^  --(\w+)", text, re.M)) for title, text in zip(sections[::2], sections[1::2])}
    titles = Parser.GROUPS | {"run": "what to train, and on what"}
    groups = {name: flags[title] for name, title in titles.items() if title in flags}
    assert groups["run"] == set(ScriptArguments.__annotations__)
    assert {"loss", "source_weights", "balance", "ema_decay", "worst_cases"} <= groups["paper"] | groups["ours"]
    assert {"max_steps", "seed", "optim"} <= groups["transformers"] and "config" in flags["options"]


@pytest.mark.parametrize("name", recipes())
def test_recipes_say_where_each_value_comes_from(name, tmp_path):
    text = recipes()[name].read_text()
    whole = {"eval_strategy", "eval_steps", "logging_steps", "save_strategy", "save_steps", "save_total_limit"}
    whole |= {
        "load_best_model_at_end",
        "metric_for_best_model",
        "dataloader_num_workers",
    }  # under one heading that says "ours"
    for line in [line for line in text.splitlines() if re.match(r"\w+:", line)]:
        assert line.split(":")[0] in whole or re.search(r"#.*\b(paper|SegFormer|ours)\b", line), line
    assert set(yaml.safe_load(text)) <= {
        *ScriptArguments.__annotations__,
        *ArtifactDetectorTrainingArguments.__dataclass_fields__,
    }
    script, args = parse(["--config", name, "--output_dir", str(tmp_path)])
    assert args.load_best_model_at_end and script.image_size in (256, 512)
    assert (ROOT / "examples/recipes" / f"{name}.yaml").resolve() == recipes()[name].resolve()


def test_recipes_are_the_paper_and_one_without_its_restriction(tmp_path):
    found = {name: parse(["--config", name, "--output_dir", str(tmp_path)]) for name in recipes()}
    assert set(found) == {"paper", "backbone", "small"} and RECIPES.is_dir()
    script, args = found["paper"]
    assert (script.model, script.image_size, args.loss) == ("nvidia/mit-b5", 512, "mse")
    assert licence_of("nvidia/mit-b5") and not licence_of(found[DEFAULT_RECIPE][0].model)
    assert found["small"][0].model == "b0" and found["small"][1].loss == "bce_dice"
    script, args = parse(["--output_dir", str(tmp_path), "--model", "b1", "--source_weights", '{"a": 1, "b": 0.5}'])
    assert script.model == "b1" and args.source_weights == {"a": 1, "b": 0.5}


def test_weights_and_datasets_of_a_recipe(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "train_dataset: [a=x, y]\nsource_weights: {a: 1, y: 2}\nhold_out: 0.1\nmodel: b0\n"
    )
    script, args = parse(["--config", str(tmp_path / "a.yaml"), "--output_dir", str(tmp_path)])
    assert script.train_dataset == ["a=x", "y"] and args.source_weights == {"a": 1, "y": 2} and script.hold_out == 0.1


# --- data ----------------------------------------------------------------------------------------------------------------


def test_datasets_are_named(folder):
    (folder / "odd=name").mkdir()
    found = read_names(["human=annotated:validation", "photos/", "odd=name"], "--train_dataset")
    assert [tuple(one)[1:] for one in found] == [
        ("human", "annotated", "validation"),
        ("photos", "photos/", "train"),
        ("odd=name", "odd=name", "train"),
    ]
    assert read_names(["photos"], "--train_dataset")[0].name == ""
    with pytest.raises(ValueError, match=r"two datasets of the name 'photos': .*first=path/to/photos"):
        read_names(["photos", "photos:test"], "--train_dataset")


def test_a_part_of_each_dataset_is_held_out(folder):
    said = []
    data = read_data(ScriptArguments(train_dataset=["annotated", "photos"], hold_out=0.25), said.append)
    assert {name: len(rows) for name, rows in data.train.items()} == {"annotated": 9, "photos": 6}
    assert len(data.evaluation) == 5 and said == ["5 rows of the training data are held out for evaluation."]
    assert [data.evaluation[i]["source"] for i in range(5)] == ["human"] * 3 + ["photo"] * 2
    single = read_data(ScriptArguments(train_dataset=["photos"], hold_out=0.5))
    assert len(single.train) == len(single.evaluation) == 4
    none = read_data(ScriptArguments(train_dataset=["p=photos"], hold_out=0))
    assert len(none.train["p"]) == 8 and none.evaluation is None
    kept, held = hold_out({"": Dataset.from_dict({"n": range(100)})}, 0.2)
    assert len(held) == 20 and sorted([*held["n"], *kept[""]["n"]]) == list(range(100))
    assert {n % 2 for n in held["n"]} == {0, 1} and held["n"] == sorted(
        held["n"]
    )  # no beat with the order of the rows
    assert hold_out({"": Dataset.from_dict({"n": range(100)})}, 0.2)[1]["n"] == held["n"]


def test_named_sets_are_evaluated_apart(folder):
    script = ScriptArguments(train_dataset=["photos"], eval_dataset=["human=annotated:validation", "photos"])
    data = read_data(script)
    assert len(data.train) == 8 and {name: len(rows) for name, rows in data.evaluation.items()} == {
        "human": 4,
        "photos": 8,
    }
    assert len(read_data(ScriptArguments(["photos"], ["annotated:validation"])).evaluation) == 4


WRONG = {
    "no data": ("", "`--train_dataset` is missing"),
    "no such data": ("--train_dataset nowhere/", "--train_dataset nowhere/` is no folder here"),
    "no such split": ("--train_dataset photos:test", "`--train_dataset photos:test`: "),
    "not labelled": ("--train_dataset raw", "`--train_dataset raw` has 5 rows of 5 without an `artifact_map`"),
    "no maps": ("--train_dataset bare", "needed are `image` and `artifact_map`"),
    "weights of nothing": (
        '--train_dataset photos annotated --source_weights {"photo":1}',
        "weights of ['photo'], but the sources are ['annotated', 'photos']",
    ),
    "nothing to evaluate on": (
        "--train_dataset photos --hold_out 0",
        "--eval_strategy no --load_best_model_at_end false",
    ),
    "best of no set": (
        "--train_dataset photos --eval_dataset a=photos b=annotated",
        "`--metric_for_best_model loss` is of no set of `--eval_dataset`, which are evaluated apart: name one, such as a_loss",
    ),
    "half held out": ("--train_dataset photos --hold_out 0.9", "`--hold_out` is 0.9"),
    "no such model": ("--train_dataset photos --model nowhere", "--model nowhere` is no folder here"),
    "no model": ("--train_dataset photos --model photos", "`--model photos` is a folder without a config.json"),
    "another model": ("--train_dataset photos --model bert", "'bert', which is no encoder of `AutoBackbone`"),
    "used folder": ("--train_dataset photos --output_dir used", "`output_dir` is 'used', which holds an earlier run"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_before_anything_is_trained(folder, case, monkeypatch, capsys):
    typed, message = WRONG[case]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    write_dataset(folder / "raw", 5, "pseudo", labelled=False)
    Dataset.from_list(
        [{"image": row["image"]} for row in squares(2)], features=Features({"image": ImageFeature()})
    ).to_parquet(folder / "bare/train-0.parquet")
    for name, config in (("bert", {"model_type": "bert"}), ("used", None)):
        (folder / name).mkdir()
        (folder / name / ("config.json" if config else "metrics.jsonl")).write_text(json.dumps(config or {}))
    with pytest.raises(SystemExit) as end:
        main(["train-detector", *RUN.split(), *typed.split()])
    printed = capsys.readouterr().err + str(end.value.code)
    assert message in printed and end.value.code
    assert not (folder / "out").exists() or not any((folder / "out").iterdir())


# --- a training ----------------------------------------------------------------------------------------------------------


def test_from_files_to_a_detector(folder, capsys):
    command = ["train-detector", *RUN.split(), "--train_dataset", "human=annotated", "photo=photos"]
    command += ["--source_weights", '{"human": 3, "photo": 1}', "--balance", "artifacts", "--hold_out", "0.25"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "5 rows of the training data are held out" in printed and "15 images to train on" in printed
    assert "photo / no artifacts: 6 rows, 4 draws an epoch (26.7 %), each row 0.667 times" in printed
    assert "Evaluation, of the detector that is saved" in printed and "photographs" in printed
    out = folder / "out"
    assert {"checkpoint-1", "checkpoint-2", "model.safetensors", "training.json", "worst_cases"} <= {
        p.name for p in out.iterdir()
    }
    card = (out / "README.md").read_text()
    assert "| human | 9 |" in card and "| photo | 6 |" in card and "## Figures" in card
    found = pipeline("artifact-detection", model=str(out))(squares(1)[0]["image"])
    assert found["artifact_map"].size == (32, 32)
    assert json.loads((out / "training.json").read_text())["args"]["ema_decay"] == 0.999  # of the default recipe


def test_it_resumes_and_starts_from_random_weights(folder, capsys):
    command = [
        "train-detector",
        *RUN.replace("--model start", "--model b0 --image_size 32").split(),
        "--train_dataset",
        "annotated",
    ]
    command += ["--hold_out", "0.5", "--eval_strategy", "no", "--load_best_model_at_end", "false"]
    assert main(command) == 0
    assert "`--loss bce_dice` does" in capsys.readouterr().out
    assert main([*command, "--max_steps", "3", "--resume_from_checkpoint", "true"]) == 0
    assert (folder / "out/checkpoint-3").is_dir()
    config = json.loads((folder / "out/config.json").read_text())
    assert config["image_size"] == 32 and config["hidden_sizes"] == [32, 64, 160, 256]
    assert train_detector.ARCHITECTURES["b0"]["depths"] == config["depths"]


@pytest.mark.slow
def test_the_example_under_accelerate_in_two_processes(folder):
    paths = os.pathsep.join([str(ROOT / "tests"), *sys.path])
    environment = os.environ | {
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(folder / "home"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    # what `accelerate launch` calls on GPUs; on CPUs it would ask for MPI
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "examples/train_detector.py"), *RUN.split(), "--config", "small"]
    command += ["--train_dataset", "annotated", "photos", "--hold_out", "0.25", "--per_device_train_batch_size", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("held out for evaluation") == done.stdout.count("of the detector that is saved") == 1
    assert json.loads((folder / "out/training.json").read_text())["processes"] == 2
