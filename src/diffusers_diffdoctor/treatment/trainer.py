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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from diffusers import DiffusionPipeline
from diffusers.training_utils import EMAModel
from peft import PeftConfig
from transformers import Trainer, TrainerCallback, is_datasets_available, set_seed
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import TrainOutput, speed_metrics
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from ..rollout import DifferentiableRollout
from ..seeds import derive_seed
from .adapter import add_lora, load_lora, loading_lines, lora_files, save_lora, scaling_call
from .checkpoint import (
    LIVE_LORA_FILE,
    STATE_FILE,
    apply_settings,
    check_resumable,
    check_same_optimizer,
    describe_adapter,
    describe_base,
    describe_optimizer,
    describe_prompts,
    differences,
    flush_to_disk,
    last_checkpoint,
    read_record,
    remove_checkpoint,
    write_record,
)
from .config import DTYPES, PixelRewardConfig
from .examine import Sample, diagnose_maps, draw, examine, mean_figures, show_in_trackers, write_training_report
from .losses import offline_loss
from .model_card import Treatment, upload, write_model_card
from .prepare import RewardFunc, build_reward, check_detector, load_pipeline
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

        if self.regularization is None and not args.pixel_weight * sum(self.reward.weights):
            raise ValueError(
                f"`pixel_weight` is {args.pixel_weight} with `reward_weights` {self.reward.weights}, and there is no offline "
                "loss: nothing would be learnt. Raise them, or pass a `regularization_dataset`."
            )
        self._encode_prompts(args, prompts)

        self._latent_cache: dict[int, torch.Tensor] = {}
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._before: dict[str, list[Sample]] = {}  # held-out images of the untreated pipeline, by prefix
        self._after: dict[str, tuple[int, list[Sample]]] = {}  # the same with the LoRA, and the step it was at
        self._best_step: int | None = None  # step of the LoRA that `load_best_model_at_end` has loaded
        self._optimizer_as_asked: dict[str, Any] | None = None
        self._resumed: dict[str, Any] | None = None  # the record of the checkpoint that is continued
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
            self._latents(self.regularization.row(0))  # a pipeline without offline loss is refused now
        self._start_average()
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
        self.rollout.cache_prompts(list(dict.fromkeys(prompt for part in known for prompt in part)))
        if self.regularization is not None:
            self.rollout.cache_prompts(list(dict.fromkeys(self.regularization.prompts)), offline=True)
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

    def _warn_of_idle_weights(self) -> None:
        """Name trained weights that the loss does not reach. A gradient of 0 is none of that: all have it behind a new B."""
        trained = [(name, weight) for name, weight in self.rollout.named_parameters() if weight.requires_grad]
        idle = [name for name, weight in trained if weight.grad is None]
        if idle:
            logger.warning(
                f"{len(idle)} of {len(trained)} adapter weights get no gradient, the first is {idle[0]}: the steps that carry "
                "gradient do not use these layers, or use other objects than the adapter is on (an offloaded, compiled or "
                "replaced denoiser). They stay untrained."
            )

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
        metrics, samples = self._measure(prompts, prefix, treated=True)
        drawn = samples[: self.args.log_images]
        if self.is_world_process_zero() and drawn:
            step = self.state.global_step
            self._after[prefix] = (self.lora_step, drawn)
            picture = draw(self._drawn(prompts, prefix, treated=False), drawn)
            folder = Path(self.args.output_dir, "eval" if prefix == "eval" else prefix.replace("eval_", "eval-"))
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(folder / f"step-{step}.png")
            show_in_trackers(self.callback_handler.callbacks, f"{prefix}/images", picture, step)
        self.write_report()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _measure_untreated(self) -> None:
        """Log the figures of the pipeline without the LoRA, on the same prompts and seeds as all evaluations, as step 0."""
        for name, prompts in self.eval_prompts.items():
            prefix = f"eval_{name}" if name else "eval"
            _, samples = self._measure(prompts, prefix, treated=False)
            self._before[prefix] = samples[: self.args.log_images]

    def _measure(self, prompts: list[str], prefix: str, treated: bool) -> tuple[dict[str, float], list[Sample]]:
        """Generate and judge on all processes, log the figures, and return them with the samples."""
        start, count = time.time(), self.args.eval_num_images
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        was_training = self.model.training
        self.model.eval()
        mine = self._examine(prompts, range(count)[rank::world], treated)
        samples = sorted(gather_object(mine), key=lambda sample: sample.seed)
        figures = mean_figures(samples)
        if self.image_metrics is not None:
            extra = [None]
            if self.is_world_process_zero():
                images, texts = zip(*((sample.image, sample.prompt) for sample in samples))
                extra = [dict(self.image_metrics(torch.stack(images), list(texts)))]
            figures |= broadcast_object_list(extra)[0]
        metrics = {f"{prefix}_{name}": float(value) for name, value in figures.items()}
        metrics |= speed_metrics(prefix, start, num_samples=count)
        self.log(metrics)
        self.model.train(was_training)
        return metrics, samples

    def _drawn(self, prompts: list[str], prefix: str, treated: bool) -> list[Sample]:
        """The samples that are shown, by the LoRA as it is or without it; made again where those at hand are others."""
        step, samples = (
            self._after.get(prefix, (None, [])) if treated else (self.lora_step, self._before.get(prefix, []))
        )
        shown = range(min(self.args.log_images, self.args.eval_num_images))
        if step != self.lora_step or [sample.prompt for sample in samples] != [
            prompts[i % len(prompts)] for i in shown
        ]:
            samples = self._examine(prompts, shown, treated)
        if treated:
            self._after[prefix] = (self.lora_step, samples)
        else:
            self._before[prefix] = samples
        return samples

    def before_and_after(self) -> tuple[list[Sample], list[Sample]]:
        """The first `log_images` held-out prompts without the LoRA and with it as it is, if evaluations were logged. For the
        main process."""
        name, prompts = next(iter(self.eval_prompts.items()), ("", []))
        prefix = f"eval_{name}" if name else "eval"
        if not any(f"{prefix}_reward" in entry for entry in self.state.log_history):
            return [], []
        return self._drawn(prompts, prefix, treated=False), self._drawn(prompts, prefix, treated=True)

    def _examine(self, prompts: list[str], indices: Sequence[int], treated: bool) -> list[Sample]:
        return examine(
            lambda prompts, seeds: self.generate(prompts, seeds, treated),
            self.reward,
            self.judge,
            [prompts[i % len(prompts)] for i in indices],
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

    def _start_average(self) -> None:
        """Moving average of the LoRA, with the weights as they are for its first value; None without `ema_decay`."""
        decay = self.args.ema_decay
        self.average = None if decay is None else EMAModel(self.trained_parameters, decay=decay)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Context in which the LoRA is the moving average of `ema_decay`, or itself without one."""
        parameters = self.trained_parameters if self.average is not None else []
        live = [parameter.detach().clone() for parameter in parameters]  # `EMAModel.store` cannot be nested
        if self.average is not None:
            self.average.copy_to(parameters)
        try:
            yield
        finally:
            for parameter, value in zip(parameters, live):
                parameter.data.copy_(value)

    def write_report(self) -> None:
        """Refresh `training_report.html` in the output folder."""
        if self.is_world_process_zero():
            title = f"Treatment of {self.base['pipeline'] or self.base['pipeline_class']}"
            write_training_report(self.args.output_dir, self.state.log_history, title)

    # --- checkpoints ---------------------------------------------------------------------------------------------------------

    @property
    def lora_step(self) -> int:
        """The step whose weights the LoRA has: the last one, or the best one where it was loaded at the end."""
        return self.state.global_step if self._best_step is None else self._best_step

    def record(self) -> dict[str, Any]:
        """What is written beside a LoRA: what was treated, how, and how far."""
        return {
            "base": self.base,
            "step": self.lora_step,
            "adapter": describe_adapter(self.peft_config),
            "average_updates": None if self.average is None else self.average.optimization_step,
            "optimizer": self._optimizer_as_asked,
            "schedule": None if self.lr_scheduler is None else type(self.lr_scheduler).__name__,
            "samples_per_update": self.get_total_train_batch_size(self.args),
            "processes": self.args.world_size,
            "prompts": describe_prompts([row["prompt"] for row in self.train_dataset]),
            "args": self.args.to_sanitized_dict(),
        }

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As in [`~transformers.Trainer`]; `resume_from_checkpoint=True` takes the last checkpoint that is whole.

        A resumed run does what its arguments say from its first step on: a changed learning rate, schedule or optimizer
        setting is the one used, at the checkpoint's position. Differing arguments are logged.

        Raises:
            ValueError: the checkpoint cannot be continued; see [`~treatment.checkpoint.check_resumable`].
        """
        self._best_step = self._resumed = None
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
        if resume_from_checkpoint:
            check_resumable(resume_from_checkpoint, self.record(), self.args.ignore_data_skip)
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint, STATE_FILE)))
            self._keep_log_until(state.global_step)
            if (
                0 < self.args.max_steps <= state.global_step
            ):  # the parent would take one more step in an epoch half done
                logger.warning(f"Nothing to train: {resume_from_checkpoint} has all of {self.args.max_steps} steps.")
                self._load_from_checkpoint(resume_from_checkpoint)
                self.state = state
                return TrainOutput(state.global_step, 0.0, {})
            self._resumed = read_record(resume_from_checkpoint)
            differing = differences(self._resumed, self.record())
            if differing:
                logger.warning(f"Resuming otherwise than {resume_from_checkpoint}: {'; '.join(differing)}.")
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    def _keep_log_until(self, step: int) -> None:
        path = Path(self.args.output_dir, "metrics.jsonl")
        if self.is_world_process_zero() and path.is_file():
            lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
            path.write_text("".join(f"{line}\n" for line in lines))
            self._log_file_is_ours = True

    def _settle_state(self) -> None:
        """A resumed state brings the intervals of its checkpoint, and a best value by the metric of its checkpoint."""
        self.state.compute_steps(self.args, self.state.max_steps)
        if self._resumed is not None:
            now, names = self.args.to_sanitized_dict(), ("metric_for_best_model", "greater_is_better")
            if any(self._resumed["args"][name] != now[name] for name in names):
                self.state.best_metric = self.state.best_global_step = self.state.best_model_checkpoint = None

    def create_scheduler(self, num_training_steps, optimizer=None):
        if self._optimizer_as_asked is None:
            self._optimizer_as_asked = describe_optimizer(self.optimizer)
        return super().create_scheduler(num_training_steps, optimizer)

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None:
            return
        then, now = self._resumed, self.record()
        check_same_optimizer(then, now, self.lr_scheduler)
        super()._load_optimizer_and_scheduler(checkpoint)
        apply_settings(
            self.optimizer, self.lr_scheduler, then["optimizer"]["groups"], self._optimizer_as_asked["groups"]
        )

    def _load_scaler(self, checkpoint):
        if self.accelerator.scaler is not None:  # none where a run in float16 goes on in float32
            super()._load_scaler(checkpoint)

    def _save_checkpoint(self, model, trial):
        """The parent's. It writes the state last, and without it a folder counts as no checkpoint."""
        if self.args.should_save:  # a mixture of this run and an earlier one would look whole
            remove_checkpoint(Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}"))
        self.accelerator.wait_for_everyone()
        # The parent appends to the list of a class with several callbacks, and fails at one that the checkpoint had not.
        callbacks = [c for c in [*self.callback_handler.callbacks, self.control] if isinstance(c, ExportableState)]
        self.state.stateful_callbacks = {type(callback).__name__: [] for callback in callbacks}
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # every process has written before the main one writes the state
        if self.args.should_save:
            flush_to_disk(output_dir)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the LoRA in the format of diffusers and, when called by the user, the model card."""
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        self._save(output_dir)
        if _internal_call and self.average is not None and self.args.should_save:
            save_lora(self.pipeline, self.rollout.denoiser_name, output_dir, LIVE_LORA_FILE)
        if not _internal_call:
            self.create_model_card(output_dir=output_dir)
            if self.args.push_to_hub:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with self.averaged_weights():
            save_lora(self.pipeline, self.rollout.denoiser_name, folder)
        write_record(folder, self.record())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """The trained weights, and their average if the checkpoint has one; else the average starts from them."""
        folder = Path(resume_from_checkpoint)
        self._load_lora(folder)
        self._start_average()
        if (folder / LIVE_LORA_FILE).is_file():
            if self.average is not None:
                self.average.optimization_step = read_record(folder)["average_updates"]
            self._load_lora(folder / LIVE_LORA_FILE)

    def _load_best_model(self) -> None:
        folder = Path(self.state.best_model_checkpoint)
        logger.info(f"Loading the best LoRA, of {folder} ({self.state.best_metric}).")
        self._load_lora(folder)
        self._start_average()
        self._best_step = read_record(folder)["step"]

    def _load_lora(self, path: Path) -> None:
        load_lora(self.rollout.denoiser, self.rollout.denoiser_name, path)

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
            folder, denoiser_name = Path(output_dir or self.args.output_dir), self.rollout.denoiser_name
            before, after = self.before_and_after()
            loading = loading_lines(
                self.pipeline,
                denoiser_name,
                base=self.base["pipeline"] or self.base["pipeline_class"],
                lora=self.hub_model_id or self.args.hub_model_id or f"your-name/{folder.name}",
                dtype=getattr(torch, self.base["dtype"]),
            )
            treatment = Treatment(
                args=self.args,
                base=self.base,
                loading=loading,
                weaker=scaling_call(self.pipeline, denoiser_name, 0.7),
                size=(self.rollout.height, self.rollout.width),
                adapter=self.peft_config,
                rewards=dict(zip(self.reward.names, self.reward.weights)),
                prompts=[row["prompt"] for row in self.train_dataset],
                step=self.lora_step,
                log_history=self.state.log_history,
                before=before,
                after=after,
            )
            write_model_card(
                folder,
                treatment,
                title=model_name,
                paper=self._paper,
                tags=[*self._tag_names, *tags],
                datasets=dataset,
                license=license,
                language=language,
            )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        running, args = self.push_in_progress, self.args
        if not self.is_world_process_zero() or args.hub_strategy == "end":
            return
        for file in lora_files(checkpoint_folder):
            shutil.copy(file, args.output_dir)
        self.create_model_card()
        busy = running is not None and not running.is_done()
        if busy and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        jobs = upload(args, self.hub_model_id, checkpoint_folder, self.state.global_step)
        if busy:
            running.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)


class _AfterStep(TrainerCallback):
    """Begins a run, moves the average on after each update, and refreshes the report when training ends."""

    def __init__(self, trainer: PixelRewardTrainer):
        self.trainer = trainer
        self.looked_at_gradients = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._settle_state()
        if state.global_step == 0 and args.eval_strategy != "no" and not args.eval_on_start:
            self.trainer._measure_untreated()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not self.looked_at_gradients:
            self.trainer._warn_of_idle_weights()
            self.looked_at_gradients = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.average is not None:
            self.trainer.average.step(self.trainer.trained_parameters)

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.write_report()


def _collate(rows: list[dict[str, str]]) -> dict[str, list[str]]:
    return {"prompt": [row["prompt"] for row in rows]}


def _named(dataset: Any) -> Mapping[str, Any]:
    if dataset is None:
        return {}
    return dataset if isinstance(dataset, dict) else {"": dataset}
