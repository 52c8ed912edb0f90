# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The names that TRL had for reward training of Stable Diffusion (DDPOTrainer, AlignPropTrainer), on the trainers here.

For scripts that were written for TRL 0.7 to 0.22: change the import. What is left out: `image_samples_hook`, because samples are in
the report; full fine-tuning (`use_lora=False`); asynchronous rewards. Arguments that say the same as before but have no part here
(trackers' own, `allow_tf32`) are accepted and do nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from transformers.utils import logging

from . import ddpo
from .config import PixelRewardConfig
from .trainer import PixelRewardTrainer


logger = logging.get_logger(__name__)

__all__ = ["AlignPropConfig", "AlignPropTrainer", "DDPOConfig", "DDPOTrainer", "DefaultDDPOStableDiffusionPipeline"]


def DefaultDDPOStableDiffusionPipeline(
    pretrained_model_name: str, *, pretrained_model_revision: str = "main", use_lora: bool = True
) -> StableDiffusionPipeline:
    """A Stable Diffusion with DDIM, which is what TRL's wrapper held."""
    if not use_lora:
        raise ValueError("`use_lora` is False, but only a LoRA is trained here. Leave it True.")
    pipeline = StableDiffusionPipeline.from_pretrained(pretrained_model_name, revision=pretrained_model_revision)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    return pipeline


@dataclass
class _Config:
    """Arguments that both trainers had, with TRL's defaults."""

    output_dir: str = field(default="trl", metadata={"help": "Folder of the LoRA, the checkpoints and the report."})
    push_to_hub: bool = False
    hub_model_id: str | None = None
    seed: int = 0
    log_with: str | None = None
    tracker_kwargs: dict = field(default_factory=dict)
    accelerator_kwargs: dict = field(default_factory=dict)
    project_kwargs: dict = field(default_factory=dict)
    tracker_project_name: str = "trl"
    logdir: str = "logs"
    num_epochs: int = 100
    save_freq: int = 1
    num_checkpoint_limit: int = 5
    mixed_precision: str = "fp16"
    allow_tf32: bool = True
    resume_from: str = ""
    sample_num_steps: int = 50
    sample_eta: float = 1.0
    sample_guidance_scale: float = 5.0
    train_batch_size: int = 1
    train_use_8bit_adam: bool = False
    train_learning_rate: float = 3e-4
    train_adam_beta1: float = 0.9
    train_adam_beta2: float = 0.999
    train_adam_weight_decay: float = 1e-4
    train_adam_epsilon: float = 1e-8
    train_gradient_accumulation_steps: int = 1
    train_max_grad_norm: float = 1.0
    negative_prompts: str | None = None

    def arguments(self) -> dict[str, Any]:
        """The same in the words of the configurations here. float16 becomes bfloat16 where there is a GPU, which needs no scaling."""
        gpu = torch.cuda.is_available()
        return {
            "output_dir": self.output_dir,
            "push_to_hub": self.push_to_hub,
            "hub_model_id": self.hub_model_id,
            "seed": self.seed,
            "report_to": self.log_with or "none",
            "save_strategy": "steps",
            "save_total_limit": self.num_checkpoint_limit,
            "bf16": gpu and self.mixed_precision != "no",
            "num_inference_steps": self.sample_num_steps,
            "guidance_scale": self.sample_guidance_scale,
            "pipeline_kwargs": {"negative_prompt": self.negative_prompts} if self.negative_prompts else None,
            "per_device_train_batch_size": self.train_batch_size,
            "optim": "adamw_bnb_8bit" if self.train_use_8bit_adam else "adamw_torch",
            "learning_rate": self.train_learning_rate,
            "adam_beta1": self.train_adam_beta1,
            "adam_beta2": self.train_adam_beta2,
            "weight_decay": self.train_adam_weight_decay,
            "adam_epsilon": self.train_adam_epsilon,
            "gradient_accumulation_steps": self.train_gradient_accumulation_steps,
            "max_grad_norm": self.train_max_grad_norm,
            "logging_steps": 1,
            "train_sampling_strategy": "sequential",  # the prompt function draws at random
            "cache_prompt_embeddings": False,  # nor are the prompts known before
            "num_train_epochs": 1,
        }


@dataclass
class DDPOConfig(_Config):
    """The arguments of TRL's `DDPOTrainer`."""

    sample_batch_size: int = 1
    sample_num_batches_per_epoch: int = 2
    train_num_inner_epochs: int = 1
    train_cfg: bool = True
    train_adv_clip_max: float = 5.0
    train_clip_range: float = 1e-4
    train_timestep_fraction: float = 1.0
    per_prompt_stat_tracking: bool = False
    per_prompt_stat_tracking_buffer_size: int = 16
    per_prompt_stat_tracking_min_count: int = 16
    async_reward_computation: bool = False
    max_workers: int = 2

    def translated(self) -> ddpo.DDPOConfig:
        images = self.sample_batch_size * self.sample_num_batches_per_epoch
        update = self.train_batch_size * self.train_gradient_accumulation_steps
        if images % update:
            raise ValueError(
                f"`sample_batch_size` x `sample_num_batches_per_epoch` is {images}, but must be a multiple of `train_batch_size` x "
                f"`train_gradient_accumulation_steps`, {update}."
            )
        updates = images // update * self.train_num_inner_epochs
        return ddpo.DDPOConfig(
            **self.arguments(),
            save_steps=max(1, self.save_freq * updates),
            noise_level=self.sample_eta,
            num_images_per_prompt=1,
            updates_per_pass=images // update,
            passes=self.train_num_inner_epochs,
            advantages="running" if self.per_prompt_stat_tracking else "rollout",
            history_size=max(self.per_prompt_stat_tracking_buffer_size, self.per_prompt_stat_tracking_min_count),
            history_minimum=self.per_prompt_stat_tracking_min_count,
            advantage_clip=self.train_adv_clip_max,
            clip_range=self.train_clip_range,
            timestep_fraction=self.train_timestep_fraction,
        )


@dataclass
class AlignPropConfig(_Config):
    """The arguments of TRL's `AlignPropTrainer`."""

    train_learning_rate: float = 1e-3
    log_image_freq: int = 1
    truncated_backprop_rand: bool = True
    truncated_backprop_timestep: int = 49
    truncated_rand_backprop_minmax: tuple[int, int] = (0, 50)

    def translated(self) -> PixelRewardConfig:
        first = (
            self.truncated_rand_backprop_minmax[0]
            if self.truncated_backprop_rand
            else self.truncated_backprop_timestep
        )
        steps = self.sample_num_steps
        return PixelRewardConfig(
            **self.arguments(),
            save_steps=max(1, self.save_freq),
            gradient_placement="alignprop" if self.truncated_backprop_rand else "last",
            gradient_fraction=max(1, steps - first) / steps,
            offline_weight=0.0,
        )


def _prompts(draw: Callable[[], tuple[str, Any]], count: int, metadata: dict[str, Any]) -> list[dict[str, str]]:
    """As many prompts as a run needs, with what came along with each."""
    rows = []
    for _ in range(count):
        prompt, about = draw()
        metadata[str(prompt)] = about
        rows.append({"prompt": str(prompt)})
    return rows


def _reward(function: Callable, metadata: dict[str, Any]) -> Callable[[torch.Tensor, Sequence[str]], torch.Tensor]:
    """TRL's `(images, prompts, metadata) -> (scores, metadata)` as a reward here."""

    def reward(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        found = function(images, tuple(prompts), tuple(metadata.get(prompt, {}) for prompt in prompts))
        return torch.as_tensor(found[0] if isinstance(found, tuple) else found, device=images.device)

    return reward


class DDPOTrainer(ddpo.DDPOTrainer):
    """A [`~diffusers_diffdoctor.DDPOTrainer`], called as TRL's was.

    Args:
        config: [`DDPOConfig`].
        reward_function: `(images, prompts, metadata) -> (scores, metadata)`; images (B, 3, H, W) in [0, 1].
        prompt_function: `() -> (prompt, metadata)`. All prompts of the run are drawn at the start.
        sd_pipeline: any pipeline that the trainer takes.
        image_samples_hook: is not called.
    """

    def __init__(
        self,
        config: DDPOConfig,
        reward_function: Callable,
        prompt_function: Callable[[], tuple[str, Any]],
        sd_pipeline: DiffusionPipeline,
        image_samples_hook: Callable | None = None,
    ):
        args, metadata = config.translated(), {}
        prompts = _prompts(prompt_function, config.num_epochs * args.images_per_rollout, metadata)
        args.resume_from_checkpoint = config.resume_from or None
        _no_hook(image_samples_hook)
        super().__init__(sd_pipeline, _reward(reward_function, metadata), args, prompts)


class AlignPropTrainer(PixelRewardTrainer):
    """A [`~diffusers_diffdoctor.PixelRewardTrainer`], called as TRL's AlignPropTrainer was; see [`DDPOTrainer`]."""

    def __init__(
        self,
        config: AlignPropConfig,
        reward_function: Callable,
        prompt_function: Callable[[], tuple[str, Any]],
        sd_pipeline: DiffusionPipeline,
        image_samples_hook: Callable | None = None,
    ):
        args, metadata = config.translated(), {}
        update = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        prompts = _prompts(prompt_function, config.num_epochs * update, metadata)
        args.resume_from_checkpoint = config.resume_from or None
        _no_hook(image_samples_hook)
        super().__init__(sd_pipeline, _reward(reward_function, metadata), args, prompts)


def _no_hook(hook: Callable | None) -> None:
    if hook is not None:
        logger.warning(
            "`image_samples_hook` is not called: pass `eval_dataset` to the trainer itself for pictures in the report."
        )
