# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Treat a diffusion pipeline: push down the artifact confidence of its own images by gradient (arXiv 2501.12382, stage two).

One step reads: roll out, score, regularise, log. What is left out on purpose: sharded models (the trained part is a LoRA, so
data parallelism is enough), training of text encoders, and streaming prompt datasets (every prompt is checked before training).
"""

import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, broadcast_object_list
from diffusers import DiffusionPipeline
from diffusers.training_utils import EMAModel
from peft import PeftConfig
from PIL import Image
from transformers import TrainerCallback, is_datasets_available, set_seed
from transformers.trainer_utils import speed_metrics
from transformers.utils import logging

from ..disk import disk_errors_tolerated
from ..files import written_atomically
from ..images import to_image_tensor
from ..names import file_name
from ..rollout.drift import without_adapter
from ..seeds import derive_seed
from ..training import RunTrainer
from ..training.record import read_record
from .adapter import add_lora, load_lora, save_lora
from .checkpoint import (
    LIVE_LORA_FILE,
    RECORD_FILE,
    check_same_adapter,
    check_same_base,
    describe_adapter,
    describe_base,
    describe_prompts,
)
from .config import DTYPES, PixelRewardConfig
from .examine import Sample, diagnose_maps, draw, examine, mean_figures, show_in_trackers, write_training_report
from .held_out import HeldOut
from .image_check import check_images
from .losses import offline_loss
from .memory import memory_errors_explained
from .model_card import Treatment, write_model_card
from .prepare import (
    RewardFunc,
    build_reward,
    build_rollout,
    check_detector,
    encode_prompts,
    load_pipeline,
    warn_of_idle_weights,
)
from .samples import RegularizationImages, read_prompts


if is_datasets_available():
    from datasets import Dataset

logger = logging.get_logger(__name__)


class PixelRewardTrainer(RunTrainer):
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
    record_file = RECORD_FILE
    private = (LIVE_LORA_FILE,)
    outputs = (
        "*lora_weights.safetensors",
        "images/before_*.png",
        "images/after_*.png",
        "eval/step-*.png",
        "eval-*/step-*.png",
        "curves.png",
        "training_report.html",
        "report.html",
        "report.json",
        "report.csv",
        "report.png",
        "report_files/*.webp",
        "plain/report.*",
        "plain/report_files/*.webp",
    )
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
        self.held_out = self._read_held_out(eval_dataset, args)
        if (args.eval_strategy != "no" or args.eval_on_start) and not self.held_out:
            raise ValueError(
                f"`eval_strategy` is {str(args.eval_strategy.value)!r}, but `eval_dataset` has no prompts to evaluate on: pass some, "
                "or leave `eval_strategy` and `eval_on_start` out."
            )
        self.regularization = None
        if regularization_dataset is not None and args.offline_weight > 0:
            self.regularization = RegularizationImages(regularization_dataset, args.seed, self._encode)
        elif args.offline_weight > 0:
            logger.warning(
                "No `regularization_dataset` was passed: the offline loss is left out (`offline_weight=0`)."
            )
        self.reward = build_reward(reward_funcs, args)
        if judge is not None and not callable(getattr(judge, "confidence", None)):
            raise TypeError(f"`judge` is a {type(judge).__name__}, but must have a method `confidence(images)`.")
        check_detector(judge, "judge")
        self.judge = judge
        if compute_metrics is not None and not callable(compute_metrics):
            raise TypeError(
                f"`compute_metrics` is a {type(compute_metrics).__name__}, but must be a function `(images, prompts) -> dict`."
            )
        self.image_metrics = compute_metrics
        if self.regularization is None and not args.pixel_weight * sum(self.reward.weights):
            raise ValueError(
                f"`pixel_weight` is {args.pixel_weight} with `reward_weights` {self.reward.weights}, and there is no offline "
                "loss: nothing would be learnt. Raise them, or pass a `regularization_dataset`."
            )
        if self.regularization is not None:  # last before the pipeline: it may take minutes, as that does
            check_images(
                regularization_dataset,
                "regularization_dataset",
                args.process_index,
                args.world_size,
                show_progress=not args.disable_tqdm,
            )

        set_seed(args.seed)
        self.args = args  # the parent's to set, which messages about the memory need before
        self.pipeline = load_pipeline(pipeline, DTYPES[args.pipeline_dtype], args.quantization)
        self.rollout = build_rollout(self.pipeline, args)
        self.base = describe_base(self.pipeline, self.rollout.denoiser_name)
        self.peft_config = add_lora(self.pipeline, self.rollout.denoiser_name, args, peft_config)
        if args.cache_prompt_embeddings:
            known = [prompts, *(held_out.prompts for held_out in self.held_out.values())]
            offline = self.regularization.prompts if self.regularization is not None else []
            with self._memory_errors_explained("loading"):
                encode_prompts(self.rollout, args, [prompt for part in known for prompt in part], offline)

        self.final_report: dict[str, Any] | None = None  # of the LoRA as it is, for its card; the caller's to set

        self._metrics = defaultdict(list)
        self._samples: list[tuple[str, int]] = []  # prompts and seeds since the last update, to name in an error

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
        if self.rollout.denoiser.dtype == torch.float16 and self.accelerator.scaler is None:
            raise ValueError(
                "`pipeline` is in float16 and its gradients are not scaled, so that most would become 0. Set `fp16=True` "
                "(needs a GPU), or load it in another type: `pipeline_dtype` is bfloat16 or float32."
            )
        with self._memory_errors_explained("loading"):
            self.pipeline.to(args.device)
        for module in [self.reward, self.judge]:
            if isinstance(module, torch.nn.Module):
                module.requires_grad_(False).eval().to(args.device)
        if self.regularization is not None:
            self.regularization.latents(self.regularization.row(0))  # a pipeline without offline loss is refused now
        self._start_average()
        self.plan = self._plan(len(prompts))
        logger.info(self.plan)

    # --- setup -------------------------------------------------------------------------------------------------------------

    def _read_held_out(self, eval_dataset: Any, args: PixelRewardConfig) -> dict[str, HeldOut]:
        """One set of prompts, by the name "", or those of a dictionary by theirs."""
        sets = eval_dataset if isinstance(eval_dataset, dict) else {} if eval_dataset is None else {"": eval_dataset}
        return {
            name: HeldOut(
                read_prompts(dataset, f"eval_dataset[{name!r}]" if name else "eval_dataset"), args, self._examine
            )
            for name, dataset in sets.items()
        }

    def _encode(self, picture: Image.Image) -> torch.Tensor:
        image = to_image_tensor(picture, (self.rollout.height, self.rollout.width))
        return self.rollout.encode_images(image[None].to(self.args.device))

    def _memory_errors_explained(self, doing: str) -> AbstractContextManager:
        return memory_errors_explained(self.args, self.rollout, doing, offline=self.regularization is not None)

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
            f"prompts, {update} images of {self.rollout.height}x{self.rollout.width} pixels{why} per update, gradient through the last "
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

    def training_step(self, *args, **kwargs):
        with self._memory_errors_explained("training"):
            return super().training_step(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """`pixel_weight * sum(w_k * reward_k) + offline_weight * offline + drift_weight * drift`, each a mean over the samples
        of the update."""
        args, prompts = self.args, inputs["prompt"]
        seeds = [derive_seed(args.seed, "rollout", position) for position in inputs["position"]]
        regularization = self._regularization_batch(inputs["offline_position"])
        rollout = model(prompts=prompts, seeds=seeds, drift=args.drift_weight > 0, **regularization)
        with torch.set_grad_enabled(args.pixel_weight > 0):  # else it is for the log only, and needs no gradient
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
            self._metrics[name].append(values.detach().float().mean())
        self._samples += zip(prompts, seeds)
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
        if self.model.training and self._metrics:
            names = sorted(self._metrics)
            means = torch.stack([torch.stack(self._metrics[name]).mean() for name in names])
            logs.update(zip(names, self.accelerator.reduce(means, reduction="mean").tolist()))
            self._metrics.clear()
        super().log(logs, start_time)

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
        sets = self.held_out
        if eval_dataset is not None:
            sets = self._read_held_out(eval_dataset, self.args)
        if not sets:
            raise ValueError("`eval_dataset` is missing: pass held-out prompts to the trainer or to `evaluate()`.")
        metrics = {}
        for name, held_out in sets.items():
            prefix = _joined(metric_key_prefix, name)
            measured = self._measure(held_out, prefix, treated=True)
            self._draw(held_out, metric_key_prefix, name)
            self.write_report()
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, measured)
            metrics |= measured
        return metrics

    def _measure(self, held_out: HeldOut, prefix: str, treated: bool) -> dict[str, float]:
        """Generate and judge on all processes, and log the figures."""
        start, was_training = time.time(), self.model.training
        self.model.eval()
        samples = held_out.samples(treated, self.saved_step, self.accelerator)
        figures = mean_figures(samples)
        if self.image_metrics is not None:
            extra = [None]
            if self.is_world_process_zero():
                extra = [dict(self.image_metrics(torch.stack([sample.image for sample in samples]), held_out.prompts))]
            figures |= broadcast_object_list(extra)[0]
        metrics = {f"{prefix}_{name}": float(value) for name, value in figures.items()}
        metrics |= speed_metrics(prefix, start, num_samples=len(samples))
        self.log(metrics)
        self.model.train(was_training)
        return metrics

    def _measure_untreated(self) -> None:
        """Log the figures of the pipeline without the LoRA, on the same prompts and seeds as all evaluations, as step 0."""
        measured = {}
        for name, held_out in self.held_out.items():
            measured |= self._measure(held_out, _joined("eval", name), treated=False)
        best = self.args.metric_for_best_model
        if best is not None and f"eval_{best.removeprefix('eval_')}" not in measured:
            raise ValueError(
                f"`metric_for_best_model` is {best!r}, which no evaluation measures: there are {', '.join(sorted(measured))}."
            )

    def _draw(self, held_out: HeldOut, prefix: str, name: str) -> None:
        if self.is_world_process_zero() and self.args.log_images:
            picture = draw(*held_out.before_and_after(self.saved_step))
            folder = Path(self.args.output_dir, file_name(prefix) + (f"-{file_name(name)}" if name else ""))
            with disk_errors_tolerated(folder, "The picture of this evaluation is left out."):
                folder.mkdir(parents=True, exist_ok=True)
                with written_atomically(folder / f"step-{self.state.global_step}.png") as unfinished:
                    picture.save(unfinished)
            show_in_trackers(
                self.callback_handler.callbacks, f"{_joined(prefix, name)}/images", picture, self.state.global_step
            )

    def _examine(self, prompts: list[str], seeds: list[int], treated: bool) -> list[Sample]:
        with self._memory_errors_explained("evaluation"):
            return examine(
                lambda prompts, seeds: self.generate(prompts, seeds, treated),
                self.reward,
                self.judge,
                prompts,
                seeds,
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
        was_training = self.rollout.training
        self.rollout.eval()
        try:
            lora = self.averaged_weights() if treated else without_adapter(self.rollout.denoiser)
            with self._memory_errors_explained("evaluation"), lora, self.accelerator.autocast():
                return self.rollout.generate(prompts, seeds, batch_size=self.args.per_device_eval_batch_size)
        finally:
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
            with disk_errors_tolerated(self.args.output_dir, "The report is left as it is."):
                write_training_report(self.args.output_dir, self.state.log_history, title)

    # --- checkpoints ---------------------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """What is written beside a LoRA: what was treated, how, and how far."""
        return {
            "base": self.base,
            "adapter": describe_adapter(self.peft_config),
            "average_updates": None if self.average is None else self.average.optimization_step,
            "prompts": describe_prompts([row["prompt"] for row in self.train_dataset]),
            **super().record(),
        }

    def check_record(self, folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
        check_same_base(folder, then["base"], now["base"])
        check_same_adapter(folder, then["adapter"], now["adapter"])

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

    def _save_weights(self, folder: Path) -> None:
        with self.averaged_weights():
            save_lora(self.pipeline, self.rollout.denoiser_name, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """The trained weights, and their average if the checkpoint has one; else the average starts from them."""
        folder = Path(resume_from_checkpoint)
        self._load_lora(folder)
        self._start_average()
        if (folder / LIVE_LORA_FILE).is_file():
            if self.average is not None:
                self.average.optimization_step = read_record(folder / RECORD_FILE)["average_updates"]
            self._load_lora(folder / LIVE_LORA_FILE)

    def _load_best_model(self) -> None:
        folder = Path(self.state.best_model_checkpoint)
        logger.info(f"Loading the best LoRA, of {folder} ({self.state.best_metric}).")
        self._load_lora(folder)
        self._start_average()
        self._best_step = read_record(folder / RECORD_FILE)["step"]

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
            folder = Path(output_dir or self.args.output_dir)
            treatment = Treatment(
                args=self.args,
                pipeline=self.pipeline,
                base=self.base,
                size=(self.rollout.height, self.rollout.width),
                adapter=self.peft_config,
                rewards=dict(zip(self.reward.names, self.reward.weights)),
                detector=any(hasattr(part, "detector") for part in self.reward.rewards),
                offline=self.regularization is not None,
                prompts=[row["prompt"] for row in self.train_dataset],
                step=self.saved_step,
                log_history=self.state.log_history,
                images=self._shown() if self.final_report is None else ([], []),
                report=self.final_report,
            )
            write_model_card(
                folder,
                treatment,
                title=model_name,
                repo_id=self.hub_model_id or self.args.hub_model_id or f"your-name/{folder.resolve().name}",
                paper=self._paper,
                tags=[*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
                datasets=dataset,
                license=license,
                language=language,
            )

    def _shown(self) -> tuple[list[Sample], list[Sample]]:
        """Held-out images before and after, by the LoRA as it is, if evaluations were logged."""
        evaluated = any(key.startswith("eval_") for entry in self.state.log_history for key in entry)
        first = next(iter(self.held_out.values()), None)
        return first.before_and_after(self.saved_step) if evaluated and first is not None else ([], [])


class _AfterStep(TrainerCallback):
    """Begins a run, moves the average on after each update, and refreshes the report when training ends."""

    def __init__(self, trainer: PixelRewardTrainer):
        self.trainer = trainer
        self.looked_at_gradients = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.final_report = None
        if state.global_step == 0 and args.eval_strategy != "no" and not args.eval_on_start:
            self.trainer._measure_untreated()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not self.looked_at_gradients:
            warn_of_idle_weights(self.trainer.rollout)
            self.looked_at_gradients = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.average is not None:
            self.trainer.average.step(self.trainer.trained_parameters)

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.write_report()


def _collate(rows: list[dict[str, str]]) -> dict[str, list[str]]:
    return {"prompt": [row["prompt"] for row in rows]}


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}_{name}" if name else prefix
