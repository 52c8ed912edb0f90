# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor treat`: its arguments and recipes, what it reads, and the miniature from its parts to the report."""

import json
import re
from functools import partial

import pytest
import yaml
from fixtures.trainer import tiny_detector

from diffdoctor import main
from diffusers_diffdoctor import PixelRewardConfig, miniature
from diffusers_diffdoctor.cli import treat
from diffusers_diffdoctor.cli.training import Parser
from diffusers_diffdoctor.cli.treat import ScriptArguments, parse, read_inputs, read_prompts
from diffusers_diffdoctor.miniature.renderer import CATEGORIES, PLAIN_CATEGORIES, PRONE_CATEGORIES
from diffusers_diffdoctor.treatment import TreatmentConfig


# --- arguments ---------------------------------------------------------------------------------------------------------------


def test_help_groups_paper_release_and_ours(capsys):
    with pytest.raises(SystemExit) as end:
        main(["treat", "--help"])
    assert end.value.code == 0
    _, *sections = re.split(r"^(\S.*):$", capsys.readouterr().out, flags=re.M)
    flags = {title: set(re.findall(r"^  --(\w+)", text, re.M)) for title, text in zip(sections[::2], sections[1::2])}
    titles = Parser.GROUPS | {"run": "what to treat, and the report"}
    run, paper, release, ours, theirs = [flags[title] for title in titles.values()]
    assert {"pipeline", "detector", "judge", "prompts", "report_images"} <= run
    assert paper == {
        "learning_rate",
        "num_inference_steps",
        "gradient_fraction",
        "gradient_placement",
        "pixel_selection",
        "pixel_threshold",
        "offline_weight",
        "lora_rank",
        "lora_target_modules",
    }
    assert release == {"per_device_train_batch_size"}
    assert {"drift_weight", "ema_decay", "eval_seed", "lr_scheduler_type"} <= ours
    assert {"optim", "seed", "max_steps", "push_to_hub"} <= theirs and "config" in flags["options"]
    assert set(PixelRewardConfig.__annotations__) | set(TreatmentConfig.__annotations__) <= paper | release | ours


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lora_rnak", "8"], "there is no argument --lora_rnak, did you mean --lora_rank?"),
        (["--output=x"], "there is no argument --output, did you mean --output_dir?"),
        (["--qqqq"], "there is no argument --qqqq."),
        (["prompts.txt"], "there is no argument prompts.txt, did you mean --prompts?"),
        (["--config"], "--config needs a file or the name of a recipe"),
    ],
)
def test_what_is_no_argument_is_refused(argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(["treat", *argv])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_what_is_no_key_of_a_recipe_is_refused(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("learning_rte: 1.0e-5\n")
    with pytest.raises(SystemExit):
        main(["treat", "--config", str(tmp_path / "a.yaml")])
    assert "there is no argument --learning_rte, did you mean --learning_rate?" in capsys.readouterr().err
    (tmp_path / "a.yaml").write_text("a: [\n")
    for name, message in (
        ("sdlx", "neither a file nor a recipe of the package: flux_schnell,"),
        (str(tmp_path / "a.yaml"), "a.yaml"),
    ):
        with pytest.raises(SystemExit, match=re.escape(message)):
            main(["treat", "--config", name])


@pytest.mark.parametrize(
    ("name", "pipeline", "steps", "window"),
    [
        ("flux_schnell", "black-forest-labs/FLUX.1-schnell", 4, 1),
        ("sdxl", "stabilityai/stable-diffusion-xl-base-1.0", 20, 5),
        ("kolors", "Kwai-Kolors/Kolors-diffusers", 20, 5),
    ],
)
def test_recipes_have_the_papers_values(name, pipeline, steps, window, tmp_path):
    for argv, recipe in ((["--config", name], None), ([f"--config={name}"], None), ([], name)):
        script, args = parse([*argv, "--output_dir", str(tmp_path)], recipe=recipe)
        assert script.pipeline == pipeline and args.num_inference_steps == steps
        assert args.num_inference_steps * args.gradient_fraction == window
        assert (args.lora_rank, args.learning_rate, args.offline_weight) == (16, 1e-4, 0.25)
        assert (args.pixel_selection, args.pixel_threshold, args.pixel_weight) == ("threshold", 0.1, 1.0)
        assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 4


@pytest.mark.parametrize("name", treat.recipes())
def test_recipes_say_where_each_value_comes_from(name):
    text = treat.recipes()[name].read_text()
    marked = {"paper", "release", "ours", "release's"}
    told = [line for line in text.splitlines() if re.match(r"\w+:", line) and name != "miniature"]
    whole = {"pipeline", "eval_strategy", "eval_steps", "eval_num_images", "logging_steps", "save_strategy"}
    whole |= {"save_steps", "save_total_limit"}  # under one heading that says "ours"
    for line in told:
        assert line.split(":")[0] in whole or marked & set(re.findall(r"[\w']+", line.partition("#")[2])), line
    assert set(yaml.safe_load(text)) <= {*ScriptArguments.__annotations__, *PixelRewardConfig.__dataclass_fields__}


def test_flags_win_over_the_recipe_and_that_over_the_defaults(tmp_path):
    (tmp_path / "a.yaml").write_text("lora_rank: 4\nmax_steps: 7\n")
    argv = ["--output_dir", str(tmp_path), "--config", str(tmp_path / "a.yaml"), "--max_steps", "3"]
    script, args = parse(argv, pipeline="a/b", recipe="sdxl")
    assert (script.pipeline, args.lora_rank, args.max_steps, args.num_inference_steps) == ("a/b", 4, 3, 4)
    assert parse([*argv, "--pipeline", "c/d"], pipeline="a/b")[0].pipeline == "c/d"


def test_the_miniature_brings_its_own_recipe(tmp_path):
    for argv in (["--pipeline", "miniature"], ["--pipeline=miniature"]):
        script, args = parse([*argv, "--output_dir", str(tmp_path)], "a/b", "sdxl")
        assert script.pipeline == "miniature" and args.drift_weight == 5.0


# --- what a run needs --------------------------------------------------------------------------------------------------------


def test_prompts_come_with_the_package_and_are_held_out():
    prompts, held_out = read_prompts(ScriptArguments())
    assert len(prompts) == 72 and len(held_out) == 8
    assert not set(prompts["prompt"]) & set(held_out["prompt"])


def test_repeated_prompts_are_counted_and_never_in_both(tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(["a hand"] * 10 + [f"prompt {i}" for i in range(10)] + ["a hand"] * 11))
    said = []
    prompts, held_out = read_prompts(ScriptArguments(prompts=str(tmp_path / "p.txt")), said.append)
    assert sorted([*prompts["prompt"], *held_out["prompt"]]) == ["a hand", *(f"prompt {i}" for i in range(10))]
    assert said == ["`--prompts`: 20 rows repeat another's prompt and are left out; 11 are left."]
    (tmp_path / "e.csv").write_text("prompt\na hand\na foot\n")
    script = ScriptArguments(prompts=str(tmp_path / "p.txt"), eval_prompts=str(tmp_path / "e.csv"))
    prompts, held_out = read_prompts(script, said.append)
    assert len(prompts) == 11 and len(held_out) == 2
    assert "1 of its prompts are also trained on" in said[-1]


def test_what_is_named_replaces_the_miniatures_own(tmp_path):
    tiny_detector(5).save_pretrained(tmp_path / "detector")
    (tmp_path / "p.txt").write_text("a red hand\na red cup\n")
    inputs = read_inputs(
        ScriptArguments(
            pipeline="miniature",
            detector=str(tmp_path / "detector"),
            judge=str(tmp_path / "detector"),
            prompts=str(tmp_path / "p.txt"),
        )
    )
    assert inputs.detector.config.image_size == inputs.judge.config.image_size == 32
    assert inputs.judge_error_rates is None and inputs.report_prompts is None
    assert inputs.prompts["prompt"][:] == ["a red cup"] and inputs.eval_prompts["prompt"][:] == ["a red hand"]


@pytest.mark.parametrize("split", ["final", "development"])
def test_the_miniature_trains_evaluates_and_reports_on_its_splits(split, monkeypatch):
    monkeypatch.setattr(miniature, "regularization_dataset", partial(miniature.regularization_dataset, 8))
    inputs = read_inputs(ScriptArguments(pipeline="miniature", split=split))
    texts = {
        name: {row["prompt"] for row in miniature.prompts(name, PRONE_CATEGORIES)}
        for name in ("train", "development", "final")
    }
    assert set(inputs.prompts["prompt"]) == texts["train"] and len(texts["train"]) == 144
    assert set(inputs.eval_prompts["prompt"]) == texts["development"]
    assert set(inputs.report_prompts["prompt"]) == texts[split]
    assert {row["category"] for row in inputs.plain_prompts} == set(PLAIN_CATEGORIES)
    assert set(inputs.plain_prompts["prompt"]) <= {row["prompt"] for row in miniature.prompts(split)}
    assert set(inputs.regularization["prompt"]) <= {row["prompt"] for row in miniature.prompts("train")}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            "--prompts no.txt --detector detector",
            "error: `--prompts no.txt`: there is no file 'no.txt' to read prompts from",
        ),
        ("--detector nowhere/", "error: `--detector nowhere/` is no folder here"),
        ("--detector detector --judge photos", "error: `--judge photos` is a folder with no config.json"),
        ("--pipeline miniature --split test", "error: `--split` is 'test', but must be final or development"),
        ("--split development", "error: `--split development` is of `--pipeline miniature`"),
        ("--lora_rank 0", "error: `lora_rank` is 0, but must be at least 1"),
        (
            "--detector detector --regularization_dataset photos",
            "error: `--regularization_dataset photos`: 'photos' is",
        ),
    ],
)
def test_what_cannot_be_read_is_one_line(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_detector().save_pretrained("detector")
    (tmp_path / "photos").mkdir()
    with pytest.raises(SystemExit) as end:
        main(["treat", *argv.split(), "--output_dir", "out"])
    assert str(end.value.code).startswith(message)


def test_a_miniature_without_its_parts_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr(miniature, "WEIGHTS", tmp_path)
    with pytest.raises(SystemExit, match=r"error: The miniature's .* Build it: diffdoctor miniature build"):
        main(["treat", "--pipeline", "miniature", "--output_dir", str(tmp_path / "out")])


# --- the miniature -----------------------------------------------------------------------------------------------------------


def test_the_miniature_from_its_parts_to_the_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(miniature, "regularization_dataset", partial(miniature.regularization_dataset, 8))
    every = miniature.prompts
    monkeypatch.setattr(miniature, "prompts", lambda *split: every(*split)[::5])
    argv = ["--pipeline", "miniature", "--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--use_cpu"]
    argv += ["--per_device_train_batch_size", "2", "--num_inference_steps", "2", "--report_images", "18"]
    assert main(["treat", *argv]) == 0

    report = json.loads((tmp_path / "out/report.json").read_text())
    assert set(report["categories"]) == set(CATEGORIES)
    prone = [image["category"] for image in report["images"]]
    assert len(prone) == 18 and set(prone) == set(PRONE_CATEGORIES)  # the plain ones count in no frequency
    final = {row["prompt"] for row in every("final")}
    assert {image["prompt"] for image in report["images"]} <= final
    assert [image["seed"] for image in report["images"]] == [1_000_000 + i for i in range(18)]
    for name in ("judge", "detector"):
        assert 0 <= report["artifact_frequency"][name]["after"] <= 1
    for figure in ("fidelity", "diversity"):
        assert report[figure]["before"] > 0 and report[figure]["after"] > 0
    assert set(report["change"]) >= {"inside", "outside"}
    assert report["judge_error_rates"] == json.loads((miniature.load("judge") / "error_rates.json").read_text())
    printed = capsys.readouterr().out
    assert "The judge's own errors: on scenes (true positive rate" in printed and "load_lora_weights" in printed
    assert (tmp_path / "out/report.png").exists() and (tmp_path / "out/curves.png").exists()
