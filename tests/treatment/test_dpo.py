# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Diffusion-DPO: an update against a loop written by hand, resuming, the columns of pairs, errors."""

import io
import math

import pytest
import torch
from datasets import Dataset, load_dataset
from fixtures.pipelines import PIPELINES
from fixtures.policy import brightness, pairs, tiny_dpo
from fixtures.runs import state_of
from fixtures.trainer import HELD_OUT, PROMPTS, lora_of, rows, scatter
from peft import LoraConfig
from PIL import Image

from diffusers_diffdoctor import DifferentiableRollout, miniature
from diffusers_diffdoctor.images import to_image_tensor
from diffusers_diffdoctor.seeds import derive_seed
from diffusers_diffdoctor.treatment import write_preferences
from diffusers_diffdoctor.treatment.preferences import Pairs


# --- updates against a loop by hand --------------------------------------------------------------------------------------------


def flux_errors(pipeline, images, prompts, seeds):
    """Squared error of the velocity, a mean for each image."""
    vae, noise, sigmas = pipeline.vae, [], []
    clean = (vae.encode(images * 2 - 1).latent_dist.mean - 0.1159) * 0.3611
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        noise.append(torch.randn(4, 8, 8, generator=generator))
        sigmas.append(torch.randn(1, generator=generator).sigmoid())
    noise, s = torch.stack(noise), torch.cat(sigmas)[:, None, None]
    clean, noise = (pipeline._pack_latents(x, len(x), 4, 8, 8) for x in (clean, noise))
    text, pooled, text_ids = pipeline.encode_prompt(prompts, max_sequence_length=16)
    said = pipeline.transformer(
        hidden_states=(1 - s) * clean + s * noise,
        timestep=s.flatten(),
        pooled_projections=pooled,
        encoder_hidden_states=text,
        txt_ids=text_ids,
        img_ids=pipeline._prepare_latent_image_ids(len(clean), 4, 4, "cpu", torch.float32),
        return_dict=False,
    )[0]
    return (said - (noise - clean)).square().flatten(1).mean(1)


def sdxl_errors(pipeline, images, prompts, seeds):
    """Squared error of the noise, a mean for each image, without guidance."""
    clean = pipeline.vae.encode(images * 2 - 1).latent_dist.mean * pipeline.vae.config.scaling_factor
    noise, levels = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        noise.append(torch.randn(4, 8, 8, generator=generator))
        levels.append(torch.randint(1000, (1,), generator=generator))
    noise, levels = torch.stack(noise), torch.cat(levels)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    a = torch.cumprod(1 - betas, 0)[levels][:, None, None, None]
    text, _, pooled, _ = pipeline.encode_prompt(prompts)
    said = pipeline.unet(
        a.sqrt() * clean + (1 - a).sqrt() * noise,
        levels,
        encoder_hidden_states=text,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * len(clean))},
        return_dict=False,
    )[0]
    return (said - noise).square().flatten(1).mean(1)


@pytest.mark.parametrize("family, errors, rate", [("flux", flux_errors, 0.01), ("sdxl", sdxl_errors, 0.001)])
def test_two_updates_are_those_of_a_loop_written_by_hand(tmp_path, family, errors, rate):
    length = {} if family == "flux" else {"max_sequence_length": None}
    trainer = tiny_dpo(
        tmp_path,
        PIPELINES[family](),
        optim="sgd",
        max_grad_norm=0.0,
        learning_rate=rate,
        train_sampling_strategy="sequential",
        beta=500.0,
        **length,
    )
    scatter(trainer)
    before = lora_of(trainer)
    trainer.train()

    pipeline, base, data = PIPELINES[family](), PIPELINES[family](), pairs()
    denoiser = (pipeline.unet if family == "sdxl" else pipeline.transformer).requires_grad_(False)
    denoiser.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    weights = {name.replace(".default", ""): p for name, p in denoiser.named_parameters() if "lora" in name}
    for name, weight in weights.items():
        weight.data = before[name].clone()
    losses = []
    for start in (0, 2):
        seeds = [derive_seed(42, "preference", position) for position in (start, start + 1)]
        better, worse = (
            torch.stack([to_image_tensor(row[side], (16, 16)) for row in data[start : start + 2]])
            for side in ("chosen", "rejected")
        )
        prompts = PROMPTS[start : start + 2]
        with torch.no_grad():
            old = errors(base, better, prompts, seeds) - errors(base, worse, prompts, seeds)
        new = errors(pipeline, better, prompts, seeds) - errors(pipeline, worse, prompts, seeds)
        loss = torch.log1p(torch.exp(500.0 * (new - old))).mean()
        gradients = torch.autograd.grad(loss, list(weights.values()))
        for weight, gradient in zip(weights.values(), gradients):
            weight.data -= rate * gradient
        losses.append(loss.item())
    found = lora_of(trainer)
    moved = torch.cat([(weights[name].detach() - before[name]).flatten() for name in before])
    difference = torch.cat([(found[name] - weights[name].detach()).flatten() for name in before])
    assert moved.norm() > 1e-3 and difference.norm() < 5e-3 * moved.norm(), (moved.norm(), difference.norm())
    assert [entry["loss"] for entry in trainer.state.log_history[:2]] == pytest.approx(losses, rel=2e-3)


