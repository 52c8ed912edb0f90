# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""A `Trainer` whose resumed runs do what their arguments say, and whose checkpoints are whole or none."""

import json
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from .checkpoint import (
    STATE_FILE,
    apply_settings,
    check_resumable,
    check_same_optimizer,
    describe_optimizer,
    differences,
    flush_to_disk,
    last_checkpoint,
    read_record,
    remove_checkpoint,
)


logger = logging.get_logger(__name__)


class ResumableTrainer(Trainer):
    """The part of [`PixelRewardTrainer`] that saves and continues runs; see `checkpoint` for what is compared.

    Subclasses write [`record`](ResumableTrainer.record) into every checkpoint, set `_best_step` where they load the best
    weights, and call `_settle_state` when training begins.
    """

    _best_step: int | None = None  # step of the weights that `load_best_model_at_end` has loaded
    _optimizer_as_asked: dict[str, Any] | None = None
    _resumed: dict[str, Any] | None = None  # the record of the checkpoint that is continued
    _log_file_is_ours = False

    @property
    def lora_step(self) -> int:
        """The step whose weights the LoRA has: the last one, or the best one where it was loaded at the end."""
        return self.state.global_step if self._best_step is None else self._best_step

    def record(self) -> dict[str, Any]:
        """What is written beside the weights, and compared when a run resumes."""
        return {
            "step": self.lora_step,
            "optimizer": self._optimizer_as_asked,
            "schedule": None if self.lr_scheduler is None else type(self.lr_scheduler).__name__,
            "samples_per_update": self.get_total_train_batch_size(self.args),
            "processes": self.args.world_size,
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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if self.is_world_process_zero():
            with open(Path(self.args.output_dir, "metrics.jsonl"), "a" if self._log_file_is_ours else "w") as file:
                file.write(json.dumps(self.state.log_history[-1]) + "\n")
            self._log_file_is_ours = True
