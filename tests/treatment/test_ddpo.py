# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Policy gradients: the maths by hand, an update against a loop written by hand, resuming, errors."""

import json
from itertools import chain

import numpy as np
import pytest
import torch
from fixtures.by_hand import BY_HAND
from fixtures.pipelines import PIPELINES
from fixtures.policy import SETTINGS, brightness, tiny_ddpo
from fixtures.runs import state_of
from fixtures.trainer import HELD_OUT, PROMPTS, lora_of, rows, scatter, tiny_detector
from peft import LoraConfig

from diffusers_diffdoctor import miniature
from diffusers_diffdoctor.seeds import derive_seed
from diffusers_diffdoctor.treatment import DDPOConfig
from diffusers_diffdoctor.treatment.ddpo import RolloutOrder
from diffusers_diffdoctor.treatment.policy import ScoreHistory, clipped_objective, group_advantages


# --- the maths ---------------------------------------------------------------------------------------------------------------


def test_advantages_compare_the_images_of_a_prompt():
    scores = torch.tensor([1.0, 5.0, 3.0, 5.0, 7.0])
    found = group_advantages(scores, ["a", "b", "a", "b", "c"])
    torch.testing.assert_close(found, torch.tensor([-1.0, 0.0, 1.0, 0.0, 0.0]), rtol=0, atol=2e-4)


def test_a_history_compares_with_what_a_prompt_scored_before():
    history = ScoreHistory(size=4, minimum=3)
    first = history.advantages(torch.tensor([1.0, 3.0]), ["a", "b"])
    torch.testing.assert_close(first, torch.tensor([-1.0, 1.0]), rtol=0, atol=2e-4)  # too few: with the rollout
    history.advantages(torch.tensor([2.0, 3.0, 4.0]), ["a", "a", "a"])
    found = history.advantages(torch.tensor([5.0, 0.0]), ["a", "b"])
    kept = np.array([2.0, 3.0, 4.0, 5.0])
    assert history.scores == {"a": [2.0, 3.0, 4.0, 5.0], "b": [3.0, 0.0]}
    assert found[0].item() == pytest.approx((5 - kept.mean()) / kept.std(), rel=1e-3)
    assert found[1].item() == pytest.approx(-1.0, rel=1e-3)
    assert ScoreHistory(4, 3, history.scores).scores == history.scores


def test_the_objective_is_cut_where_the_ratio_has_gone_far_enough():
    ratio = torch.tensor([1.3, 1.3, 0.7, 0.7, 1.1], requires_grad=True)
    objective = clipped_objective(ratio, torch.tensor([2.0, -2.0, 2.0, -2.0, 1.0]), 0.2)
    torch.testing.assert_close(objective, torch.tensor([-2.4, 2.6, -1.4, 1.6, -1.1]))
    objective.sum().backward()
    assert ratio.grad.tolist() == [0.0, 2.0, -2.0, 0.0, -1.0]


