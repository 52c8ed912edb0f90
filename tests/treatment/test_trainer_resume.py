# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""A resumed run does what its arguments say, at the checkpoint's position; what cannot be both is refused."""

import json
import math

import pytest
import torch
from fixtures.pipelines import tiny_flux
from fixtures.trainer import HELD_OUT, PROMPTS, assert_same, lora_of, rows, tiny_trainer
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from diffusers_diffdoctor.training import trainer as resuming


SAVED = {"save_strategy": "steps", "save_steps": 1}
PLAIN = {"regularization_dataset": None}


class Watch(TrainerCallback):
    """The optimizer's groups and the LoRA before the first update."""

    def __init__(self):
        self.groups, self.lora = None, None

    def on_pre_optimizer_step(self, args, state, control, optimizer, model, **kwargs):
        if self.groups is None:
            self.groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.lora = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def first_run(folder, **changes):
    trainer = tiny_trainer(folder, parts=PLAIN, **SAVED | {"max_steps": 2} | changes)
    trainer.train()
    return trainer


def resumed(folder, parts=None, **changes):
    watch = Watch()
    trainer = tiny_trainer(folder, parts=PLAIN | {"callbacks": [watch]} | (parts or {}), **SAVED | changes)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    return trainer, watch


def rates(trainer):
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_bnb_8bit"])
def test_the_learning_rate_is_that_of_the_arguments_from_the_first_step(tmp_path, optim):
    first_run(tmp_path, learning_rate=1e-2, optim=optim)
    trainer, watch = resumed(tmp_path, learning_rate=1e-4, max_steps=4, optim=optim)
    assert {group["lr"] for group in watch.groups} == {1e-4}
    assert rates(trainer)[2:] == [1e-4, 1e-4]
    before = load_file(tmp_path / "checkpoint-2/pytorch_lora_weights.safetensors")
    after = load_file(tmp_path / "checkpoint-3/pytorch_lora_weights.safetensors")
    assert 0 < max((after[name] - before[name]).abs().max() for name in after) < 1e-3  # Adam moves by its rate


def test_the_schedule_is_that_of_the_arguments_at_the_position_of_the_checkpoint(tmp_path):
    """Cosine of the arguments' length and rate, written by hand; the update of step n has the rate of position n - 1."""
    first_run(tmp_path, learning_rate=1e-2, lr_scheduler_type="cosine")
    trainer, watch = resumed(tmp_path, learning_rate=1e-3, lr_scheduler_type="cosine", max_steps=5)
    expected = [1e-3 * 0.5 * (1 + math.cos(math.pi * position / 5)) for position in (2, 3, 4, 5)]
    assert watch.groups[0]["lr"] == pytest.approx(expected[0])
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(expected[3], abs=1e-9)
    first_run(tmp_path / "other", learning_rate=1e-2, lr_scheduler_type="constant")
    _, watch = resumed(tmp_path / "other", learning_rate=1e-2, lr_scheduler_type="linear", max_steps=4)
    assert watch.groups[0]["lr"] == pytest.approx(1e-2 * 2 / 4)


def test_other_settings_of_the_optimizer_are_those_of_the_arguments(tmp_path):
    first_run(tmp_path)
    _, watch = resumed(tmp_path, max_steps=3, weight_decay=0.3, adam_beta1=0.5, adam_epsilon=1e-6)
    assert (watch.groups[0]["weight_decay"], tuple(watch.groups[0]["betas"]), watch.groups[0]["eps"]) == (
        0.3,
        (0.5, 0.999),
        1e-6,
    )


def test_the_optimizers_memory_is_kept_when_the_rate_changes(tmp_path):
    """Adam's moments after the resumed step come from those of the checkpoint, whatever the rate."""
    first_run(tmp_path)
    same, _ = resumed(tmp_path, max_steps=3)
    other, _ = resumed(tmp_path, max_steps=3, learning_rate=1e-5)
    for one, two in zip(same.optimizer.state_dict()["state"].values(), other.optimizer.state_dict()["state"].values()):
        assert one["step"] == two["step"] == 3 and torch.equal(one["exp_avg"], two["exp_avg"])


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"optim": "adamw_bnb_8bit"},
            r"`optim` asks for bitsandbytes.* holds the state of torch\.optim\.adamw\.AdamW\.",
        ),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau"},
            "`lr_scheduler_type` asks for ReduceLROnPlateau, but .* LambdaLR",
        ),
    ],
    ids=["optimizer", "schedule"],
)
def test_the_state_of_another_optimizer_or_schedule_is_refused(tmp_path, changes, message):
    first_run(tmp_path)
    evaluated = {"eval_strategy": "steps", "eval_steps": 1}
    with pytest.raises(ValueError, match=message):
        resumed(tmp_path, {"eval_dataset": rows(HELD_OUT)}, max_steps=3, **evaluated, **changes)


