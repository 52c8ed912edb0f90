# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Where the memory is full, the error says what would free the most in this run."""

import re
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from fixtures.pipelines import tiny_flux
from fixtures.trainer import HELD_OUT, rows, tiny_args, tiny_trainer

from diffusers_diffdoctor.treatment.memory import memory_advice, memory_errors_explained


@pytest.fixture(scope="module")
def flux():
    """The shapes of FLUX.1-schnell in bfloat16, without memory, as the rollout of a treatment sees them."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=False).to(torch.bfloat16).requires_grad_(False)
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), latent_channels=16).to(torch.bfloat16)
    pipeline = SimpleNamespace(vae=vae, components={"transformer": transformer, "vae": vae, "text_encoder": None})
    return SimpleNamespace(pipeline=pipeline, denoiser=transformer, height=1024, width=1024, gradient_steps=1)


def remedies(advice: str) -> dict[str, float]:
    """Argument -> gigabytes, in the order of the advice."""
    found = re.findall(r"^  \d\. `?(?:half of )?(\w+).*: about ([\d.]+) (GB|MB)$", advice, re.M)
    return {name: float(count) / (1 if unit == "GB" else 1000) for name, count, unit in found}


def advice(flux, tmp_path, doing="training", **changes):
    values = {"resolution": None, "height": 1024, "width": 1024, "bf16": True, "per_device_train_batch_size": 1}
    return memory_advice(tiny_args(tmp_path, **values | changes), flux, doing)


def test_the_figures_are_those_of_the_page_on_memory(flux, tmp_path):
    said = advice(flux, tmp_path)
    assert (
        "`quantization='nf4'` (another base): about 17." in said
        and "`quantization='int8'` (another base): about 11." in said
    )
    plain = remedies(advice(flux, tmp_path, vae_gradient_checkpointing=False, quantization="nf4"))
    assert plain["vae_gradient_checkpointing"] == pytest.approx(13 - 1.7, rel=0.1)
    batch = remedies(advice(flux, tmp_path, per_device_train_batch_size=2, quantization="nf4"))
    assert batch["per_device_train_batch_size"] == pytest.approx(1.6 + 1.7, rel=0.15)  # one image more


def test_the_most_effective_comes_first(flux, tmp_path):
    ordered = remedies(advice(flux, tmp_path, per_device_train_batch_size=16))
    assert list(ordered)[:2] == ["per_device_train_batch_size", "1024"]
    assert sorted(ordered.values(), reverse=True) == list(ordered.values())
    assert next(iter(remedies(advice(flux, tmp_path)))) == "quantization"
    assert next(iter(remedies(advice(flux, tmp_path, gradient_checkpointing=False)))) == "gradient_checkpointing"
    said = advice(flux, tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert "`per_device_train_batch_size=1, gradient_accumulation_steps=8` (the same update)" in said


def test_what_is_set_already_is_not_advised(flux, tmp_path):
    said = advice(flux, tmp_path, quantization="nf4")
    assert set(remedies(said)) == {"1024"}
    assert "no argument would free much" in advice(flux, tmp_path, doing="loading", quantization="nf4")


def test_evaluation_has_its_own_batch(flux, tmp_path):
    said = advice(flux, tmp_path, doing="evaluation", per_device_eval_batch_size=16, per_device_train_batch_size=16)
    assert "per_device_eval_batch_size=1" in said and "per_device_train_batch_size" not in said


def full(images, prompts):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_a_step_without_memory_says_what_helps(tmp_path):
    trainer = tiny_trainer(tmp_path, parts={"reward_funcs": full})
    with pytest.raises(
        torch.OutOfMemoryError, match=r"(?s)Tried to allocate 2.00 GiB\.\nThe memory is full in training"
    ) as caught:
        trainer.train()
    assert "pipeline_dtype" in remedies(str(caught.value))  # the tiny pipeline is in float32


def test_an_evaluation_without_memory_says_what_helps(tmp_path):
    trainer = tiny_trainer(tmp_path, parts={"reward_funcs": full, "eval_dataset": rows(HELD_OUT)})
    with pytest.raises(torch.OutOfMemoryError, match=r"(?s)2.00 GiB\.\nThe memory is full in evaluation") as caught:
        trainer.evaluate()
    assert str(caught.value).count("What would free the most") == 1


def test_text_encoders_that_stay_are_named(tmp_path):
    pipeline = tiny_flux()
    size = sum(
        weight.numel() * 4 for part in (pipeline.text_encoder, pipeline.text_encoder_2) for weight in part.parameters()
    )
    trainer = tiny_trainer(tmp_path, pipeline, free_text_encoders=False)
    said = memory_advice(trainer.args, trainer.rollout, "loading")
    assert remedies(said)["cache_prompt_embeddings"] == pytest.approx(size / 1e9, abs=1e-3)


def test_other_errors_are_as_they_were(tmp_path):
    trainer = tiny_trainer(tmp_path)
    with pytest.raises(RuntimeError, match=r"^shapes differ$"):
        with memory_errors_explained(trainer.args, trainer.rollout, "training"):
            raise RuntimeError("shapes differ")
    with pytest.raises(torch.OutOfMemoryError, match="can't allocate memory"):
        with memory_errors_explained(trainer.args, trainer.rollout, "training"):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
