# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What one update of the trainer is, against a loop written by hand."""

import json

import pytest
import torch
from fixtures.pipelines import tiny_flux, tiny_sdxl
from fixtures.trainer import (
    PROMPTS,
    assert_same,
    lora_of,
    photos,
    rows,
    scatter,
    tiny_detector,
    tiny_trainer,
    trained_names,
)
from peft import LoraConfig

from diffusers_diffdoctor import DifferentiableRollout, PixelRewardConfig
from diffusers_diffdoctor.images import to_image_tensor
from diffusers_diffdoctor.seeds import derive_seed
from diffusers_diffdoctor.treatment.samples import RegularizationImages


def redness(images, prompts):
    return images[:, 0].mean(dim=(1, 2))


def by_hand(initial, prompts_of_steps, learning_rate):
    """Two kinds of loss, one backward, clipping at 1, AdamW: nothing of the trainer in it."""
    pipeline, detector, images = tiny_flux(), tiny_detector(), photos()
    rollout = DifferentiableRollout(pipeline, height=16, width=16, num_inference_steps=4, max_sequence_length=16)
    denoiser = pipeline.transformer.requires_grad_(False)
    denoiser.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    weights = {n.replace(".default", ""): p for n, p in denoiser.named_parameters() if "lora" in n}
    for name, weight in weights.items():
        weight.data = initial[name].clone()
    order = RegularizationImages(images, seed=42)
    optimizer = torch.optim.AdamW(weights.values(), lr=learning_rate, weight_decay=0.0)
    losses, position = [], 0
    for prompts in prompts_of_steps:
        positions = range(position, position + len(prompts))
        chosen = [images[order.row(p)] for p in positions]
        output = rollout(
            prompts,
            [derive_seed(42, "rollout", p) for p in positions],
            torch.stack([to_image_tensor(row["image"], (16, 16)) for row in chosen]),
            [row["prompt"] for row in chosen],
            [derive_seed(42, "offline", p) for p in positions],
        )
        maps = detector.confidence(output.images)
        pixel = torch.stack([m[m > 0.1].mean() if (m > 0.1).any() else m.sum() * 0 for m in maps]).mean()
        offline = ((output.prediction - output.target) ** 2).mean()
        optimizer.zero_grad()
        (pixel + 0.25 * offline).backward()
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        losses.append((pixel.item(), offline.item(), maps.flatten(1).amax(1).mean().item(), norm.item()))
        position += len(prompts)
    return {name: weight.detach() for name, weight in weights.items()}, losses


def test_two_updates_are_those_of_a_loop_written_by_hand(tmp_path):
    trainer = tiny_trainer(tmp_path, train_sampling_strategy="sequential", gradient_checkpointing=True)
    start = lora_of(trainer)
    frozen = {
        f"{part}.{name}": value.clone()
        for part in ("transformer", "vae")
        for name, value in getattr(trainer.pipeline, part).state_dict().items()
        if "lora" not in name
    }
    trainer.train()
    expected, losses = by_hand(start, [PROMPTS[:2], PROMPTS[2:4]], 1e-2)
    found = lora_of(trainer)
    assert max((found[name] - start[name]).abs().max() for name in start) > 5e-3
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for line, (pixel, offline, highest, norm) in zip(lines, losses):
        assert line["loss/pixel"] == pytest.approx(pixel, rel=1e-4)
        assert line["loss/offline"] == pytest.approx(offline, rel=1e-4)
        assert line["loss"] == pytest.approx(pixel + 0.25 * offline, rel=1e-4)
        assert line["max_confidence"] == pytest.approx(highest, rel=1e-4)
        assert line["reward"] == pytest.approx(1 - highest, rel=1e-3)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert 0 <= line["area_ratio"] <= 1 and line["artifact_frequency"] in (0.0, 0.5, 1.0)
    after = {
        f"{part}.{name}": value
        for part in ("transformer", "vae")
        for name, value in getattr(trainer.pipeline, part).state_dict().items()
        if "lora" not in name
    }
    assert_same(frozen, after)


def one_update(folder, parts=None, **changes):
    """What one step of plain SGD does to a LoRA that changes something already, which is its gradient; and what is logged."""
    settings = {"optim": "sgd", "learning_rate": 100.0, "max_grad_norm": 0.0, "max_steps": 1}
    settings |= {"train_sampling_strategy": "sequential", "drift_weight": 0.0, "offline_weight": 0.0}
    trainer = tiny_trainer(folder, parts=parts, **(settings | changes))
    scatter(trainer)
    start = lora_of(trainer)
    trainer.train()
    return {name: value - start[name] for name, value in lora_of(trainer).items()}, trainer.state.log_history[0]