def test_a_rate_that_follows_from_the_run_cannot_be_changed(tmp_path):
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "lr_scheduler_type": "reduce_lr_on_plateau"}
    parts = PLAIN | {"eval_dataset": rows(HELD_OUT)}
    tiny_trainer(tmp_path, parts=parts, **SAVED, **evaluated).train()
    resumed(tmp_path, parts, max_steps=3, **evaluated)
    with pytest.raises(
        ValueError, match=r"`learning_rate` is 0\.5 .* trained with 0\.01 .* follows from the run so far"
    ):
        resumed(tmp_path, parts, max_steps=3, learning_rate=0.5, **evaluated)


@pytest.mark.parametrize(
    "adapter, message",
    [
        ({"lora_alpha": 4}, "has lora_alpha 2, here 4: its weights would draw other images"),
        ({"use_rslora": True}, "has use_rslora False, here True"),
        ({"alpha_pattern": {"to_q": 8}}, r"has alpha_pattern \{\}, here \{'to_q': 8\}"),
        ({"r": 4, "lora_alpha": 4}, "has lora_alpha 2, here 4; r 2, here 4"),
    ],
    ids=["alpha", "rslora", "alpha-pattern", "rank"],
)
def test_an_adapter_that_draws_otherwise_is_refused(tmp_path, adapter, message):
    first_run(tmp_path)
    values = {"r": 2, "lora_alpha": 2, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
    with pytest.raises(ValueError, match=message):
        resumed(tmp_path, {"peft_config": LoraConfig(**values | adapter)}, max_steps=3)


def test_dropout_may_change(tmp_path):
    first_run(tmp_path)
    trainer, _ = resumed(tmp_path, max_steps=3, lora_dropout=0.5)
    assert trainer.state.global_step == 3


# --- the batch -------------------------------------------------------------------------------------------------------------------


def seen_by(trainer):
    seen, original = [], trainer.compute_loss

    def compute_loss(model, inputs, *arguments, **keywords):
        seen.append((tuple(inputs["prompt"]), tuple(inputs["position"])))
        return original(model, inputs, *arguments, **keywords)

    trainer.compute_loss = compute_loss
    return seen


def test_another_division_of_the_batch_sees_the_same_prompts_and_noise(tmp_path):
    whole = tiny_trainer(tmp_path / "whole", parts=PLAIN, per_device_train_batch_size=4, max_steps=3)
    expected = seen_by(whole)
    whole.train()
    first_run(tmp_path, per_device_train_batch_size=4)
    divided = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = tiny_trainer(tmp_path, parts=PLAIN, max_steps=3, **divided)
    seen = seen_by(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [len(prompts) for prompts, _ in seen] == [2, 2]
    assert (seen[0][0] + seen[1][0], seen[0][1] + seen[1][1]) == expected[2]


def test_another_batch_is_refused_unless_the_position_is_given_up(tmp_path):
    first_run(tmp_path, per_device_train_batch_size=4)
    with pytest.raises(ValueError, match=r"with 4 samples per update, but .* is 2: .*`ignore_data_skip=True`"):
        resumed(tmp_path, max_steps=3, per_device_train_batch_size=2)
    trainer = tiny_trainer(tmp_path, parts=PLAIN, max_steps=3, per_device_train_batch_size=2, ignore_data_skip=True)
    seen = seen_by(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [len(prompts) for prompts, _ in seen] == [2]


# --- the average -----------------------------------------------------------------------------------------------------------------


def test_without_an_average_the_trained_weights_go_on(tmp_path):
    """The LoRA of a checkpoint with an average is the average; what was trained lies beside it."""
    first_run(tmp_path, ema_decay=0.999)
    live = load_file(tmp_path / "checkpoint-2/live_lora_weights.safetensors")
    average = load_file(tmp_path / "checkpoint-2/pytorch_lora_weights.safetensors")
    assert any(not torch.equal(live[name], average[name]) for name in live)
    _, watch = resumed(tmp_path, max_steps=3)
    found = {name.replace(".default", "").split("denoiser.")[-1]: value for name, value in watch.lora.items()}
    assert_same({name.removeprefix("transformer."): value for name, value in live.items()}, found)


def test_an_average_that_begins_later_begins_with_the_trained_weights(tmp_path):
    first_run(tmp_path)
    trainer, _ = resumed(tmp_path, max_steps=3, ema_decay=0.9)
    assert trainer.average.optimization_step == 1
    for value, parameter in zip(trainer.average.shadow_params, trainer.trained_parameters):
        torch.testing.assert_close(
            value, parameter.detach()
        )  # the first update replaces, as in every run with an average


# --- what cannot be continued, and what is only said -----------------------------------------------------------------------------


def test_weights_alone_are_no_checkpoint_to_resume(tmp_path):
    first_run(tmp_path, save_only_model=True)
    with pytest.raises(
        ValueError, match=r"has no optimizer\.pt and no scheduler\.pt \(`save_only_model`\).*fuse_lora"
    ):
        resumed(tmp_path, max_steps=3)
    finished = tiny_trainer(tmp_path, parts=PLAIN, max_steps=2)
    with pytest.raises(ValueError, match="save_only_model"):
        finished.train(resume_from_checkpoint=True)


def test_intervals_are_those_of_the_arguments(tmp_path):
    first_run(tmp_path, max_steps=2, logging_steps=2)
    resumed(tmp_path, max_steps=6, logging_steps=1, save_steps=3)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (1, 2, 3, 6)}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 3, 4, 5, 6]


def test_the_best_by_another_metric_is_looked_for_anew(tmp_path):
    common = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    parts = PLAIN | {"eval_dataset": rows(HELD_OUT), "compute_metrics": lambda images, prompts: {"tiny": 1e-9}}
    tiny_trainer(
        tmp_path, parts=parts, **SAVED, **common, metric_for_best_model="tiny", greater_is_better=False
    ).train()
    trainer, _ = resumed(tmp_path, parts, max_steps=3, **common, metric_for_best_model="max_confidence")
    assert trainer.state.best_metric > 1e-3
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")


def test_what_differs_is_said(tmp_path, monkeypatch):
    first_run(tmp_path)
    said = []
    monkeypatch.setattr(resuming.logger, "warning", said.append)
    resumed(tmp_path, max_steps=2 + 1, pixel_selection="max", seed=7)
    (line,) = [line for line in said if line.startswith("Resuming otherwise")]
    for difference in ("pixel_selection: 'threshold' -> 'max'", "seed: 42 -> 7", "max_steps: 2 -> 3"):
        assert difference in line
    assert "output_dir" not in line and "learning_rate" not in line
    said.clear()
    resumed(tmp_path, {"train_dataset": rows(PROMPTS[:-1])}, max_steps=3)
    assert "prompts: {'count': 8" in "".join(said)
    said.clear()
    first_run(tmp_path / "same", max_steps=3)
    tiny_trainer(tmp_path / "same", parts=PLAIN, **SAVED | {"max_steps": 3}).train(
        resume_from_checkpoint=str(tmp_path / "same/checkpoint-2")
    )
    assert not [line for line in said if line.startswith("Resuming otherwise")]


def test_a_run_in_float16_goes_on_in_float32(tmp_path):
    """As the message about a loss that is not finite advises. The scaler's state has nothing to act on."""
    tiny_flux().save_pretrained(tmp_path / "base")
    parts = {"pipeline": str(tmp_path / "base")}
    tiny_trainer(tmp_path, parts=PLAIN | parts, **SAVED).train()
    torch.save({"scale": 65536.0}, tmp_path / "checkpoint-2/scaler.pt")
    trainer, _ = resumed(tmp_path, parts, max_steps=3)
    assert trainer.state.global_step == 3 and lora_of(trainer)