def test_what_was_not_yet_trained_tells_no_pair_apart(tmp_path):
    """A new adapter changes nothing: the loss is log 2, and half of the pairs count as told apart."""
    trainer = tiny_dpo(tmp_path, PIPELINES["sd3"](), max_steps=3)
    assert "Diffusion-DPO on a loaded pipeline (StableDiffusion3Pipeline): 6 pairs, 2 of 16x16 pixels" in trainer.plan
    trainer.train()
    first, *later = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert first["loss"] == pytest.approx(math.log(2)) and first["preference/accuracy"] == 0.5
    assert first["preference/margin"] == 0 and {"loss/chosen", "loss/rejected", "grad_norm"} <= first.keys()
    assert all(entry["preference/margin"] != 0 for entry in later)


def test_a_run_resumes_bit_for_bit_and_has_a_card(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "ema_decay": 0.9, "lora_dropout": 0.3}
    parts = {"eval_dataset": rows(HELD_OUT), "reward_funcs": brightness}
    whole = tiny_dpo(tmp_path, parts=parts, **settings, eval_strategy="steps", eval_steps=4)
    scatter(whole)
    whole.train()
    whole.save_model()
    again = tiny_dpo(tmp_path, parts=parts, **settings, eval_strategy="steps", eval_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected, found = state_of(whole), state_of(again)
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert any("eval_reward" in entry for entry in whole.state.log_history)
    card = (tmp_path / "README.md").read_text()
    assert "by [Diffusion-DPO]" in card and "| `beta` | 2500.0 |" in card and "denoising steps" not in card


# --- pairs -------------------------------------------------------------------------------------------------------------------


def jpeg(level):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (level,) * 3).save(file, "JPEG")
    return file.getvalue()


def test_votes_as_pick_a_pic_has_them_and_captions_are_read(tmp_path):
    votes = [
        {"caption": "a", "jpg_0": jpeg(200), "jpg_1": jpeg(50), "label_0": 1.0},
        {"caption": "b", "jpg_0": jpeg(60), "jpg_1": jpeg(210), "label_0": 0.0},
        {"caption": "c", "jpg_0": jpeg(60), "jpg_1": jpeg(210), "label_0": 0.5},
    ]
    for dataset in (votes, Dataset.from_list(votes)):
        found = Pairs(dataset)
        found.check(show_progress=False)
        levels = [[found.picture(pair, side).getpixel((4, 4))[0] for side in (0, 1)] for pair in range(2)]
        assert len(found) == 2 and found.prompts == ["a", "b"]
        assert levels == [[200, 50], [210, 60]]
    with pytest.raises(ValueError, match="3 rows, all of them ties"):
        Pairs([{**row, "label_0": 0.5} for row in votes])
    with pytest.raises(ValueError, match=r"the label_0 2\.0 in row 1, but it must lie in \[0, 1\]"):
        Pairs([votes[0], {**votes[1], "label_0": 2.0}])
    with pytest.raises(ValueError, match='no column "jpg_1"'):
        Pairs([{"caption": "a", "jpg_0": jpeg(1), "label_0": 1}])