def length(update):
    return sum(value.square().sum() for value in update.values()).sqrt().item()


def assert_close(update, expected):
    difference = {name: value - expected[name] for name, value in update.items()}
    assert length(difference) < 1e-3 * length(expected), (length(difference), length(expected))


def test_an_update_is_the_weighted_sum_of_those_of_its_losses(tmp_path):
    detector = {"reward_funcs": tiny_detector()}
    pixel, logged = one_update(tmp_path / "pixel", detector)
    red, logged_red = one_update(tmp_path / "red", {"reward_funcs": redness})
    with_offline, logged_offline = one_update(tmp_path / "offline", detector, offline_weight=1.0)
    with_drift, logged_drift = one_update(tmp_path / "drift", detector, drift_weight=1.0)
    offline = {name: value - pixel[name] for name, value in with_offline.items()}
    drift = {name: value - pixel[name] for name, value in with_drift.items()}

    weights = {
        "reward_weights": [2.0, 3.0],
        "pixel_weight": 0.5,
        "offline_weight": 0.5 * length(pixel) / length(offline),
        "drift_weight": 0.5 * length(pixel) / length(drift),
    }
    update, line = one_update(tmp_path / "all", {"reward_funcs": [tiny_detector(), redness]}, **weights)
    expected = {
        name: 0.5 * (2 * pixel[name] + 3 * red[name])
        + weights["offline_weight"] * offline[name]
        + weights["drift_weight"] * drift[name]
        for name in pixel
    }
    assert_close(update, expected)
    parts = {
        "loss/pixel": 2 * logged["loss/pixel"] + 3 * logged_red["loss/pixel"],
        "loss/offline": logged_offline["loss/offline"],
        "loss/drift": logged_drift["loss/drift"],
        "reward": 2 * logged["reward"] + 3 * logged_red["reward"],
        "rewards/artifact": logged["reward"],
        "rewards/redness": logged_red["reward"],
    }
    assert {name: line[name] for name in parts} == pytest.approx(parts, rel=1e-4)
    total = 0.5 * parts["loss/pixel"] + sum(weights[f"{k}_weight"] * parts[f"loss/{k}"] for k in ("offline", "drift"))
    assert line["loss"] == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize(
    "prompts, batch, accumulation", [(PROMPTS[:6], 2, 3), (PROMPTS[:5], 2, 3)], ids=["even", "uneven"]
)
def test_gradient_accumulation_is_the_mean_over_all_samples(tmp_path, prompts, batch, accumulation):
    """Also where the last batch is smaller: its samples weigh no more than the others. SGD shows the gradient as it is."""
    parts = {"train_dataset": rows(prompts), "regularization_dataset": photos() if len(prompts) == 6 else None}
    weights = {"offline_weight": 0.25, "drift_weight": 30.0}
    whole, line = one_update(tmp_path / "1", parts, per_device_train_batch_size=len(prompts), **weights)
    split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    update, split_line = one_update(tmp_path / "2", parts, **split, **weights)
    assert_close(update, whole)
    assert split_line["loss"] == pytest.approx(line["loss"], rel=1e-4)
    without_drift, _ = one_update(tmp_path / "3", parts, **split, offline_weight=0.25)
    assert length({name: value - update[name] for name, value in without_drift.items()}) > 0.1 * length(update)


@pytest.mark.parametrize("wanted", [True, False, None])
def test_gradient_checkpointing_is_on_unless_it_is_refused(tmp_path, wanted):
    chosen = {} if wanted is None else {"gradient_checkpointing": wanted}
    trainer = tiny_trainer(tmp_path, max_steps=1, **chosen)
    trainer.train()
    assert trainer.rollout.denoiser.is_gradient_checkpointing is (wanted is not False)


def test_options_of_gradient_checkpointing_are_refused(tmp_path):
    name = "activation_checkpointing_kwargs"
    if not hasattr(PixelRewardConfig, name):  # transformers before 5.22
        name = "gradient_checkpointing_kwargs"
    options = {name: {"every_n_layers": 2}}
    with pytest.raises(ValueError, match=r"has no options, found \{'every_n_layers': 2\}"):
        tiny_trainer(tmp_path, max_steps=1, **options).train()


