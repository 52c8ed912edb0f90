# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What all trainers have in common that treat a diffusion pipeline through a LoRA: everything but the loss.

What is left out on purpose: sharded models (the trained part is a LoRA, so data parallelism is enough), training of text
encoders, and streaming prompt datasets (every prompt is checked before training).
"""

import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, broadcast_object_list
from diffusers import DiffusionPipeline
from diffusers.training_utils import EMAModel
from peft import PeftConfig
from torch.optim.lr_scheduler import LambdaLR
from transformers import EarlyStoppingCallback, TrainerCallback, is_datasets_available, set_seed
from transformers.trainer_utils import speed_metrics
from transformers.utils import logging

from ..disk import disk_errors_tolerated
from ..files import written_atomically
from ..names import file_name
from ..rollout import DifferentiableRollout
from ..rollout.drift import without_adapter
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
from .config import DTYPES, TreatmentConfig
from .examine import Sample, draw, examine, mean_figures, show_in_trackers, write_training_report
from .guards import GUARDS_FILE, RATE, Guards
from .held_out import HeldOut
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
from .samples import read_prompts


if is_datasets_available():
    from datasets import Dataset

logger = logging.get_logger(__name__)


class TreatmentTrainer(RunTrainer):
    """What [`PixelRewardTrainer`] and the other trainers of a LoRA on a pipeline's denoiser have in common.

    The pipeline becomes one rollout with an adapter, prompts are encoded once, held-out prompts are drawn and judged, and
    checkpoints, moving average, reports and cards are kept. A subclass brings `compute_loss`, and what it needs beyond prompts:
    see `read_rows`, `offline_prompts` and `check_before_loading`.

    Args:
        pipeline, reward_funcs, args, train_dataset, eval_dataset, peft_config, judge, compute_metrics, callbacks, optimizers:
            see [`PixelRewardTrainer`]. Without `reward_funcs`, which a subclass may allow, held-out images are judged alone.
    """

    config_class = TreatmentConfig
    _tag_names = ["diffdoctor", "text-to-image", "diffusers", "lora", "template:diffusion-lora"]
    _name = "DiffDoctor"
    _paper = {
        "title": "DiffDoctor: Diagnosing Image Diffusion Models Before Treating",
        "id": "2501.12382",
    }
    _method: str | None = None  # how a LoRA was trained, for its card, as the end of a sentence
    record_file = RECORD_FILE
    private = (LIVE_LORA_FILE, GUARDS_FILE)
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
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        args: TreatmentConfig | None = None,
        train_dataset: "Dataset | None" = None,
        eval_dataset: "Dataset | dict[str, Dataset] | None" = None,
        peft_config: PeftConfig | None = None,
        judge: Any | None = None,
        compute_metrics: Callable[[torch.Tensor, Sequence[str]], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ):
        args = self.checked_args(args)
        rows = self.read_rows(train_dataset)
        prompts = [row["prompt"] for row in rows]
        self.held_out = self._read_held_out(eval_dataset, args)
        if (args.eval_strategy != "no" or args.eval_on_start) and not self.held_out:
            raise ValueError(
                f"`eval_strategy` is {str(args.eval_strategy.value)!r}, but `eval_dataset` has no prompts to evaluate on: pass some, "
                "or leave `eval_strategy` and `eval_on_start` out."
            )
        self.reward = None if reward_funcs is None else build_reward(reward_funcs, args)
        if judge is not None and not callable(getattr(judge, "confidence", None)):
            raise TypeError(f"`judge` is a {type(judge).__name__}, but must have a method `confidence(images)`.")
        check_detector(judge, "judge")
        self.judge = judge
        if (
            judge is not None and args.best_metric_is_ours
        ):  # nobody chose a figure: the judge's is not the one trained against
            args.metric_for_best_model, args.greater_is_better = "judge_artifact_frequency", False
        if compute_metrics is not None and not callable(compute_metrics):
            raise TypeError(
                f"`compute_metrics` is a {type(compute_metrics).__name__}, but must be a function `(images, prompts) -> dict`."
            )
        self.image_metrics = compute_metrics
        self.check_before_loading(args)

        set_seed(args.seed)
        self.args = args  # the parent's to set, which messages about the memory need before
        self.pipeline = load_pipeline(
            pipeline, DTYPES[args.pipeline_dtype], args.quantization, args.base_lora, args.base_lora_scale
        )
        self.rollout = self.build_rollout(args)
        self.base = describe_base(self.pipeline, self.rollout.denoiser_name)
        self.peft_config = add_lora(self.pipeline, self.rollout.denoiser_name, args, peft_config)
        if args.cache_prompt_embeddings:
            known = [prompts, *(held_out.prompts for held_out in self.held_out.values())]
            with self._memory_errors_explained("loading"):
                encode_prompts(
                    self.rollout, args, [prompt for part in known for prompt in part], self.offline_prompts()
                )

        self.guards = Guards(args, self._deciding_figure())
        self.final_report: dict[str, Any] | None = None  # of the LoRA as it is, for its card; the caller's to set

        self._metrics = defaultdict(list)
        self._samples: list[tuple[str, int]] = []  # prompts and seeds since the last update, to name in an error

        patience = args.early_stopping_patience
        stopping = [] if patience is None else [EarlyStoppingCallback(patience)]
        super().__init__(
            model=self.rollout,
            args=args,
            data_collator=_collate,
            train_dataset=rows,
            eval_dataset=eval_dataset,
            callbacks=[*(callbacks or []), *stopping, _AfterStep(self)],
            optimizers=optimizers,
        )
        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(
                f"`{type(self).__name__}` does not shard models ({self.accelerator.distributed_type}): the trained part is a "
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
        self._start_average()

    # --- what a subclass may bring -------------------------------------------------------------------------------------------

    @classmethod
    def checked_args(cls, args: TreatmentConfig | None) -> TreatmentConfig:
        """The configuration, that of the defaults without one."""
        args = cls.config_class("treated") if args is None else args
        if not isinstance(args, cls.config_class):
            raise TypeError(f"`args` is a {type(args).__name__}, but must be a `{cls.config_class.__name__}`.")
        return args

    def read_rows(self, train_dataset: Any) -> list[dict[str, Any]]:
        """The training data, checked: rows with at least the key "prompt"."""
        return [{"prompt": prompt} for prompt in read_prompts(train_dataset, "train_dataset")]

    def check_before_loading(self, args: TreatmentConfig) -> None:
        """Refuse what cannot work and is found without the pipeline. The last chance: what takes minutes comes here."""

    def build_rollout(self, args: TreatmentConfig) -> DifferentiableRollout:
        """The rollout of `self.pipeline`."""
        return build_rollout(self.pipeline, args)

    def offline_prompts(self) -> list[str]:
        """Prompts of which the pipeline's own training loss is asked."""
        return []

    # --- setup -------------------------------------------------------------------------------------------------------------

    def _read_held_out(self, eval_dataset: Any, args: TreatmentConfig) -> dict[str, HeldOut]:
        """One set of prompts, by the name "", or those of a dictionary by theirs."""
        sets = eval_dataset if isinstance(eval_dataset, dict) else {} if eval_dataset is None else {"": eval_dataset}
        return {
            name: HeldOut(
                read_prompts(dataset, f"eval_dataset[{name!r}]" if name else "eval_dataset"), args, self._examine
            )
            for name, dataset in sets.items()
        }

    def _deciding_figure(self) -> str:
        """What says which weights are best where `metric_for_best_model` does not."""
        if self.judge is not None:
            return "judge_artifact_frequency"
        detects = self.reward is not None and any(hasattr(part, "detector") for part in self.reward.rewards)
        return "artifact_frequency" if detects else "reward"

    def _memory_errors_explained(self, doing: str) -> AbstractContextManager:
        return memory_errors_explained(self.args, self.rollout, doing, offline=len(self.offline_prompts()) > 0)

    @property
    def trained_parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.rollout.parameters() if parameter.requires_grad]

    # --- one step ------------------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Give every sample its position in the run, and count the samples of the update over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch, block in zip(batches, self.blocks(len(batches))):
            start = block * self._train_batch_size
            batch["position"] = list(range(start, start + len(batch["prompt"])))
        count = torch.tensor(float(sum(len(batch["prompt"]) for batch in batches)), device=device)
        return batches, self.accelerator.reduce(count)

    def blocks(self, count: int) -> range:
        """Which batches of the run, counted over all processes, the next `count` batches of this process are."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        first = self.state.global_step * self.args.gradient_accumulation_steps
        return range(first * world + rank, (first + count) * world + rank, world)

    def share_of_mean(self, losses: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
        """What this batch adds to the mean over all samples of the update.

        DDP averages the gradients of the processes, so each takes its sum times their number over the count of all.
        """
        return losses.sum() * self.accelerator.num_processes / num_items_in_batch

    def training_step(self, *args, **kwargs):
        with self._memory_errors_explained("training"):
            return super().training_step(*args, **kwargs)

    def note(self, metrics: Mapping[str, torch.Tensor], prompts: Sequence[str], seeds: Sequence[int]) -> None:
        """Remember the figures of a batch, each (B,), for the next log, and its samples for an error that ends the step."""
        for name, values in metrics.items():
            self._metrics[name].append(values.detach().float().mean())
        self._samples += zip(prompts, seeds)

    def stop_if_not_finite(
        self, name: str, losses: torch.Tensor, prompts: Sequence[str], seeds: Sequence[int]
    ) -> None:
        bad = (~torch.isfinite(losses.detach())).nonzero().flatten().tolist()
        if bad:
            # the samples of a loss may be others than the prompts, as those of the offline loss; then all of the step are named
            its_own = len(losses) == len(prompts) and name != "offline"
            culprits = [(prompts[i], seeds[i]) for i in bad] if its_own else list(zip(prompts, seeds))
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
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, measured)
            metrics |= measured
        self.write_report()
        return metrics

    def _measure(self, held_out: HeldOut, prefix: str, treated: bool, logged: bool = True) -> dict[str, float]:
        """Generate and judge on all processes, and log the figures."""
        start, was_training = time.time(), self.model.training
        self.model.eval()
        samples = held_out.samples(treated, self.saved_step, self.accelerator)
        figures, extra = mean_figures(samples), [None]
        name = next((name for name, known in self.held_out.items() if known is held_out), None)
        # an evaluation before the first step is of a fresh LoRA, which changes nothing
        untreated = not treated or (name not in self.guards.untreated and self.saved_step == 0)
        if self.is_world_process_zero():
            images = torch.stack([sample.image for sample in samples])
            extra = [{}]
            if name is not None:
                extra[0] |= self.guards.measure(name, images, held_out.prompts, not untreated)
            if self.image_metrics is not None:
                extra[0] |= self.image_metrics(images, held_out.prompts)
        figures |= broadcast_object_list(extra)[0]
        if untreated and name is not None:
            self.guards.remember(name, figures, len(samples), tuple(samples[0].image.shape[-2:]))
        metrics = {f"{prefix}_{name}": float(value) for name, value in figures.items()}
        metrics |= speed_metrics(prefix, start, num_samples=len(samples))
        if logged:
            self.log(metrics)
        self.model.train(was_training)
        return metrics

    def _measure_untreated(self) -> None:
        """Figures of the pipeline without the LoRA, on the same prompts and seeds as all evaluations, logged as step 0.

        A run that resumes from a checkpoint that does not know them measures them once more, and logs nothing.
        """
        measured, logged = {}, self.state.global_step == 0
        for name, held_out in self.held_out.items():
            measured |= self._measure(held_out, _joined("eval", name), treated=False, logged=logged)
        for argument in ("metric_for_best_model", "fidelity_metric"):
            figure = getattr(self.args, argument)
            known = {key.removeprefix("eval_") for key in measured}
            known |= {key.removeprefix(f"{name}_") for name in self.held_out for key in known if argument[0] == "f"}
            if figure is not None and figure.removeprefix("eval_") not in known:
                raise ValueError(
                    f"`{argument}` is {figure!r}, which no evaluation measures: there are {', '.join(sorted(measured))}."
                )

    def _evaluate(self, *args, **kwargs):
        metrics = super()._evaluate(*args, **kwargs)
        self._heed(metrics)
        return metrics

    def _heed(self, metrics: dict[str, float]) -> None:
        """Tell what the guards say of an evaluation, and do what `on_alarm` says."""
        alarms, guards = self.guards.alarms(metrics), self.guards
        guards.alarmed = len(alarms) > 0 and guards.keeps_weights
        if not alarms:
            if guards.keeps_weights:
                with self.averaged_weights():
                    guards.consider(self.state.global_step, metrics, self.trained_parameters)
            return
        for alarm in alarms:
            logger.warning(
                f"Alarm at step {self.state.global_step}: {alarm.text} (eval_{alarm.name} is {alarm.value:.4g}, its limit "
                f"{alarm.limit:.4g})."
            )
        told = {f"alarm/{alarm.name}": alarm.value for alarm in alarms}
        told |= {f"alarm/{alarm.name}/limit": alarm.limit for alarm in alarms}
        if guards.alarmed:
            told["rollback/step"] = float(self._roll_back())
        self.model.eval()  # the training's own figures wait for their line
        self.log(told)
        self.model.train()
        self.write_report()

    def _roll_back(self) -> int:
        """Put the weights of the best evaluation back; stop, or go on with a lower rate. Returns the step of the weights.

        Moments of the optimizer that were won on the way to the alarm would lead there again, and are forgotten with it.
        """
        best, guards = self.guards.best, self.guards
        with torch.no_grad():
            for parameter, weight in zip(self.trained_parameters, best.weights):
                parameter.copy_(weight)
        self._start_average()
        self.optimizer.state.clear()
        for held_out in self.held_out.values():
            held_out.forget()
        guards.rollbacks += 1
        if self.args.on_alarm == "stop":
            self.control.should_training_stop = True
            self._best_step = best.step
            logger.warning(f"The LoRA is that of step {best.step} again. Training stops.")
        else:
            self._scale_rate(RATE)
            logger.warning(f"The LoRA is that of step {best.step} again. Training goes on with {RATE:g} of its rate.")
        return best.step

    def _scale_rate(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group |= {key: group[key] * factor for key in ("lr", "initial_lr") if key in group}
        schedule = self.lr_scheduler
        if isinstance(schedule, LambdaLR):
            schedule.base_lrs = [rate * factor for rate in schedule.base_lrs]
            schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _determine_best_metric(self, metrics, trial):
        """An evaluation whose weights were taken back is never the best one."""
        return False if self.guards.alarmed else super()._determine_best_metric(metrics, trial)

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

        self.guards.load(folder)

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self.guards.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and isinstance(
            self.lr_scheduler, LambdaLR
        ):  # its rate was computed from the arguments
            self._scale_rate(RATE**self.guards.rollbacks if self.args.on_alarm == "rollback" else 1.0)

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
                rewards={} if self.reward is None else dict(zip(self.reward.names, self.reward.weights)),
                detector=self.reward is not None and any(hasattr(part, "detector") for part in self.reward.rewards),
                offline=len(self.offline_prompts()) > 0,
                prompts=[row["prompt"] for row in self.train_dataset],
                step=self.saved_step,
                log_history=self.state.log_history,
                images=self._shown() if self.final_report is None else ([], []),
                method=self._method,
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

    def __init__(self, trainer: TreatmentTrainer):
        self.trainer = trainer
        self.looked_at_gradients = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.final_report = None
        guards = self.trainer.guards
        if state.global_step == 0:
            guards.start()
        evaluated = args.eval_strategy != "no"
        if evaluated and not guards.untreated and not (state.global_step == 0 and args.eval_on_start):
            self.trainer._measure_untreated()
        if evaluated and guards.keeps_weights and guards.best is None:
            with self.trainer.averaged_weights():
                before = guards.untreated[min(guards.untreated)].figures if guards.untreated else {}
                figure = {f"eval_{guards.figure}": before[guards.figure]} if guards.figure in before else {}
                guards.consider(
                    state.global_step, figure if state.global_step == 0 else {}, self.trainer.trained_parameters
                )

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not self.looked_at_gradients:
            warn_of_idle_weights(self.trainer.rollout)
            self.looked_at_gradients = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.average is not None:
            self.trainer.average.step(self.trainer.trained_parameters)

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.write_report()


def _collate(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {key: [row[key] for row in rows] for key in rows[0]}


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}_{name}" if name else prefix
