# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Diffusion-DPO (arXiv 2311.12908): learn from pairs of images of which one was preferred, without drawing any.

What is left out on purpose: training without a reference; the reference is the pipeline itself, its adapter switched off.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from peft import PeftConfig
from PIL import Image
from transformers import TrainerCallback, is_datasets_available
from transformers.utils import logging

from ..images import to_image_tensor
from ..rollout.preference import PreferenceRollout
from ..seeds import derive_seed
from .base import TreatmentTrainer
from .config import TreatmentConfig, _require
from .losses import offline_loss
from .preferences import Pairs
from .prepare import RewardFunc, build_rollout


if is_datasets_available():
    from datasets import Dataset

logger = logging.get_logger(__name__)


@dataclass
class DiffusionDPOConfig(TreatmentConfig):
    r"""
    Configuration of the [`DiffusionDPOTrainer`]: a [`~diffusers_diffdoctor.treatment.TreatmentConfig`] with what follows.

    Parameters:
        beta (`float`, *optional*, defaults to `2500.0`):
            How much staying close to the pipeline counts against the preferences, above 0: see [`dpo_loss`]. It holds the factor T
            (the number of noise levels) of the paper's equation 14, where errors are means over the elements. The authors' code
            has `beta_dpo` 5000 and multiplies it by 0.5; the paper found 2000 to 5000 to be best.

    Other defaults than those of the base: `learning_rate` 1e-5 (ours), and `metric_for_best_model` `"reward"` where one is needed.
    """

    beta: float = field(
        default=2500.0, metadata={"help": "Weight of staying close to the pipeline; half of the authors' beta_dpo."}
    )

    # --- other defaults than those of the base
    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate (ours)."})

    best_metric = "reward"

    def _check(self) -> None:
        super()._check()
        _require(self, "beta", math.isfinite(self.beta) and self.beta > 0, "finite and above 0")


def dpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    chosen_reference: torch.Tensor,
    rejected_reference: torch.Tensor,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    `-log sigmoid(m)` with the margin `m = -beta * ((chosen - chosen_reference) - (rejected - rejected_reference))`: Diffusion-DPO
    (arXiv 2311.12908), eq. 14.

    Args:
        chosen, rejected: (B,), the training loss of the preferred image and of the other, for the same noise and level.
        chosen_reference, rejected_reference: the same of the model that it must stay close to.
        beta: above 0.

    Returns:
        The loss (B,), log 2 where nothing was learnt yet, and the margin (B,), above 0 where the pair is told apart.
    """
    margin = -beta * ((chosen - chosen_reference) - (rejected - rejected_reference))
    return -F.logsigmoid(margin), margin


class DiffusionDPOTrainer(TreatmentTrainer):
    """
    Trainer that teaches a pipeline, through a LoRA on its denoiser, to draw rather what was preferred in pairs of images.

    It draws nothing while it trains: an update is the model's own training loss on both images of a pair, with the LoRA and
    without. See the page "Policy gradients and preferences".

    ```python
    trainer = DiffusionDPOTrainer(
        pipeline="stabilityai/stable-diffusion-xl-base-1.0",
        args=DiffusionDPOConfig(output_dir="preferred", resolution=1024),
        train_dataset=load_dataset("imagefolder", data_dir="pairs", split="train"),
    )
    trainer.train()
    trainer.save_model()
    ```

    Args:
        pipeline, eval_dataset, peft_config, judge, compute_metrics, callbacks, optimizers: see [`PixelRewardTrainer`].
        args ([`DiffusionDPOConfig`], *optional*):
            The configuration.
        train_dataset (`Dataset`):
            The pairs, in the columns "prompt" (or "caption"), "chosen" and "rejected"; or "jpg_0", "jpg_1" and "label_0", as
            Pick-a-Pic has them. [`~diffusers_diffdoctor.treatment.write_preferences`] makes such a dataset of prompts and a reward.
        reward_funcs (`Callable`, `torch.nn.Module` or a list of them, *optional*):
            What scores held-out images. Training does not ask it.

    Raises:
        ValueError: an argument that cannot work; the message names it, the value found and what to do.
        FloatingPointError: during training, a loss or gradient that is not finite, before it reaches the weights.
    """

    config_class = DiffusionDPOConfig
    _tag_names = [*TreatmentTrainer._tag_names, "dpo"]
    _name = "Diffusion-DPO"
    _method = (
        "of pairs of images it learnt to draw rather the preferred one, by "
        "[Diffusion-DPO](https://huggingface.co/papers/2311.12908)"
    )

    def __init__(
        self,
        pipeline: str | os.PathLike | DiffusionPipeline,
        args: DiffusionDPOConfig | None = None,
        train_dataset: "Dataset | None" = None,
        eval_dataset: "Dataset | dict[str, Dataset] | None" = None,
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        peft_config: PeftConfig | None = None,
        judge: Any | None = None,
        compute_metrics: Callable[[torch.Tensor, Sequence[str]], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ):
        super().__init__(
            pipeline,
            reward_funcs,
            args,
            train_dataset,
            eval_dataset,
            peft_config,
            judge,
            compute_metrics,
            callbacks,
            optimizers,
        )
        self.pairs.latents(0, 0)  # a pipeline without a training loss is refused now
        self.plan = self._plan()
        logger.info(self.plan)

    # --- setup -------------------------------------------------------------------------------------------------------------

    def read_rows(self, train_dataset: Any) -> list[dict[str, Any]]:
        self.pairs = Pairs(train_dataset, self._encode)
        return [{"prompt": prompt, "pair": pair} for pair, prompt in enumerate(self.pairs.prompts)]

    def check_before_loading(self, args: DiffusionDPOConfig) -> None:
        self.pairs.check(show_progress=not args.disable_tqdm and args.process_index == 0)

    def build_rollout(self, args: DiffusionDPOConfig) -> PreferenceRollout:
        return build_rollout(self.pipeline, args, PreferenceRollout)

    def offline_prompts(self) -> list[str]:
        return self.pairs.prompts

    def _encode(self, picture: Image.Image) -> torch.Tensor:
        image = to_image_tensor(picture, (self.rollout.height, self.rollout.width))
        return self.rollout.encode_images(image[None].to(self.args.device))

    def _plan(self) -> str:
        args, count = self.args, sum(parameter.numel() for parameter in self.trained_parameters)
        update = args.per_device_train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes
        return (
            f"Diffusion-DPO on {self.base['pipeline'] or 'a loaded pipeline'} ({self.base['pipeline_class']}): {len(self.pairs)} "
            f"pairs, {update} of {self.rollout.height}x{self.rollout.width} pixels per update, beta {args.beta:g}, {count:,} "
            f"trained weights in {len(self.trained_parameters)} tensors."
        )

    # --- one step ------------------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean of [`dpo_loss`] over the pairs of the update."""
        prompts, pairs = inputs["prompt"], inputs["pair"]
        seeds = [derive_seed(self.args.seed, "preference", position) for position in inputs["position"]]
        latents = torch.cat([self.pairs.latents(pair, side) for side in (0, 1) for pair in pairs]).to(self.args.device)
        said = model(prompts=prompts * 2, latents=latents, noise_seeds=seeds * 2)
        target = said.target.float()
        errors, references = (offline_loss(each.float(), target) for each in (said.prediction, said.reference))
        (chosen, rejected), (chosen_reference, rejected_reference) = errors.chunk(2), references.chunk(2)
        loss, margin = dpo_loss(chosen, rejected, chosen_reference, rejected_reference, self.args.beta)
        self.stop_if_not_finite("preference", loss, prompts, seeds)
        metrics = {
            "loss/chosen": chosen,
            "loss/rejected": rejected,
            "preference/accuracy": (margin > 0).float() + 0.5 * (margin == 0).float(),
            "preference/margin": margin,
        }
        self.note(metrics, prompts, seeds)
        loss = self.share_of_mean(loss, num_items_in_batch)
        return (loss, said) if return_outputs else loss