@pytest.mark.parametrize("placement", ["last", "refl", "alignprop", "draft_lv", "sparse", "leap"])
def test_every_image_scores_better_after_treatment(tmp_path, placement):
    parts = {"reward_funcs": redness, "regularization_dataset": None}
    where = {"gradient_fraction": 1.0, "gradient_placement": placement}
    trainer = tiny_trainer(tmp_path, parts=parts, max_steps=20, learning_rate=5e-2, **where)
    seeds = list(range(4))
    before = redness(trainer.generate(PROMPTS[:4], seeds), None)
    trainer.train()
    after = redness(trainer.generate(PROMPTS[:4], seeds), None)
    assert (after > before + 0.002).all()
    assert torch.equal(redness(trainer.generate(PROMPTS[:4], seeds, treated=False), None), before)


def test_a_unet_is_treated_too(tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        tiny_sdxl(),
        {"regularization_dataset": None},
        max_sequence_length=None,
        num_inference_steps=2,
        guidance_scale=2.0,
        max_steps=1,
    )
    start = lora_of(trainer)
    trainer.train()
    assert max((value - start[name]).abs().max() for name, value in lora_of(trainer).items()) > 1e-3


def test_the_eight_bit_optimizer_runs_on_a_cpu(tmp_path):
    """bitsandbytes keeps the state of tensors of 4096 elements and more in 8 bits."""
    trainer = tiny_trainer(tmp_path, optim="adamw_bnb_8bit", lora_rank=256, max_steps=1)
    start = lora_of(trainer)
    trainer.train()
    states = [state["state1"].dtype for state in trainer.optimizer.optimizer.state.values()]
    assert torch.uint8 in states
    assert max((value - start[name]).abs().max() for name, value in lora_of(trainer).items()) > 1e-3


def test_half_precision_trains_float32_weights_on_a_cpu(tmp_path):
    tiny_flux().save_pretrained(tmp_path / "flux")
    trainer = tiny_trainer(tmp_path / "run", tmp_path / "flux", bf16=True)
    assert trainer.pipeline.vae.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in trainer.trained_parameters} == {torch.float32}
    start = lora_of(trainer)
    trainer.train()
    changes = [(value - start[name]).abs().max() for name, value in lora_of(trainer).items()]
    assert max(changes) > 1e-3 and all(torch.isfinite(change) for change in changes)


def test_prompts_are_encoded_once_and_the_text_encoders_freed(tmp_path):
    assert tiny_trainer(tmp_path).pipeline.text_encoder_2 is None
    kept = tiny_trainer(tmp_path, cache_prompt_embeddings=False, max_steps=1)
    assert kept.pipeline.text_encoder_2 is not None
    kept.train()


def test_a_peft_config_of_ones_own(tmp_path):
    adapter = LoraConfig(r=3, lora_alpha=6, target_modules=["to_q"])
    trainer = tiny_trainer(tmp_path, parts={"peft_config": adapter})
    assert all(".to_q." in name for name in lora_of(trainer))
    assert trainer.rollout.denoiser.peft_config["default"].lora_alpha == 6


def test_regularization_images_come_in_seeded_passes():
    images = RegularizationImages(photos(7), seed=3)
    order = [images.row(position) for position in range(21)]
    assert [sorted(order[i : i + 7]) for i in (0, 7, 14)] == [list(range(7))] * 3
    assert order[:7] != order[7:14]
    again = RegularizationImages(photos(7), seed=3)
    assert [again.row(position) for position in (20, 3, 11)] == [order[20], order[3], order[11]]
    assert [RegularizationImages(photos(7), seed=4).row(i) for i in range(21)] != order


def test_the_drift_loss_holds_a_treatment_to_the_untreated_model(tmp_path):
    settings = {"max_steps": 8, "learning_rate": 1e-2, "offline_weight": 0.0, "logging_steps": 1}
    parts = {"regularization_dataset": None, "reward_funcs": redness}
    seeds = list(range(len(PROMPTS)))
    distance = {}
    for weight in (0.0, 1e6):
        trainer = tiny_trainer(tmp_path / str(weight), parts=parts, drift_weight=weight, **settings)
        trained = trained_names(trainer)
        trainer.train()
        change = trainer.generate(PROMPTS, seeds) - trainer.generate(PROMPTS, seeds, treated=False)
        distance[weight] = change.square().mean().item()
        logged = [entry["loss/drift"] for entry in trainer.state.log_history if "loss/drift" in entry]
        if weight:
            assert logged[0] == 0 and logged[1] > 0  # a new LoRA changes nothing yet
            assert trained_names(trainer) == trained and len(trained) == len(lora_of(trainer))
        else:
            assert not logged
    assert distance[1e6] < 0.5 * distance[0.0]
