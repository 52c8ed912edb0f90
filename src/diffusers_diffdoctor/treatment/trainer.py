# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Treat a diffusion pipeline: push down the artifact confidence of its own images by gradient (arXiv 2501.12382, stage two).

One step reads: roll out, score, regularise, log. All else is every treatment's, see `base`.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import PeftConfig
from PIL import Image
from transformers import TrainerCallback, is_datasets_available
from transformers.utils import logging

from ..images import to_image_tensor
from ..rollout import DifferentiableRollout
from ..seeds import derive_seed
from .base import TreatmentTrainer
from .config import PixelRewardConfig
from .examine import diagnose_maps
from .image_check import check_images
from .losses import offline_loss
from .prepare import RewardFunc, build_rollout
from .samples import RegularizationImages


if is_datasets_available():
    from datasets import Dataset

logger = logging.get_logger(__name__)


class PixelRewardTrainer(TreatmentTrainer):
    """
    Trainer that teaches a diffusers pipeline, through a LoRA on its denoiser, not to make artifacts.

    Every step generates images with the pipeline itself, lets the rewards score them and backpropagates through the last
    denoising steps. See the page "Pixel reward trainer" for the maths and for what is logged.

    ```python
    trainer = PixelRewardTrainer(
        pipeline="black-forest-labs/FLUX.1-schnell",
        reward_funcs=ArtifactDetectorForSemanticSegmentation.from_pretrained("detector"),
        args=PixelRewardConfig(output_dir="flux-treated"),
        train_dataset=Dataset.from_dict({"prompt": ["a hand holding a cup"]}),
        regularization_dataset=photos,
    )
    trainer.train()
    trainer.save_model()
    ```

    Args:
        pipeline (`str`, `os.PathLike` or [`~diffusers.DiffusionPipeline`]):
            What to treat: an id on the Hub, a folder, or a loaded pipeline, which is then changed in place (frozen, given an
            adapter and, once prompts are cached, relieved of its text encoders).
        reward_funcs (`Callable`, `torch.nn.Module` or a list of them):
            What scores an image: an artifact detector, or a function `(images, prompts)` that returns a [`RewardOutput`] or
            one score per image, higher is better. `images` are (B, 3, H, W) in [0, 1]. Several are summed with
            `args.reward_weights`.
        args ([`PixelRewardConfig`], *optional*):
            The configuration.
        train_dataset (`Dataset`):
            The prompts, in the column "prompt".
        eval_dataset (`Dataset` or `dict[str, Dataset]`, *optional*):
            Held-out prompts. Evaluation generates them from fixed seeds.
        regularization_dataset (`Dataset`, *optional*):
            Images to stay close to, in the columns "image" and "prompt". Without it the offline loss is left out.
        peft_config ([`~peft.LoraConfig`], *optional*):
            The adapter. Built from `args.lora_*` without it.
        judge (*optional*):
            A second detector (anything with `confidence(images)`) that training never sees; its figures are logged with the
            prefix `eval_judge_`.
        compute_metrics (`Callable`, *optional*):
            `(images, prompts) -> dict` of further figures of an evaluation. Runs on the main process.
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*):
            Further callbacks.
        optimizers (`tuple`, *optional*):
            Optimizer and schedule to use instead of those of `args`.

    Raises:
        ValueError: an argument that cannot work; the message names it, the value found and what to do.
        FloatingPointError: during training, a loss or gradient that is not finite, before it reaches the weights.
    """

    config_class = PixelRewardConfig

    def __init__(
        self,
        pipeline: str | os.PathLike | DiffusionPipeline,
        reward_funcs: RewardFunc | list[RewardFunc],
        args: PixelRewardConfig | None = None,
        train_dataset: "Dataset | None" = None,
        eval_dataset: "Dataset | dict[str, Dataset] | None" = None,
        regularization_dataset: "Dataset | None" = None,
        peft_config: PeftConfig | None = None,
        judge: Any | None = None,
        compute_metrics: Callable[[torch.Tensor, Sequence[str]], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ):
        args = self.checked_args(args)
        self.regularization = None
        if regularization_dataset is not None and args.offline_weight > 0:
            self.regularization = RegularizationImages(regularization_dataset, args.seed, self._encode)
        elif args.offline_weight > 0:
            logger.warning(
                "No `regularization_dataset` was passed: the offline loss is left out (`offline_weight=0`)."
            )
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
        if self.regularization is not None:
            self.regularization.latents(self.regularization.row(0))  # a pipeline without offline loss is refused now
        self.plan = self._plan(len(self.train_dataset))
        logger.info(self.plan)

    # --- setup -------------------------------------------------------------------------------------------------------------

    def check_before_loading(self, args: PixelRewardConfig) -> None:
        if self.regularization is None and not args.pixel_weight * sum(self.reward.weights):
            raise ValueError(
                f"`pixel_weight` is {args.pixel_weight} with `reward_weights` {self.reward.weights}, and there is no offline "
                "loss: nothing would be learnt. Raise them, or pass a `regularization_dataset`."
            )
        if self.regularization is not None:  # it may take minutes, as loading the pipeline does
            check_images(
                self.regularization.dataset,
                "regularization_dataset",
                args.process_index,
                args.world_size,
                show_progress=not args.disable_tqdm,
            )

    def build_rollout(self, args: PixelRewardConfig) -> DifferentiableRollout:
        return build_rollout(self.pipeline, args, placement=args.placement)

    def offline_prompts(self) -> list[str]:
        return [] if self.regularization is None else self.regularization.prompts

    def _encode(self, picture: Image.Image) -> torch.Tensor:
        image = to_image_tensor(picture, (self.rollout.height, self.rollout.width))
        return self.rollout.encode_images(image[None].to(self.args.device))

    def _plan(self, num_prompts: int) -> str:
        args, count = self.args, sum(parameter.numel() for parameter in self.trained_parameters)
        update = args.per_device_train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes
        # the arguments, which may have named one side only
        given = {"height": args.height, "width": args.width}
        default = " and ".join(f"`{name}`" for name, value in given.items() if value is None)
        why = f" (the pipeline's default of {default}; `resolution` sets both)" if default else ""
        offline = args.offline_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes
        return (
            f"Treatment of {self.base['pipeline'] or 'a loaded pipeline'} ({self.base['pipeline_class']}): {num_prompts} "
            f"prompts, {update} images of {self.rollout.height}x{self.rollout.width} pixels{why} per update, gradient through "
            f"{self.rollout.placement.describe(args.num_inference_steps)}, "
            f"{offline if self.regularization is not None else 0} regularization images per update, "
            f"{count:,} trained weights in {len(self.trained_parameters)} tensors."
        )

    # --- one step ------------------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Give the regularization images of every batch their positions in the run, as the base gives its samples theirs."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch, block in zip(batches, self.blocks(len(batches))):
            start = block * self.args.offline_batch_size
            batch["offline_position"] = list(range(start, start + self.args.offline_batch_size))
            # the same for all processes, as for one that takes all of their samples
            number = block // self.accelerator.num_processes
            batch["placement_seed"] = derive_seed(self.args.seed, "placement", number)
        return batches, count

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """`pixel_weight * sum(w_k * reward_k) + offline_weight * offline + drift_weight * drift`, each a mean over the samples
        of the update."""
        args, prompts = self.args, inputs["prompt"]
        seeds = [derive_seed(args.seed, "rollout", position) for position in inputs["position"]]
        regularization = self._regularization_batch(inputs["offline_position"])
        rollout = model(
            prompts=prompts,
            seeds=seeds,
            drift=args.drift_weight > 0,
            placement_seed=inputs["placement_seed"],
            **regularization,
        )
        shown, drawn_from = prompts * rollout.repeats, seeds * rollout.repeats
        with torch.set_grad_enabled(args.pixel_weight > 0):  # else it is for the log only, and needs no gradient
            reward = self.reward(rollout.images.float(), shown)
        self.stop_if_not_finite("pixel", reward.loss, shown, drawn_from)
        loss = args.pixel_weight * self.share_of_mean(reward.loss / rollout.repeats, num_items_in_batch)
        metrics = {"loss/pixel": reward.loss, "reward": reward.score}
        if rollout.drift is not None:
            self.stop_if_not_finite("drift", rollout.drift, prompts, seeds)
            loss = loss + args.drift_weight * self.share_of_mean(rollout.drift, num_items_in_batch)
            metrics["loss/drift"] = rollout.drift
        if rollout.prediction is not None:
            offline = offline_loss(rollout.prediction.float(), rollout.target.float())
            self.stop_if_not_finite("offline", offline, prompts, seeds)
            loss = loss + args.offline_weight * offline.mean() / self.current_gradient_accumulation_steps
            metrics["loss/offline"] = offline
        metrics |= {f"rewards/{name}": score for name, score in reward.parts.items()}
        metrics |= diagnose_maps(reward.map.detach()) if reward.map is not None else {}
        self.note(metrics, prompts, seeds)
        return (loss, rollout) if return_outputs else loss

    def _regularization_batch(self, positions: list[int]) -> dict[str, Any]:
        if self.regularization is None:
            return {}
        rows = [self.regularization.row(position) for position in positions]
        return {
            "regularization_latents": torch.cat([self.regularization.latents(row) for row in rows]).to(
                self.args.device
            ),
            "regularization_prompts": [self.regularization.prompts[row] for row in rows],
            "regularization_seeds": [derive_seed(self.args.seed, "offline", position) for position in positions],
        }