@pytest.mark.parametrize("prompts", [3, 8, 20])
def test_every_prompt_is_drawn_in_groups_that_one_rollout_holds(tmp_path, prompts):
    args = DDPOConfig(
        str(tmp_path), **SETTINGS | {"gradient_accumulation_steps": 2, "updates_per_pass": 2, "passes": 3}
    )
    order = RolloutOrder(prompts, args)
    epochs = []
    for epoch in range(2):
        order.set_epoch(epoch)
        epochs.append(list(order))
        assert len(epochs[-1]) == len(order)
    assert set(epochs[0]) == set(range(prompts)) and epochs[0] != epochs[1]
    used = [epochs[0][i : i + 16] for i in range(0, len(order), 16)]
    for i in range(0, len(used), 3):
        assert used[i] == used[i + 1] == used[i + 2]  # one for each pass
        assert used[i][::2] == used[i][1::2] and used[i] == [order.row(i // 3 * 16 + p) for p in range(16)]
    first = [rows[::2] for rows in used[::3]]
    assert sorted(list(chain(*first))[:prompts]) == list(range(prompts))  # no prompt twice before all were drawn


# --- updates against a loop by hand --------------------------------------------------------------------------------------------


def updates_by_hand(family, weights_at_start, prompts, settings):
    """Two updates with SGD from one rollout: drawing, advantages, PPO's clipped objective and the divergence from the base."""
    start, step, images = BY_HAND[family]
    build, side, steps = PIPELINES[family], 16, 3
    pipeline, base = build(), build()
    denoiser = pipeline.unet if family == "sdxl" else pipeline.transformer
    denoiser.requires_grad_(False)
    denoiser.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    weights = {name.replace(".default", ""): p for name, p in denoiser.named_parameters() if "lora" in name}
    for name, weight in weights.items():
        weight.data = weights_at_start[name].clone()

    seeds = [derive_seed(42, "rollout", position) for position in range(len(prompts))]
    noise = [torch.Generator().manual_seed(derive_seed(seed, "steps")) for seed in seeds]
    with torch.no_grad():
        latents = [start(pipeline, [torch.Generator().manual_seed(seed) for seed in seeds], side)]
        for index in range(steps):
            after = step(pipeline, prompts, latents[-1], index, steps, side)
            z = torch.stack([torch.randn(after.mean.shape[1:], generator=generator) for generator in noise])
            latents.append(after.mean + (after.stddev * z if index + 1 < steps else 0))
        scores = images(pipeline, latents[-1], side).mean(dim=(1, 2, 3)).double().numpy()
        reference = [step(base, prompts, latents[index], index, steps, side).mean for index in range(steps - 1)]
    advantages = np.empty_like(scores)
    for prompt in set(prompts):
        chosen = np.array([other == prompt for other in prompts])
        advantages[chosen] = (scores[chosen] - scores[chosen].mean()) / (scores[chosen].std() + 1e-4)
    advantages = torch.tensor(advantages).float()

    old, losses = None, []
    for _ in range(2):
        now = [step(pipeline, prompts, latents[index], index, steps, side) for index in range(steps - 1)]
        likelihood = [each.log_prob(latents[i + 1]).flatten(1).mean(1) for i, each in enumerate(now)]
        old = [each.detach() for each in likelihood] if old is None else old
        loss = 0
        for i, each in enumerate(now):
            ratio = (likelihood[i] - old[i]).exp()
            clip = settings["clip_range"]
            policy = -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
            divergence = ((each.mean - reference[i]) ** 2 / (2 * each.variance)).flatten(1).mean(1)
            loss = loss + (policy + settings["kl_weight"] * divergence).mean() / (steps - 1)
        gradients = torch.autograd.grad(loss, list(weights.values()))
        for weight, gradient in zip(weights.values(), gradients):
            weight.data -= settings["learning_rate"] * gradient
        losses.append(loss.item())
    return {name: weight.detach() for name, weight in weights.items()}, losses, scores


@pytest.mark.parametrize("family, rate, kl", [("flux", 100.0, 1.0), ("sdxl", 0.3, 0.01)])
def test_two_updates_of_a_rollout_are_those_of_a_loop_written_by_hand(tmp_path, family, rate, kl):
    settings = {"learning_rate": rate, "clip_range": 0.003, "kl_weight": kl}
    length = {} if family == "flux" else {"max_sequence_length": None}
    trainer = tiny_ddpo(
        tmp_path,
        PIPELINES[family](),
        optim="sgd",
        max_grad_norm=0.0,
        passes=2,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        **settings,
        **length,
    )
    scatter(trainer)
    before = lora_of(trainer)
    trainer.train()
    expected, losses, scores = updates_by_hand(family, before, [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2, settings)
    found = lora_of(trainer)
    moved = torch.cat([(expected[name] - before[name]).flatten() for name in before])
    difference = torch.cat([(found[name] - expected[name]).flatten() for name in before])
    assert moved.norm() > 1e-3 and difference.norm() < 5e-3 * moved.norm(), (moved.norm(), difference.norm())
    log = trainer.state.log_history
    assert log[0]["reward"] == pytest.approx(scores.mean(), rel=1e-4)
    assert log[0]["reward_std"] == pytest.approx(scores.std(), rel=1e-2)
    assert [entry["loss"] for entry in log[:2]] == pytest.approx(losses, rel=2e-2, abs=2e-6)
    assert log[0]["policy/approx_kl"] == 0 and log[0]["policy/clip_fraction"] == 0
    assert log[1]["policy/approx_kl"] > 0 and "reward" not in log[1]


# --- runs ----------------------------------------------------------------------------------------------------------------------


def test_the_first_update_raises_what_was_better_and_the_reward_is_asked_once_for_every_image(tmp_path):
    asked = []

    def reward(images, prompts):
        assert images.shape == (len(prompts), 3, 16, 16) and not images.requires_grad
        asked.extend(prompts)
        return brightness(images, prompts)

    trainer = tiny_ddpo(
        tmp_path, parts={"reward_funcs": reward}, passes=2, updates_per_pass=2, max_steps=5, timestep_fraction=0.5
    )
    assert "rollouts of 8 images of 16x16 pixels, 2 of a prompt, in 3 steps" in trainer.plan
    assert "4 updates per rollout, each of 4 images in 1 steps" in trainer.plan
    trainer.train()
    assert len(asked) == 16 and asked[::2] == asked[1::2]
    assert len(set(asked)) == 8
    steps = {tuple(trainer.trained_steps(trainer._rollout.blocks[0].trajectories[0]))}
    for trainer.state.global_step in range(20):
        steps.add(tuple(trainer.trained_steps(trainer._rollout.blocks[0].trajectories[0])))
    assert steps == {(0,), (1,)}


def test_sd3_with_a_detector_held_out_prompts_and_a_card(tmp_path):
    trainer = tiny_ddpo(
        tmp_path,
        PIPELINES["sd3"](),
        parts={"reward_funcs": [brightness, tiny_detector()], "eval_dataset": rows(HELD_OUT)},
        advantages="rollout",
        num_images_per_prompt=1,
        eval_strategy="steps",
        eval_steps=2,
        ema_decay=0.5,
        load_best_model_at_end=True,
        save_strategy="steps",
        save_steps=2,
    )
    assert trainer.args.metric_for_best_model == "reward" and trainer.args.greater_is_better
    trainer.train()
    trainer.save_model()
    entry = next(entry for entry in trainer.state.log_history if "reward_std" in entry)
    assert {"rewards/brightness", "rewards/artifact", "artifact_frequency", "loss/policy"} <= entry.keys()
    card = (tmp_path / "README.md").read_text()
    assert "policy gradient of [DDPO]" in card and "through the last denoising steps" not in card
    assert "`noise_level`" not in card and "| `num_images_per_prompt` | 1 |" in card
    assert not (tmp_path / "drawing_lora_weights.safetensors").exists()


RESUMED = {
    "passes": 2,
    "updates_per_pass": 2,
    "per_device_train_batch_size": 2,
    "advantages": "running",
    "history_minimum": 2,
    "max_steps": 5,
    "save_strategy": "steps",
    "save_steps": 1,
    "kl_weight": 0.1,
    "ema_decay": 0.9,
    "lr_scheduler_type": "cosine",
    "gradient_checkpointing": False,
}


def test_a_run_resumes_bit_for_bit_also_between_two_updates_of_a_rollout(tmp_path):
    whole = tiny_ddpo(tmp_path, **RESUMED)
    scatter(whole)
    start = [value.detach().clone() for value in whole.trained_parameters]
    whole.train()
    expected = state_of(whole)
    assert len([key for key in expected if key.startswith("optimizer")]) > 10
    for step in (3, 4):
        asked = []

        def reward(images, prompts, asked=asked):
            asked.extend(prompts)
            return brightness(images, prompts)

        again = tiny_ddpo(tmp_path, parts={"reward_funcs": reward}, **RESUMED)
        for parameter, value in zip(again.trained_parameters, start):
            parameter.data.copy_(value)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        found = state_of(again)
        assert [key for key in expected if not torch.equal(expected[key], found[key])] == [], step
        assert again._history.scores == whole._history.scores
        # one that was cut in two is drawn again, but not scored again
        assert len(asked) == 4
    assert json.loads((tmp_path / "checkpoint-3/policy.json").read_text())["rollout"]["number"] == 0
    assert json.loads((tmp_path / "checkpoint-4/policy.json").read_text())["rollout"] is None
    assert not (tmp_path / "checkpoint-4/drawing_lora_weights.safetensors").exists()
    (tmp_path / "checkpoint-3/policy.json").write_text("{}")
    with pytest.raises(ValueError, match=r"checkpoint-3.* damaged: its policy\.json"):
        tiny_ddpo(tmp_path, **RESUMED).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


# --- errors --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"num_inference_steps": 1},
            "`num_inference_steps` is 1, but must be at least 2: the last step adds no noise",
        ),
        (
            {"num_images_per_prompt": 3},
            "`num_images_per_prompt` is 3, but a rollout draws 4 images .* does not divide",
        ),
        ({"num_images_per_prompt": 1}, "`num_images_per_prompt` is 1, and .* choose 'running' or 'rollout'"),
        ({"advantages": "best"}, "`advantages` is 'best', but must be one of"),
        ({"clip_range": 0.0}, "`clip_range` is 0.0, but must be finite and above 0"),
        ({"advantage_clip": float("inf")}, "`advantage_clip` is inf"),
        ({"kl_weight": -1.0}, "`kl_weight` is -1.0, but must be finite and at least 0"),
        ({"timestep_fraction": 0.0}, r"`timestep_fraction` is 0.0, but must be in \(0, 1\]"),
        ({"passes": 0}, "`passes` is 0, but must be at least 1"),
        ({"history_minimum": 64}, "`history_minimum` is 64, but must be at most `history_size`"),
        ({"lora_dropout": 0.1}, "`lora_dropout` is 0.1, but must be 0"),
        ({"noise_level": 0.0}, "`noise_level` is 0.0, but must be finite and above 0"),
    ],
)
def test_arguments_that_cannot_work_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_ddpo(tmp_path, **changes)