@pytest.mark.parametrize(
    "dataset, error, message",
    [
        (None, ValueError, "`train_dataset` is missing"),
        ([], ValueError, "`train_dataset` is empty. Pass at least one pair"),
        ([{"prompt": "a", "chosen": 0}], ValueError, 'has no column "rejected", only'),
        ([{"chosen": 0, "rejected": 0}], ValueError, 'has no column "prompt", only'),
        ([{"prompt": " ", "chosen": 0, "rejected": 0}], ValueError, "has no prompt in row 0: found ' '"),
        (iter([]), TypeError, "`train_dataset` is a list_iterator, but must have a length"),
        (
            [{"prompt": "a", "chosen": Image.new("RGB", (8, 8)), "rejected": b"no picture"}],
            ValueError,
            "has a rejected image in row 0 that cannot be used",
        ),
    ],
)
def test_pairs_that_cannot_be_used_are_refused(tmp_path, dataset, error, message):
    with pytest.raises(error, match=message):
        tiny_dpo(tmp_path, parts={"train_dataset": dataset})


def test_a_beta_that_teaches_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`beta` is 0\.0, but must be finite and above 0"):
        tiny_dpo(tmp_path, beta=0.0)


def test_pairs_are_drawn_ranked_and_gone_on_with(tmp_path):
    rollout = DifferentiableRollout(
        PIPELINES["flux"](), height=16, width=16, num_inference_steps=2, max_sequence_length=16
    )
    drawn = []

    def generate(prompts, seeds):
        drawn.append(prompts[0])
        if drawn == ["a hand", "a dog", "a cup"]:
            raise KeyboardInterrupt
        return rollout.generate(prompts, seeds)

    def scores(images, prompts):  # no opinion on dogs
        return images.mean(dim=(1, 2, 3)) * torch.tensor([prompt != "a dog" for prompt in prompts])

    arguments = {"reward_funcs": scores, "prompts": ["a hand", "a dog", "a cup"], "output_dir": tmp_path / "pairs"}
    settings = {"generate": generate, "images_per_prompt": 3, "show_progress": False}
    with pytest.raises(KeyboardInterrupt):
        write_preferences(**arguments, **settings)
    assert write_preferences(**arguments, **settings) == {"written": 2, "quarantined": 1}
    assert drawn == ["a hand", "a dog", "a cup", "a dog", "a cup"]  # what was written is not drawn again
    found = load_dataset("imagefolder", data_dir=str(tmp_path / "pairs"), split="train")
    assert found["prompt"] == ["a hand", "a cup"]
    for row in found:
        assert row["chosen_score"] > row["rejected_score"]
        chosen = rollout.generate([row["prompt"]], [row["chosen_seed"]])[0]
        assert (to_image_tensor(row["chosen"]) - chosen).abs().max() < 0.01
    tiny_dpo(tmp_path / "run", parts={"train_dataset": found}, max_steps=1).train()
    for changes, message in (
        ({"images_per_prompt": 1}, "`images_per_prompt` is 1"),
        ({"prompts": []}, "`prompts` is"),
    ):
        with pytest.raises(ValueError, match=message):
            write_preferences(**arguments | settings | changes)


# --- it learns -----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_miniature_learns_to_be_brighter(tmp_path):
    """From scenes, and the same scenes darker."""
    scenes = miniature.regularization_dataset(count=16)
    darker = [row["image"].point(lambda value: int(value * 0.6)) for row in scenes]
    trainer = tiny_dpo(
        tmp_path,
        str(miniature.load("pipeline")),
        parts={
            "train_dataset": [
                {"prompt": row["prompt"], "chosen": row["image"], "rejected": other}
                for row, other in zip(scenes, darker)
            ],
            "eval_dataset": miniature.prompts("development")[:8],
            "reward_funcs": brightness,
        },
        resolution=64,
        max_sequence_length=12,
        num_inference_steps=4,
        per_device_train_batch_size=8,
        max_steps=10,
        learning_rate=4e-3,
        lora_rank=16,
        gradient_checkpointing=False,
        eval_strategy="steps",
        eval_steps=10,
        eval_num_images=8,
    )
    trainer.train()
    before, after = (entry["eval_reward"] for entry in trainer.state.log_history if "eval_reward" in entry)
    assert after > before + 0.015, (before, after)
