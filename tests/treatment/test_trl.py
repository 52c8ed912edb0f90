# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""TRL's example scripts for DDPO and AlignProp, reduced to what they call, with another import."""

import json
import random

import pytest
import torch
from fixtures.classic_pipelines import tiny_sd
from transformers import HfArgumentParser

from diffusers_diffdoctor.treatment.trl import (
    AlignPropConfig,
    AlignPropTrainer,
    DDPOConfig,
    DDPOTrainer,
    DefaultDDPOStableDiffusionPipeline,
)


ANIMALS = ["cat", "dog", "horse"]
COMMON = ["--num_epochs=2", "--sample_num_steps=3", "--mixed_precision=no", "--train_batch_size=3"]


@pytest.fixture
def pipeline(tmp_path):
    tiny_sd().save_pretrained(tmp_path / "sd")
    return DefaultDDPOStableDiffusionPipeline(str(tmp_path / "sd"), use_lora=True)


def prompt_fn():
    return random.choice(ANIMALS), {"kind": "animal"}


def test_ddpo(tmp_path, pipeline, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    seen = []

    def reward_fn(images, prompts, metadata):
        seen.extend(zip(prompts, metadata))
        return images.mean(dim=(1, 2, 3)), {}

    flags = [*COMMON, "--sample_batch_size=6", "--sample_num_batches_per_epoch=2", "--per_prompt_stat_tracking=True"]
    flags += ["--train_gradient_accumulation_steps=1", f"--output_dir={tmp_path / 'out'}"]
    (config,) = HfArgumentParser((DDPOConfig,)).parse_args_into_dataclasses(flags)
    config.project_kwargs = {"logging_dir": "logs", "total_limit": 5}
    trainer = DDPOTrainer(config, reward_fn, prompt_fn, pipeline, image_samples_hook=print)
    trainer.write_report = lambda: None
    trainer.train()
    trainer.save_model(config.output_dir)
    assert len(seen) == 2 * 12 and {prompt for prompt, _ in seen} <= set(ANIMALS)
    assert all(about == {"kind": "animal"} for _, about in seen)
    assert trainer.state.global_step == 8 and trainer.args.updates_per_pass == 4  # 12 images in 4 updates, twice
    log = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert sum("reward_std" in line for line in log) == 2
    assert (tmp_path / "out/pytorch_lora_weights.safetensors").is_file()
    with pytest.raises(ValueError, match="must be a multiple of `train_batch_size`"):
        DDPOConfig(sample_batch_size=2, sample_num_batches_per_epoch=1, train_batch_size=3).translated()


def test_alignprop(tmp_path, pipeline, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def reward_fn(images, prompts, metadata):
        return images.mean(dim=(1, 2, 3)), {}

    flags = [*COMMON, "--truncated_backprop_rand=False", "--truncated_backprop_timestep=2"]
    (config,) = HfArgumentParser((AlignPropConfig,)).parse_args_into_dataclasses(
        [*flags, f"--output_dir={tmp_path / 'out'}"]
    )
    trainer = AlignPropTrainer(config, reward_fn, prompt_fn, pipeline)
    trainer.write_report = lambda: None
    before = [value.detach().clone() for value in trainer.trained_parameters]
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.args.gradient_fraction == pytest.approx(1 / 3)
    assert any(not torch.equal(old, new) for old, new in zip(before, trainer.trained_parameters))
    assert AlignPropConfig().translated().gradient_placement == "alignprop"


def test_all_weights_are_not_trained(tmp_path):
    with pytest.raises(ValueError, match="`use_lora` is False"):
        DefaultDDPOStableDiffusionPipeline("sd", use_lora=False)