def test_dropout_in_an_adapter_is_refused(tmp_path):
    adapter = LoraConfig(r=2, lora_dropout=0.5, target_modules=["to_q"])
    with pytest.raises(ValueError, match=r"`peft_config` has the lora_dropout 0\.5, but must have 0"):
        tiny_ddpo(tmp_path, parts={"peft_config": adapter})
    with pytest.raises(ValueError, match=r"`reward_weights` is \[0\.0\]: nothing would be learnt"):
        tiny_ddpo(tmp_path, reward_weights=[0.0])


def test_a_reward_that_is_no_number_or_of_another_length_ends_the_run(tmp_path):
    def undefined(images, prompts):
        return torch.where(torch.arange(len(images)) == 1, torch.nan, 1.0)

    trainer = tiny_ddpo(tmp_path, parts={"reward_funcs": undefined}, train_sampling_strategy="sequential")
    before = lora_of(trainer)
    with pytest.raises(FloatingPointError, match=r"`undefined` returned nan for 1 of 4 images.*'a red hand'"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in lora_of(trainer).items())
    trainer = tiny_ddpo(tmp_path, parts={"reward_funcs": lambda images, prompts: torch.ones(3)})
    with pytest.raises(ValueError, match=r"one score per image.*4"):
        trainer.train()


# --- it learns -----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_miniature_learns_to_be_brighter(tmp_path):
    trainer = tiny_ddpo(
        tmp_path,
        str(miniature.load("pipeline")),
        parts={"train_dataset": miniature.prompts("train")[:8], "eval_dataset": miniature.prompts("development")[:8]},
        resolution=64,
        max_sequence_length=12,
        num_inference_steps=4,
        per_device_train_batch_size=8,
        num_images_per_prompt=8,
        passes=2,
        max_steps=8,
        learning_rate=3e-3,
        lora_rank=16,
        clip_range=0.01,
        gradient_checkpointing=False,
        eval_strategy="steps",
        eval_steps=8,
        eval_num_images=8,
    )
    trainer.train()
    before, after = (entry["eval_reward"] for entry in trainer.state.log_history if "eval_reward" in entry)
    assert after > before + 0.04, (before, after)
