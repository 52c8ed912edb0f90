# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Guards: what they measure by hand, when they raise an alarm, and that what follows is the same after a resume."""

import json
import math

import pytest
import torch
from datasets import Dataset
from fixtures.pipelines import tiny_flux
from fixtures.runs import state_of
from fixtures.trainer import (
    HELD_OUT,
    assert_same,
    lora_of,
    rows,
    tiny_args,
    tiny_detector,
    tiny_trainer,
)
from transformers import TrainerCallback

from diffusers_diffdoctor import ArtifactDetectorForSemanticSegmentation, PixelRewardTrainer, miniature
from diffusers_diffdoctor.evaluation import spectral_growth
from diffusers_diffdoctor.miniature.judge import MiniatureJudge
from diffusers_diffdoctor.miniature.renderer import PRONE_CATEGORIES
from diffusers_diffdoctor.rewards import ArtifactReward
from diffusers_diffdoctor.treatment.examine import write_training_report
from diffusers_diffdoctor.treatment.guards import Guards, Untreated, seed_diversity


EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 4, "eval_num_images": 4}


def darkness(images, prompts):
    return 1 - images.mean(dim=(1, 2, 3))


def brightness(images, prompts):
    return {"brightness": images.mean().item()}


def darkening(folder, **changes):
    """A run whose reward drives down what its fidelity is: brightness."""
    parts = {
        "reward_funcs": darkness,
        "regularization_dataset": None,
        "eval_dataset": rows(HELD_OUT),
        "compute_metrics": brightness,
    }
    values = {"fidelity_metric": "brightness", "fidelity_alarm": 0.001, "learning_rate": 0.25, "max_steps": 8}
    return tiny_trainer(folder, tiny_flux(), parts, **EVERY_STEP | values | changes)


def logged(trainer, key):
    return {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}


def test_figures_are_those_of_the_images(tmp_path):
    trainer = tiny_trainer(
        tmp_path, parts={"eval_dataset": rows(HELD_OUT[:2])}, **EVERY_STEP, eval_seeds_per_prompt=2, learning_rate=0.1
    )
    trainer.train()
    prompts = [HELD_OUT[0]] * 2 + [HELD_OUT[1]] * 2
    before, after = (trainer.generate(prompts, [1234, 1235, 1236, 1237], treated) for treated in (False, True))
    assert logged(trainer, "eval_spectral_growth")[4] == pytest.approx(spectral_growth(before, after), abs=1e-3)
    for step, images in ((0, before), (4, after)):
        small = torch.nn.functional.interpolate(images, (16, 16), mode="area")
        pairs = [(small[i] - small[i + 1]).square().mean().sqrt().item() for i in (0, 2)]
        assert logged(trainer, "eval_diversity")[step] == pytest.approx(sum(pairs) / 2, rel=1e-4)


def test_diversity_needs_two_images_of_a_prompt():
    images = torch.rand(3, 3, 32, 32)
    assert seed_diversity(images, ["a", "b", "c"]) is None
    assert seed_diversity(images[:1].expand(2, -1, -1, -1), ["a", "a"]) == pytest.approx(0, abs=1e-6)


