# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Treat a diffusion pipeline: push down the artifact confidence of its own images by gradient (arXiv 2501.12382, stage two).

One step reads: roll out, score, regularise, log. What is left out on purpose: sharded models (the trained part is a LoRA, so
data parallelism is enough), training of text encoders, and streaming prompt datasets (every prompt is checked before training).
"""

import json
import math
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from diffusers import DiffusionPipeline
from peft import PeftConfig
from transformers import Trainer, TrainerCallback, is_datasets_available, set_seed
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import TrainOutput, rotate_checkpoints, speed_metrics
from transformers.utils import logging

from ..seeds import derive_seed
from .adapter import add_lora, load_lora, lora_files, save_lora
from .checkpoint import (
    LIVE_LORA_FILE,
    RECORD_FILE,
    STATE_FILE,
    LoraAverage,
    check_same_base,
    describe_base,
    last_checkpoint,
    written_whole,
)
from .config import DTYPES, PixelRewardConfig
from .examine import Sample, diagnose_maps, draw, examine, mean_figures, show_in_trackers, write_training_report
from .losses import offline_loss
from .model_card import upload, write_model_card
from .prepare import RewardFunc, build_reward, check_detector, load_pipeline
from .rollout import DifferentiableRollout
from .samples import RegularizationImages, read_prompts


if is_datasets_available():
    from datasets import Dataset

logger = logging.get_logger(__name__)

# Encoded regularization images in memory, 0.5 MB each for FLUX at 1024 pixels; those beyond are encoded at every use.
LATENTS_KEPT = 4096


class PixelRewardTrainer(Trainer):
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

    _tag_names = ["diffdoctor", "text-to-image", "diffusers", "lora", "template:diffusion-lora"]
    _name = "DiffDoctor"
    _paper = {
        "title": "DiffDoctor: Diagnosing Image Diffusion Models Before Treating",
        "id": "2501.12382",
    }
    # `compute_loss` returns its share of the mean over all samples of the update
    loss_is_scaled_for_ga = True

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
        args = PixelRewardConfig("treated") if args is None else args
        if not isinstance(args, PixelRewardConfig):
            raise TypeError(f"`args` is a {type(args).__name__}, but must be a `PixelRewardConfig`.")
        prompts = read_prompts(train_dataset, "train_dataset")
        self.eval_prompts = {
            name: read_prompts(dataset, f"eval_dataset[{name!r}]" if name else "eval_dataset")
            for name, dataset in _named(eval_dataset).items()
        }
        self.reward = build_reward(reward_funcs, args)
        if judge is not None and not callable(getattr(judge, "confidence", None)):
            raise TypeError(f"`judge` is a {type(judge).__name__}, but must have a method `confidence(images)`.")
        check_detector(judge, "judge")
        self.judge = judge
        self.image_metrics = compute_metrics

        set_seed(args.seed)
        self.pipeline = load_pipeline(pipeline, DTYPES[args.pipeline_dtype], args.quantization)
        self.rollout = self._build_rollout(args, peft_config)
        self.regularization = None
        if regularization_dataset is not None and args.offline_weight > 0:
            size = (self.rollout.height, self.rollout.width)
            self.regularization = RegularizationImages(regularization_dataset, size, args.seed)
        elif args.offline_weight > 0:
            logger.warning(
                "No `regularization_dataset` was passed: the offline loss is left out (`offline_weight=0`)."
            )

        self._encode_prompts(args, prompts)

        self._latent_cache: dict[int, torch.Tensor] = {}
        self.average: LoraAverage | None = None
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._before: dict[str, list[Sample]] = {}  # held-out images of the untreated pipeline, by prefix
        self.before_and_after: tuple[list[Sample], list[Sample]] = (
            [],
            [],
        )  # those of the last evaluation that are drawn
        self._samples: list[tuple[str, int]] = []  # prompts and seeds since the last update, to name in an error
        self._log_file_is_ours = False

        super().__init__(
            model=self.rollout,
            args=args,
            data_collator=_collate,
            train_dataset=[{"prompt": prompt} for prompt in prompts],
            eval_dataset=eval_dataset,
            callbacks=[*(callbacks or []), _AfterStep(self)],
            optimizers=optimizers,
        )
        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(
                f"`PixelRewardTrainer` does not shard models ({self.accelerator.distributed_type}): the trained part is a "
                "LoRA. Launch with plain data parallelism, see examples/accelerate/multi_gpu.yaml."
            )
        self.pipeline.to(args.device)
        for module in [self.reward, self.judge]:
            if isinstance(module, torch.nn.Module):
                module.requires_grad_(False).eval().to(args.device)
        if self.regularization is not None:
            self._latents(self.regularization.row(0))  # a family without offline loss is refused now
        if args.ema_decay is not None:
            self.average = LoraAverage(self.trained_parameters, args.ema_decay)
        logger.info(self._plan(len(prompts)))

    # --- setup -------------------------------------------------------------------------------------------------------------

    def _build_rollout(self, args: PixelRewardConfig, peft_config: PeftConfig | None) -> DifferentiableRollout:
        rollout = DifferentiableRollout(
            self.pipeline,
            height=args.height,
            width=args.width,
            num_inference_steps=args.num_inference_steps,
            gradient_fraction=args.gradient_fraction,
            guidance_scale=args.guidance_scale,
            max_sequence_length=args.max_sequence_length,
            pipeline_kwargs=args.pipeline_kwargs,
            offline_sigmas=args.offline_sigmas,
            offline_guidance_scale=args.offline_guidance_scale,
        )
        self.base = describe_base(self.pipeline, rollout.denoiser_name)
        self.peft_config = add_lora(self.pipeline, rollout.denoiser_name, args, peft_config)
        if args.gradient_checkpointing:
            rollout.enable_gradient_checkpointing()
        rollout.vae_gradient_checkpointing = args.vae_gradient_checkpointing
        return rollout

    def _encode_prompts(self, args: PixelRewardConfig, prompts: list[str]) -> None:
        """Encode all prompts, then drop the text encoders, before the denoiser comes to the device."""
        if not args.cache_prompt_embeddings:
            return
        for name, component in self.pipeline.components.items():
            if name.startswith("text_encoder") and component is not None:
                component.to(args.device)
        known = [prompts, *self.eval_prompts.values()]
        known += [self.regularization.prompts] if self.regularization is not None else []
        self.rollout.cache_prompts(list(dict.fromkeys(prompt for part in known for prompt in part)))
        if args.free_text_encoders:
            self.rollout.free_text_encoders()

    def _plan(self, num_prompts: int) -> str:
        args, count = self.args, sum(parameter.numel() for parameter in self.trained_parameters)
        update = args.per_device_train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes
        offline = args.offline_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes
        return (
            f"Treatment of {self.base['pipeline'] or 'a loaded pipeline'} ({self.base['pipeline_class']}): {num_prompts} "
            f"prompts, {update} images of {self.rollout.height}x{self.rollout.width} per update, gradient through the last "
            f"{self.rollout.gradient_steps} of {args.num_inference_steps} steps, "
            f"{offline if self.regularization is not None else 0} regularization images per update, "
            f"{count:,} trained weights in {len(self.trained_parameters)} tensors."
        )

    @property
    def trained_parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.rollout.parameters() if parameter.requires_grad]

    # --- one step ------------------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Give every sample its position in the run, and count the samples of the update over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        first = self.state.global_step * self.args.gradient_accumulation_steps
        for i, batch in enumerate(batches):
            block = (first + i) * world + rank
            start, offline = block * self._train_batch_size, block * self.args.offline_batch_size
            batch["position"] = list(range(start, start + len(batch["prompt"])))
            batch["offline_position"] = list(range(offline, offline + self.args.offline_batch_size))
        count = torch.tensor(float(sum(len(batch["prompt"]) for batch in batches)), device=device)
        return batches, self.accelerator.reduce(count)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """`pixel_weight * sum(w_k * reward_k) + offline_weight * offline + drift_weight * drift`, each a mean over the samples
        of the update."""
        args, prompts = self.args, inputs["prompt"]
        seeds = [derive_seed(args.seed, "rollout", position) for position in inputs["position"]]
        regularization = self._regularization_batch(inputs["offline_position"])
        rollout = model(prompts=prompts, seeds=seeds, drift=args.drift_weight > 0, **regularization)
        reward = self.reward(rollout.images.float(), prompts)
        self._stop_if_not_finite("pixel", reward.loss, prompts, seeds)
        # DDP averages the gradients of the processes, so each takes its sum times their number over the count of all.
        world = self.accelerator.num_processes
        loss = args.pixel_weight * reward.loss.sum() * world / num_items_in_batch
        metrics = {"loss/pixel": reward.loss, "reward": reward.score}
        if rollout.drift is not None:
            self._stop_if_not_finite("drift", rollout.drift, prompts, seeds)
            loss = loss + args.drift_weight * rollout.drift.sum() * world / num_items_in_batch
            metrics["loss/drift"] = rollout.drift
        if rollout.prediction is not None:
            offline = offline_loss(rollout.prediction.float(), rollout.target.float())
            self._stop_if_not_finite("offline", offline, prompts, seeds)
            loss = loss + args.offline_weight * offline.mean() / self.current_gradient_accumulation_steps
            metrics["loss/offline"] = offline
        metrics |= {f"rewards/{name}": score for name, score in reward.parts.items()}
        metrics |= diagnose_maps(reward.map.detach()) if reward.map is not None else {}
        for name, values in metrics.items():
            self._metrics["train"][name].append(values.detach().float().mean())
        self._samples += zip(prompts, seeds)
        return (loss, rollout) if return_outputs else loss

    def _regularization_batch(self, positions: list[int]) -> dict[str, Any]:
        if self.regularization is None:
            return {}
        rows = [self.regularization.row(position) for position in positions]
        return {
            "regularization_latents": torch.cat([self._latents(row) for row in rows]),
            "regularization_prompts": [self.regularization.prompts[row] for row in rows],
            "regularization_seeds": [derive_seed(self.args.seed, "offline", position) for position in positions],
        }

    def _latents(self, row: int) -> torch.Tensor:
        """Latents of a regularization image, (1, C, h, w). Encoded alone, so that they do not depend on who shares a batch."""
        latents = self._latent_cache.get(row)
        if latents is None:
            latents = self.rollout.encode_images(self.regularization.image(row)[None].to(self.args.device))
            if len(self._latent_cache) < LATENTS_KEPT:
                self._latent_cache[row] = latents.cpu()
        return latents.to(self.args.device)

    def _stop_if_not_finite(
        self, name: str, losses: torch.Tensor, prompts: Sequence[str], seeds: Sequence[int]
    ) -> None:
        bad = (~torch.isfinite(losses.detach())).nonzero().flatten().tolist()
        if bad:
            # the samples of the offline loss are others than the prompts, so it names all of the step
            culprits = [(prompts[i], seeds[i]) for i in bad] if name != "offline" else list(zip(prompts, seeds))
            self._stop(f"The {name} loss is {losses[bad[0]].item()}", culprits)

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not math.isfinite(norm) and self.accelerator.scaler is None:  # a scaler skips such steps by itself
            self._stop(f"The gradient's norm is {float(norm)}", self._samples)
        self._samples = []
        return norm

    def _stop(self, what: str, culprits: Sequence[tuple[str, int]]) -> None:
        named = ", ".join(f"{prompt!r} (seed {seed})" for prompt, seed in culprits[:4])
        raise FloatingPointError(
            f"{what} in step {self.state.global_step + 1}, for {named}. The weights were not updated. Resume from the last "
            "checkpoint with a lower `learning_rate` or `max_grad_norm`, or in float32 (`pipeline_dtype`, `bf16=False`)."
        )

    # --- logging -------------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        names = sorted(self._metrics[mode])
        if names:
            means = torch.stack([torch.stack(self._metrics[mode][name]).mean() for name in names])
            means = self.accelerator.reduce(means, reduction="mean").tolist()
            logs.update(zip(names if mode == "train" else [f"eval_{name}" for name in names], means))
            self._metrics[mode].clear()
        super().log(logs, start_time)
        if self.is_world_process_zero():
            with open(Path(self.args.output_dir, "metrics.jsonl"), "a" if self._log_file_is_ours else "w") as file:
                file.write(json.dumps(self.state.log_history[-1]) + "\n")
            self._log_file_is_ours = True

    # --- evaluation ----------------------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any | None = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """
        Generate the held-out prompts from fixed seeds, score them and log the figures, a picture and the report.

        Args:
            eval_dataset (`Dataset` or `dict[str, Dataset]`, *optional*):
                Other prompts than those of the trainer. With `cache_prompt_embeddings` and freed text encoders only prompts
                known at the start can be generated.
            ignore_keys: not used.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`):
                Prefix of the figures.

        Returns:
            `dict[str, float]`: `eval_artifact_frequency` (share of images whose maximum confidence is at least 0.5),
            `eval_max_confidence`, `eval_area_ratio`, all by the detector that is trained against, `eval_reward`, the same by
            the judge as `eval_judge_*`, what `compute_metrics` returns, and the run time in seconds.
        """
        sets = self.eval_prompts
        if eval_dataset is not None:
            sets = {name: read_prompts(data, "eval_dataset") for name, data in _named(eval_dataset).items()}
        if not sets:
            raise ValueError("`eval_dataset` is missing: pass held-out prompts to the trainer or to `evaluate()`.")
        metrics = {}
        for name, prompts in sets.items():
            metrics |= self._evaluate_prompts(prompts, f"{metric_key_prefix}_{name}" if name else metric_key_prefix)
        return metrics

    def _evaluate_prompts(self, prompts: list[str], prefix: str) -> dict[str, float]:
        start, args = time.time(), self.args
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        indices = list(range(args.eval_num_images))
        prompts = [prompts[i % len(prompts)] for i in indices]
        was_training = self.model.training
        self.model.eval()
        drawn = indices[: args.log_images] if self.is_world_process_zero() else []
        if [sample.prompt for sample in self._before.get(prefix, [])] != [prompts[i] for i in drawn]:
            self._before[prefix] = self._examine(prompts, drawn, treated=False)
        mine = self._examine(prompts, indices[rank::world], treated=True)
        samples = sorted(gather_object(mine), key=lambda sample: sample.seed)
        figures = mean_figures(samples)
        if self.image_metrics is not None:
            extra = [None]
            if self.is_world_process_zero():
                extra = [dict(self.image_metrics(torch.stack([sample.image for sample in samples]), prompts))]
            figures |= broadcast_object_list(extra)[0]
        metrics = {f"{prefix}_{name}": float(value) for name, value in figures.items()}
        metrics |= speed_metrics(prefix, start, num_samples=len(indices))
        self.log(metrics)
        if self.is_world_process_zero() and drawn:
            before, after = self._before[prefix], samples[: len(drawn)]
            self.before_and_after = (before, after)
            picture, step = draw(before, after), self.state.global_step
            folder = Path(args.output_dir, "eval" if prefix == "eval" else prefix.replace("eval_", "eval-"))
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(folder / f"step-{step}.png")
            show_in_trackers(self.callback_handler.callbacks, f"{prefix}/images", picture, step)
        self.write_report()
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        self.model.train(was_training)
        return metrics

    def _examine(self, prompts: list[str], indices: Sequence[int], treated: bool) -> list[Sample]:
        return examine(
            lambda prompts, seeds: self.generate(prompts, seeds, treated),
            self.reward,
            self.judge,
            [prompts[i] for i in indices],
            [self.args.eval_seed + i for i in indices],
            self.args.per_device_eval_batch_size,
            self.args.device,
        )

    def generate(self, prompts: list[str], seeds: list[int], treated: bool = True) -> torch.Tensor:
        """
        Images of the pipeline on this process, with the LoRA (its moving average, if there is one) or without it.

        Args:
            prompts (`list[str]`): B prompts. Once the text encoders are freed, only prompts known at the start work.
            seeds (`list[int]`): B seeds of the noise.
            treated (`bool`, *optional*, defaults to `True`): `False` for the pipeline as it was.

        Returns:
            `torch.Tensor`: (B, 3, H, W) in [0, 1], on the CPU.
        """
        denoiser, was_training = self.rollout.denoiser, self.rollout.training
        self.rollout.eval()
        if not treated:
            denoiser.disable_adapters()
        try:
            with self.averaged_weights(), self.accelerator.autocast():
                return self.rollout.generate(prompts, seeds, batch_size=self.args.per_device_eval_batch_size)
        finally:
            if not treated:
                denoiser.enable_adapters()
            self.rollout.train(was_training)

    def averaged_weights(self):
        """Context in which the LoRA is the moving average of `ema_decay`, or itself without one."""
        return self.average.in_place() if self.average is not None else nullcontext()

    def write_report(self) -> None:
        """Refresh `training_report.html` in the output folder."""
        if self.is_world_process_zero():
            title = f"Treatment of {self.base['pipeline'] or self.base['pipeline_class']}"
            write_training_report(self.args.output_dir, self.state.log_history, title)

    # --- checkpoints ---------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As in [`~transformers.Trainer`]; `resume_from_checkpoint=True` takes the last checkpoint that is whole."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
        if resume_from_checkpoint:
            check_same_base(resume_from_checkpoint, self.base)
            self._keep_log_until(resume_from_checkpoint)
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint, STATE_FILE)))
            if (
                0 < self.args.max_steps <= state.global_step
            ):  # the parent would take one more step in an epoch half done
                logger.warning(f"Nothing to train: {resume_from_checkpoint} has all of {self.args.max_steps} steps.")
                self._load_from_checkpoint(resume_from_checkpoint)
                self.state = state
                return TrainOutput(state.global_step, 0.0, {})
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    def _keep_log_until(self, checkpoint: str) -> None:
        path = Path(self.args.output_dir, "metrics.jsonl")
        if self.is_world_process_zero() and path.is_file():
            step = json.loads(Path(checkpoint, STATE_FILE).read_text())["global_step"]
            lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
            path.write_text("".join(f"{line}\n" for line in lines))
            self._log_file_is_ours = True

    def _save_checkpoint(self, model, trial):
        """The parent's steps, but into a folder that gets its name once it is whole."""
        args, state = self.args, self.state
        self.store_flos()
        run_dir = self._get_output_dir(trial=trial)
        folder = os.path.join(run_dir, f"checkpoint-{state.global_step}")
        with written_whole(folder, self.accelerator, args.should_save) as partial:
            self.save_model(partial, _internal_call=True)
            if state.best_global_step:
                best = os.path.join(run_dir, f"checkpoint-{state.best_global_step}")
                if best == folder or os.path.isdir(best):
                    state.best_model_checkpoint = best
            if not args.save_only_model:
                self._save_optimizer_and_scheduler(partial)
                self._save_scaler(partial)
                self._save_rng_state(partial)
            if args.should_save:
                if self.average is not None:
                    save_lora(self.pipeline, self.rollout.denoiser_name, partial, LIVE_LORA_FILE)
                for callback in [*self.callback_handler.callbacks, self.control]:
                    if isinstance(callback, ExportableState):
                        state.stateful_callbacks[type(callback).__name__] = callback.state()
                state.save_to_json(os.path.join(partial, STATE_FILE))
        if args.push_to_hub:
            self._push_from_checkpoint(folder)
        if args.should_save:
            rotate_checkpoints(run_dir, args.save_total_limit, state.best_model_checkpoint, use_mtime=True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the LoRA in the format of diffusers and, when called by the user, the model card."""
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        self._save(output_dir)
        if not _internal_call:
            self.create_model_card(output_dir=output_dir)
            if self.args.push_to_hub:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder, name = Path(output_dir if output_dir is not None else self.args.output_dir), self.rollout.denoiser_name
        folder.mkdir(parents=True, exist_ok=True)
        with self.averaged_weights():
            save_lora(self.pipeline, name, folder)
        record = {"base": self.base, "step": self.state.global_step, "args": self.args.to_sanitized_dict()}
        (folder / RECORD_FILE).write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        folder, denoiser, name = Path(resume_from_checkpoint), self.rollout.denoiser, self.rollout.denoiser_name
        load_lora(denoiser, name, folder)
        if self.average is not None:
            self.average.copy_from_parameters()
            if (folder / LIVE_LORA_FILE).is_file():
                load_lora(denoiser, name, folder / LIVE_LORA_FILE)

    def _load_best_model(self) -> None:
        logger.info(f"Loading the best LoRA, of {self.state.best_model_checkpoint} ({self.state.best_metric}).")
        load_lora(self.rollout.denoiser, self.rollout.denoiser_name, self.state.best_model_checkpoint)
        if self.average is not None:
            self.average.copy_from_parameters()

    # --- sharing -------------------------------------------------------------------------------------------------------------

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        license: str | None = None,
        language: str | list[str] | None = None,
        output_dir: str | os.PathLike | None = None,
        **kwargs,
    ) -> None:
        """
        Write `README.md`, with the images before and after in `images/`.

        Args:
            model_name (`str`, *optional*): title; the name of the output folder without it.
            dataset (`str` or `list[str]`, *optional*): Hub ids of the prompts or the regularization images.
            tags (`str` or `list[str]`, *optional*): further tags.
            license (`str`, *optional*): licence of the LoRA; usually that of the base.
            language (`str` or `list[str]`, *optional*): language of the prompts.
            output_dir (`str`, *optional*): folder to write to; `args.output_dir` without it.
        """
        if self.is_world_process_zero():
            tags = [tags] if isinstance(tags, str) else list(tags or [])
            metadata = {"datasets": dataset, "license": license, "language": language}
            write_model_card(self, Path(output_dir or self.args.output_dir), model_name, tags, metadata)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero() and self.args.hub_strategy != "end":
            for file in lora_files(checkpoint_folder):
                shutil.copy(file, self.args.output_dir)
            self.create_model_card()
            upload(self, checkpoint_folder)


class _AfterStep(TrainerCallback):
    """Moves the average on after each update, and refreshes the report when training ends."""

    def __init__(self, trainer: PixelRewardTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.average is not None:
            self.trainer.average.update(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.write_report()


def _collate(rows: list[dict[str, str]]) -> dict[str, list[str]]:
    return {"prompt": [row["prompt"] for row in rows]}


def _named(dataset: Any) -> Mapping[str, Any]:
    if dataset is None:
        return {}
    return dataset if isinstance(dataset, dict) else {"": dataset}
