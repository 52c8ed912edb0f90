# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The configuration: the paper's defaults, early and clear refusals, command lines and recipes."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
from transformers import TrainingArguments
from trl import TrlParser

from diffusers_diffdoctor import PixelRewardConfig
from diffusers_diffdoctor.treatment import TreatmentConfig


OWN_FIELDS = {field.name for field in dataclasses.fields(PixelRewardConfig)} - {
    field.name for field in dataclasses.fields(TrainingArguments)
}


def test_defaults_are_the_papers(tmp_path):
    args = PixelRewardConfig(str(tmp_path))
    assert (args.num_inference_steps, args.gradient_fraction) == (4, 0.25)
    assert (args.pixel_selection, args.pixel_threshold, args.pixel_weight) == ("threshold", 0.1, 1.0)
    assert (args.offline_weight, args.lora_rank, args.learning_rate) == (0.25, 16, 1e-4)
    assert args.lora_alpha == args.lora_rank
    assert args.offline_batch_size == args.per_device_train_batch_size
    assert args.report_to == []


def test_everything_runs_on_a_cpu_by_default(tmp_path):
    args = PixelRewardConfig(str(tmp_path), use_cpu=True)
    assert args.bf16 is False and args.mixed_precision == "no" and args.pipeline_dtype == "float32"
    assert PixelRewardConfig(str(tmp_path), use_cpu=True, bf16=True).pipeline_dtype == "bfloat16"


def test_every_field_is_documented():
    text = inspect.getdoc(TreatmentConfig) + inspect.getdoc(PixelRewardConfig)
    lists = re.findall(r"^ {4}(\w[\w, ]*) \(`", text, re.M)
    documented = {name for names in lists for name in names.split(", ")}
    of_runs = {"overwrite_output_dir", "stop_grace", "push_timeout"}  # documented by `RunArguments`
    assert documented == OWN_FIELDS - of_runs | {"gradient_checkpointing"}
    for field in dataclasses.fields(PixelRewardConfig):
        assert field.metadata.get("help"), field.name


@pytest.mark.parametrize(
    "values, message",
    [
        ({"gradient_fraction": 0.0}, "`gradient_fraction` is 0.0.*nothing would be learnt"),
        ({"gradient_fraction": 1.5}, "`gradient_fraction` is 1.5"),
        ({"gradient_placement": "first"}, "`gradient_placement` is 'first', but must be one of"),
        (
            {"gradient_placement": "sparse", "gradient_placement_kwargs": "{"},
            "`gradient_placement_kwargs` is .*not JSON",
        ),
        ({"gradient_placement_kwargs": {"steps": 2}}, "which 'last' does not take"),
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0, but must be at least 1"),
        ({"pixel_selection": "median"}, "`pixel_selection` is 'median', but must be one of"),
        ({"pixel_threshold": 1.0}, "`pixel_threshold` is 1.0"),
        ({"pixel_weight": -1.0}, "`pixel_weight` is -1.0"),
        ({"offline_weight": float("nan")}, "`offline_weight` is nan"),
        ({"pixel_weight": 0.0, "offline_weight": 0.0}, "both 0"),
        ({"reward_weights": [1.0, -2.0]}, "`reward_weights`"),
        ({"reward_weights": []}, "`reward_weights`"),
        ({"lora_rank": 0}, "`lora_rank` is 0"),
        ({"lora_target_modules": []}, "`lora_target_modules`"),
        ({"lora_dropout": 1.0}, "`lora_dropout` is 1.0"),
        ({"ema_decay": 1.0}, "`ema_decay` is 1.0"),
        ({"height": 0}, "`height` is 0"),
        ({"eval_num_images": 0}, "`eval_num_images` is 0"),
        ({"log_images": -1}, "`log_images` is -1"),
        ({"pipeline_dtype": "int8"}, "`pipeline_dtype` is 'int8'"),
        ({"pipeline_kwargs": "{negative"}, "`pipeline_kwargs`.*not JSON"),
        ({"pipeline_kwargs": "[1]"}, "`pipeline_kwargs`.*must be a dictionary"),
    ],
)
def test_values_that_cannot_work_are_refused(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        PixelRewardConfig(str(tmp_path), **values)


def test_an_output_folder_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(ValueError, match=r"`output_dir` is .*taken' is a file"):
        PixelRewardConfig(str(tmp_path / "taken" / "run"))
    if Path("/proc").is_dir():  # Linux: takes no file, from root neither
        with pytest.raises(ValueError, match=r"`output_dir` is '/proc/run', but '/proc' cannot be written"):
            PixelRewardConfig("/proc/run")
    PixelRewardConfig(str(tmp_path / "new" / "run"))
    assert not (tmp_path / "new").exists()  # a configuration touches nothing


def test_resolution_is_short_for_both_sides(tmp_path):
    args = PixelRewardConfig(str(tmp_path), resolution=64)
    assert (args.height, args.width) == (64, 64)
    assert PixelRewardConfig(str(tmp_path), resolution=64, width=32).width == 32


@pytest.mark.parametrize("wanted", [True, False])
def test_gradient_checkpointing_under_its_old_and_new_name(tmp_path, wanted, recwarn):
    assert PixelRewardConfig(str(tmp_path)).gradient_checkpointing is True
    args = PixelRewardConfig(str(tmp_path), gradient_checkpointing=wanted)
    assert args.gradient_checkpointing is wanted
    assert dataclasses.replace(args, seed=1).gradient_checkpointing is wanted
    if hasattr(TrainingArguments, "activation_checkpointing"):  # since transformers 5.22: where the parent looks
        assert args.activation_checkpointing is wanted
        assert PixelRewardConfig(str(tmp_path), activation_checkpointing=wanted).gradient_checkpointing is wanted
    assert not [warning for warning in recwarn if "gradient_checkpointing" in str(warning.message)]


@pytest.mark.parametrize(
    "metric, greater", [(None, False), ("judge_artifact_frequency", False), ("eval_reward", True), ("clip", True)]
)
def test_the_best_model_has_the_fewest_artifacts(tmp_path, metric, greater):
    args = PixelRewardConfig(
        str(tmp_path),
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
    )
    assert args.metric_for_best_model == (metric or "artifact_frequency")
    assert args.greater_is_better is greater


def test_command_line_and_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "gradient_fraction: 0.5\nlora_target_modules: [to_q, to_k]\nlearning_rate: 2.0e-4\n"
    )
    flags = ["--config", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path), "--learning_rate", "3e-4"]
    flags += ["--pipeline_kwargs", '{"negative_prompt": "blur"}', "--optim", "adamw_bnb_8bit", "--bf16", "False"]
    (args,) = TrlParser((PixelRewardConfig,)).parse_args_and_config(flags)
    assert (args.gradient_fraction, args.lora_target_modules, args.learning_rate) == (0.5, ["to_q", "to_k"], 3e-4)
    assert args.pipeline_kwargs == {"negative_prompt": "blur"} and args.bf16 is False
    assert args.optim == "adamw_bnb_8bit"