def test_an_alarm_is_logged_and_reported_and_by_default_changes_nothing(tmp_path):
    trainer = darkening(tmp_path / "watched")
    trainer.train()
    values, limits = logged(trainer, "alarm/brightness"), logged(trainer, "alarm/brightness/limit")
    untreated = logged(trainer, "eval_brightness")[0]
    fallen = {step: x for step, x in logged(trainer, "eval_brightness").items() if x < 0.999 * untreated}
    assert values == fallen and fallen and list(limits.values()) == [pytest.approx(0.999 * untreated)] * len(fallen)
    lines = [json.loads(line) for line in (tmp_path / "watched/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "alarm/brightness" in line] == sorted(fallen)
    html = write_training_report(tmp_path, trainer.state.log_history, "Run").read_text()
    assert "Alarms" in html and "brightness" in html and f"{values[max(values)]:.4g}" in html
    unwatched = darkening(tmp_path / "unwatched", fidelity_metric=None)
    unwatched.train()
    assert not [key for entry in unwatched.state.log_history for key in entry if key.startswith("alarm")]
    assert_same(lora_of(trainer), lora_of(unwatched))


class Weights(TrainerCallback):
    """The LoRA as it was evaluated, and as the next step found it."""

    def __init__(self):
        self.after_step, self.before_step = {}, {}

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.after_step[state.global_step] = self.of(model)

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.before_step[state.global_step] = self.of(model)

    def on_step_end(self, args, state, control, model, **kwargs):
        self.after_step[state.global_step] = self.of(model)

    @staticmethod
    def of(model):
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_a_rollback_puts_the_best_weights_back_and_halves_the_rate(tmp_path):
    trainer, seen = darkening(tmp_path, on_alarm="rollback"), Weights()
    trainer.add_callback(seen)
    trainer.train()
    back = logged(trainer, "rollback/step")
    first = min(back)
    assert first < 8 and back[first] < first
    assert_same(seen.before_step[first], seen.after_step[int(back[first])])
    rates = logged(trainer, "learning_rate")
    assert rates[first + 1] == 0.125
    assert rates[8] == 0.25 * 0.5 ** len([step for step in back if step < 8])
    figures = logged(trainer, "eval_brightness")
    good = [step for step in range(first) if step == 0 or step not in back]
    # the figure that decides is the reward here, which is higher the darker
    assert back[first] == min(good, key=lambda step: (figures[step], -step))


def test_stop_ends_the_run_with_the_best_weights(tmp_path):
    trainer, seen = darkening(tmp_path, on_alarm="stop"), Weights()
    trainer.add_callback(seen)
    trainer.train()
    (step,) = logged(trainer, "rollback/step")
    best = int(logged(trainer, "rollback/step")[step])
    assert trainer.state.global_step == step < 8
    assert_same(Weights.of(trainer.model), seen.after_step[best])
    assert trainer.saved_step == best


@pytest.mark.parametrize("average", [0.5, pytest.param(None, marks=pytest.mark.slow)])
def test_what_follows_an_alarm_is_the_same_after_a_resume(tmp_path, average):
    common = {"save_strategy": "steps", "save_steps": 1, "on_alarm": "rollback", "ema_decay": average}
    common |= {"lr_scheduler_type": "cosine", "lora_dropout": 0.2}
    whole = darkening(tmp_path, **common)
    whole.train()
    alarms = sorted(logged(whole, "rollback/step"))
    assert alarms
    expected = state_of(whole)
    for step in {alarms[0] - 1, alarms[0], 7} - {0}:
        again = darkening(tmp_path, **common)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same(state_of(again), expected)
        assert logged(again, "rollback/step") == logged(whole, "rollback/step")
        assert logged(again, "learning_rate") == logged(whole, "learning_rate")


def test_a_checkpoint_that_knows_no_untreated_images_is_continued(tmp_path):
    plain = darkening(tmp_path, eval_strategy="no", save_strategy="steps", save_steps=1, max_steps=1)
    plain.train()
    assert not (tmp_path / "checkpoint-1/guards.safetensors").exists()
    trainer = darkening(tmp_path, max_steps=2, on_alarm="rollback")
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert sorted(logged(trainer, "eval_brightness")) == [2]  # the untreated were measured, but are not of this step
    assert trainer.guards.untreated[""].figures["brightness"] > 0


def test_weights_that_were_taken_back_are_never_the_best(tmp_path):
    """Darkness is what is rewarded, so that the alarmed evaluations have the best figures."""
    common = {
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "reward",
    }
    trainer = darkening(tmp_path, on_alarm="rollback", **common)
    trainer.train()
    assert trainer.state.best_global_step not in logged(trainer, "rollback/step")


def test_the_judge_decides_where_nobody_chose_a_figure(tmp_path):
    common = {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps"}
    parts = {"judge": tiny_detector(seed=7), "eval_dataset": rows(HELD_OUT)}
    judged = tiny_trainer(tmp_path, parts=parts, **common)
    assert judged.args.metric_for_best_model == "judge_artifact_frequency" and not judged.args.greater_is_better
    alone = tiny_trainer(tmp_path, parts={"eval_dataset": rows(HELD_OUT)}, **common)
    assert alone.args.metric_for_best_model == "artifact_frequency"
    chosen = tiny_trainer(tmp_path, parts=parts, metric_for_best_model="reward", **common)
    assert chosen.args.metric_for_best_model == "reward"


def test_the_best_weights_are_those_of_the_best_figure(tmp_path):
    """Of one set, of the mean of several, and never of a figure that is not a number."""
    one, several = (Guards(tiny_args(tmp_path, on_alarm="rollback"), "judge_artifact_frequency") for _ in range(2))
    several.untreated = {"hands": Untreated({}, 1, (16, 16)), "faces": Untreated({}, 1, (16, 16))}
    for step, (first, second) in enumerate([(math.nan, 0.1), (0.3, 0.5), (0.2, 0.4), (0.1, 0.6), (math.nan, 0.0)]):
        weights = [torch.tensor([float(step)])]
        one.consider(step, {"eval_judge_artifact_frequency": first}, weights)
        names = ("eval_hands_judge_artifact_frequency", "eval_faces_judge_artifact_frequency")
        several.consider(step, dict(zip(names, (first, second))), weights)
    assert (one.best.step, one.best.figure, one.best.weights[0].item()) == (3, 0.1, 3.0)
    assert several.best.step == 2 and several.best.figure == pytest.approx(0.3)


def test_a_run_without_gain_stops(tmp_path):
    def constant(images, prompts):
        return {"constant": 1.0}

    parts = {"eval_dataset": rows(HELD_OUT), "compute_metrics": constant}
    common = {"metric_for_best_model": "constant", "early_stopping_patience": 2, "save_strategy": "steps"}
    trainer = tiny_trainer(
        tmp_path, parts=parts, **EVERY_STEP | {"max_steps": 9} | common, load_best_model_at_end=True, save_steps=1
    )
    trainer.train()
    assert trainer.state.global_step == 3  # the first is a gain over nothing


def test_an_image_that_is_clean_enough_gives_no_gradient():
    class Half(torch.nn.Module):
        def confidence(self, images):
            return images[:, :1]

    images = torch.tensor([0.25, 0.35]).view(2, 1, 1, 1).repeat(1, 3, 8, 8).requires_grad_()
    for level, moved in ((0.0, [True, True]), (0.3, [False, True]), (0.4, [False, False])):
        output = ArtifactReward(Half(), clean_level=level)(images)
        torch.testing.assert_close(output.loss, torch.tensor([0.25, 0.35]))  # what is logged stays the penalty
        (gradient,) = torch.autograd.grad(output.loss.sum(), images)
        assert [bool(part.any()) for part in gradient] == moved


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"on_alarm": "panic"}, "`on_alarm` is 'panic', but must be one of"),
        ({"spectral_alarm": -1.0}, "`spectral_alarm` is -1.0, but must be at least 0, or None"),
        ({"diversity_alarm": float("nan")}, "`diversity_alarm` is nan"),
        ({"fidelity_alarm": -0.1}, "`fidelity_alarm` is -0.1, but must be at least 0"),
        ({"pixel_clean_level": 1.0}, r"`pixel_clean_level` is 1.0, but must be in \[0, 1\)"),
        ({"eval_seeds_per_prompt": 0}, "`eval_seeds_per_prompt` is 0, but must be at least 1"),
        ({"early_stopping_patience": 0, "eval_strategy": "steps", "eval_steps": 1}, "`early_stopping_patience` is 0"),
        ({"early_stopping_patience": 2}, "`early_stopping_patience` is 2, but `eval_strategy` is 'no'"),
    ],
)
def test_arguments(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_args(tmp_path, **changes)


def test_a_figure_of_fidelity_that_nothing_measures_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"`fidelity_metric` is 'clip', which no evaluation measures: there are .*eval_brightness"
    ):
        darkening(tmp_path, fidelity_metric="clip").train()


# --- the miniature -----------------------------------------------------------------------------------------------------------


def miniature_run(folder, reward, regularization=None, **changes):
    folders = {part: miniature.load(part) for part in ("pipeline", "judge")}
    prompts = {
        split: Dataset.from_list(miniature.prompts(split, PRONE_CATEGORIES)) for split in ("train", "development")
    }
    values = {
        "resolution": 64,
        "max_sequence_length": 12,
        "learning_rate": 4e-3,
        "lora_rank": 16,
        "lora_target_modules": [
            "to_q",
            "to_k",
            "to_v",
            "to_out.0",
            "proj_mlp",
            "proj_out",
            "ff.net.0.proj",
            "ff.net.2",
        ],
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "eval_num_images": 16,
        "eval_seeds_per_prompt": 2,
        "eval_strategy": "steps",
        "gradient_checkpointing": False,
        "vae_gradient_checkpointing": False,
        "report_to": "none",
        "on_alarm": "rollback",
    }
    trainer = PixelRewardTrainer(
        str(folders["pipeline"]),
        reward,
        tiny_args(folder, **values | changes),
        prompts["train"],
        prompts["development"],
        regularization,
        judge=MiniatureJudge.from_pretrained(folders["judge"]).float().eval(),
    )
    trainer.train()
    return trainer


@pytest.mark.slow
def test_a_reward_that_wants_a_grid_is_found_out_and_rolled_back(tmp_path):
    across = torch.arange(64.0)
    grid = torch.cos(math.pi * across / 2)[:, None] * torch.cos(math.pi * across / 2)  # of 4 pixels

    def hack(images, prompts):
        return 10 * (images.mean(1) * grid).mean((1, 2))

    trainer = miniature_run(tmp_path, hack, max_steps=13, eval_steps=4, logging_steps=1)
    (step,) = logged(trainer, "rollback/step")
    growth = logged(trainer, "eval_spectral_growth")
    assert growth[step] > 3 and logged(trainer, "eval_reward")[step] > 5 * logged(trainer, "eval_reward")[0]
    assert all(growth[earlier] < 3 for earlier in growth if earlier < step)
    rates = logged(trainer, "learning_rate")
    assert rates[step + 1] == rates[step] / 2
    assert logged(trainer, "reward")[step + 1] < 0.2 * logged(trainer, "reward")[step]


@pytest.mark.slow
def test_an_honest_run_raises_no_alarm(tmp_path):
    detector = ArtifactDetectorForSemanticSegmentation.from_pretrained(miniature.load("detector"))
    common = {"gradient_fraction": 0.5, "offline_weight": 1.0, "drift_weight": 5.0, "warmup_steps": 5}
    photos = miniature.regularization_dataset(count=64)
    trainer = miniature_run(tmp_path, detector, photos, max_steps=10, eval_steps=5, **common)
    assert sorted(logged(trainer, "eval_spectral_growth")) == [5, 10]
    assert not [key for entry in trainer.state.log_history for key in entry if key.startswith(("alarm", "rollback"))]
    assert trainer.guards.rollbacks == 0
