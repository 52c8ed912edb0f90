# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""A `Trainer` whose runs can be killed, stopped, resumed and repeated without losing or mixing anything."""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ..disk import disk_errors_named, disk_errors_tolerated
from ..files import only_run
from .arguments import RunArguments
from .checkpoints import (
    MANIFEST,
    check_whole,
    checkpoints,
    damage,
    last_checkpoint,
    refusals_named,
    remove_checkpoint,
    rotate,
    seal,
)
from .journal import METRICS, Journal
from .pushing import NOT_UPLOADED, HubError, Pusher, publish, remove_copies
from .record import (
    apply_settings,
    check_position,
    check_same_optimizer,
    describe_optimizer,
    differences,
    missing_entries_named,
    read_record,
    write_record,
)
from .stopping import StopSignals


STATE = "trainer_state.json"
EARLY_END = 10.0  # seconds that a run which was stopped waits for its pushes
PRIVATE = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*", STATE, MANIFEST)  # that only resuming needs

logger = logging.get_logger(__name__)


class RunTrainer(Trainer):
    """What [`PixelRewardTrainer`] and [`ArtifactDetectorTrainer`] have in common: how a run is saved, stopped and continued.

    - A checkpoint counts once its manifest is written, see `checkpoints`. A resumed run continues the last whole one.
    - A resumed run does what its arguments say from its first step on; see `record` for what is compared.
    - One run writes into an output folder at a time. A folder with another run in it is refused, or cleared where
      `overwrite_output_dir` says so.
    - SIGTERM and SIGINT save a checkpoint, see `stopping`.
    - A push that fails or hangs costs nothing but itself, see `pushing`.
    - `training_args.bin`, which holds the token in clear, is not written.

    Subclasses say in `record` what a checkpoint must share with the run that continues it, and compare it in
    `check_record`; `record_file` is where it lies, `outputs` what else they write. They set `_best_step` where they load
    the best weights.
    """

    record_file = "training.json"
    # what a run writes into its output folder, as patterns; what a new run there must not be mixed with
    outputs: tuple[str, ...] = ()
    # of the files that subclasses write into a checkpoint, those that only resuming needs
    private: tuple[str, ...] = ()

    _best_step: int | None = None  # step of the weights that `load_best_model_at_end` has loaded
    _optimizer_as_asked: dict[str, Any] | None = None
    _resumed: dict[str, Any] | None = None  # the record of the checkpoint that is continued
    _signals: StopSignals | None = None
    _saved_step: int | None = None
    pusher: Pusher | None = None  # of the main process, once there is a repository

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._journal = Journal(self.args.output_dir)

    # --- what a run is -------------------------------------------------------------------------------------------------------

    @property
    def saved_step(self) -> int:
        """The step whose weights the model has: the last one, or the best one where it was loaded at the end."""
        return self.state.global_step if self._best_step is None else self._best_step

    def record(self) -> dict[str, Any]:
        """What is written beside the weights, and compared when a run resumes."""
        return {
            "step": self.saved_step,
            "optimizer": self._optimizer_as_asked,
            "schedule": None if self.lr_scheduler is None else type(self.lr_scheduler).__name__,
            "samples_per_update": self.get_total_train_batch_size(self.args),
            "processes": self.args.world_size,
            "args": self.args.to_sanitized_dict(),
        }

    def check_record(self, folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
        """Raise a `ValueError` where a run recorded as `now` cannot continue the checkpoint in `folder`, recorded as `then`."""

    # --- training ------------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As in [`~transformers.Trainer`]; `resume_from_checkpoint=True` takes the last checkpoint that is whole, and `"auto"`
        too, but begins anew where there is none yet: for a job that its scheduler starts again and again.

        A resumed run does what its arguments say from its first step on: a changed learning rate, schedule or optimizer
        setting is the one used, at the checkpoint's position. Differing arguments are logged.

        Raises:
            ValueError: the checkpoint is damaged or cannot be continued, or the output folder holds another run.
            RuntimeError: another process runs in the output folder.
            KeyboardInterrupt, SystemExit: after SIGINT or SIGTERM, when a checkpoint was saved; see `stop_grace`.
            OSError: the disk is full; it is named.
        """
        with only_run(self.args.output_dir) if self.is_world_process_zero() else nullcontext():
            self._best_step = self._resumed = self._saved_step = None
            folder = resume_from_checkpoint or None
            again = folder == "auto"
            if again or folder is True:
                folder = last_checkpoint(self.args.output_dir, missing_ok=again)
            elif folder is not None:
                folder = Path(folder)
                check_whole(folder)
            if folder is None:
                self._take_over(None, again)
            else:
                then, now = read_record(folder / self.record_file), self.record()
                with missing_entries_named(folder / self.record_file):
                    self.check_record(folder, then, now)
                    check_position(folder, then, now, self.args.ignore_data_skip)
                with missing_entries_named(folder / STATE):
                    state = TrainerState.load_from_json(str(folder / STATE))
                    step = state.global_step
                    if not isinstance(step, int):
                        raise TypeError(f"`global_step` is {step!r}")
                self._take_over(step)
                # the parent would take one more step in an epoch half done
                if 0 < self.args.max_steps <= step:
                    logger.warning(f"Nothing to train: {folder} has all of {self.args.max_steps} steps.")
                    self._load_from_checkpoint(str(folder))
                    self.state = state
                    return TrainOutput(step, 0.0, {})
                self._resumed = then
                differing = differences(then, now)
                if differing:
                    logger.warning(f"Resuming otherwise than {folder}: {'; '.join(differing)}.")
                self._journal.replace()
            try:
                with StopSignals(self.args.stop_grace) as self._signals:
                    return super().train(resume_from_checkpoint=None if folder is None else str(folder), **kwargs)
            except BaseException:  # stopped or failed: pushes under way get a little time, and then are told of
                self._finish_current_push(min(EARLY_END, self.args.push_timeout))
                raise

    def _take_over(self, step: int | None, again: bool = False) -> None:
        """Make sure that what lies in the output folder is of this run, which begins (None) or goes on after `step`.

        A run that begins `again` may clear what was left by an earlier attempt, but not the weights of one that ended well.
        """
        if not self.is_world_process_zero():
            return
        output_dir, later = Path(self.args.output_dir), []
        if self.pusher is None or not self.pusher.is_busy:
            remove_copies(output_dir)
        for number, folder in checkpoints(output_dir).items():
            if step is not None and number > step and damage(folder) is not None:
                logger.warning(f"Removing {folder}, which is damaged.")
                remove_checkpoint(folder)
            elif step is not None and number > step:
                later.append(folder)
        if step is None:
            ours = {self._journal.path} if self._journal.ours else set()
            later = [path for path in self.traces(output_dir) if path not in ours]
        again = again and not (output_dir / self.record_file).exists()
        if later and not (self.args.overwrite_output_dir or again):
            what = "an earlier run" if step is None else f"a run that went on after step {step}"
            raise ValueError(in_use_message(output_dir, later, what))
        if later:
            logger.warning(f"Removing what an earlier run left in {output_dir}: {_listed(output_dir, later)}.")
        for path in later:
            if path.is_dir():
                remove_checkpoint(path)
            else:
                path.unlink(missing_ok=True)

    @classmethod
    def traces(cls, output_dir: str | os.PathLike) -> list[Path]:
        """What runs of this trainer have left in a folder: checkpoints first, then files."""
        patterns = (METRICS, cls.record_file, *cls.outputs)
        files = {path for pattern in patterns for path in Path(output_dir).glob(pattern) if path.is_file()}
        return [*checkpoints(output_dir).values(), *sorted(files)]

    @classmethod
    def check_output_dir(cls, args: RunArguments) -> None:
        """Refuse the output folder of a new run that `train` would refuse, before anything is loaded."""
        found = cls.traces(args.output_dir)
        if found and not args.overwrite_output_dir:
            raise ValueError(in_use_message(args.output_dir, found, "an earlier run"))

    def _init_training_state(self, max_steps, *args, **kwargs):
        result = super()._init_training_state(max_steps, *args, **kwargs)
        if self._resumed is not None:
            self._settle_state(max_steps)
        return result

    def _settle_state(self, max_steps: int) -> None:
        """A resumed state brings the intervals of its checkpoint, and a best value by the metric of its checkpoint."""
        self.state.compute_steps(self.args, max_steps)
        now, names = self.args.to_sanitized_dict(), ("metric_for_best_model", "greater_is_better")
        if any(self._resumed["args"].get(name) != now[name] for name in names):
            self.state.best_metric = self.state.best_global_step = None
        elif self.state.best_global_step:  # files hold the step alone: folders move, and their paths are private
            best = Path(self.args.output_dir, f"checkpoint-{self.state.best_global_step}")
            self.state.best_model_checkpoint = str(best) if best.is_dir() else None

    def create_scheduler(self, num_training_steps, optimizer=None):
        if self._optimizer_as_asked is None:
            self._optimizer_as_asked = describe_optimizer(self.optimizer)
        return super().create_scheduler(num_training_steps, optimizer)

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None:
            return
        then, now = self._resumed, self.record()
        check_same_optimizer(then, now, self.lr_scheduler)
        with refusals_named(checkpoint, "optimizer.pt", "scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)
        apply_settings(
            self.optimizer, self.lr_scheduler, then["optimizer"]["groups"], self._optimizer_as_asked["groups"]
        )

    def _load_scaler(self, checkpoint):
        if self.accelerator.scaler is not None:  # none where a run in float16 goes on in float32
            with refusals_named(checkpoint, "scaler.pt"):
                super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint):
        with refusals_named(checkpoint, "rng_state*.pth"):
            super()._load_rng_state(checkpoint)

    # --- saving --------------------------------------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *args, **kwargs):
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        received = self._signal_of_all()
        if received:
            if self._saved_step != self.state.global_step:
                self._save_checkpoint(model, trial)
            if self.is_world_process_zero():
                logger.warning(
                    f"Stopped at step {self.state.global_step}. Resume from there with `resume_from_checkpoint=True` "
                    "(--resume_from_checkpoint true)."
                )
            # not by `should_training_stop`: the parent would load the best weights and tidy up, as at a run's real end
            raise KeyboardInterrupt if received == StopSignals.INTERRUPT else SystemExit(128 + received)

    def _signal_of_all(self) -> int:
        """The signal that any process has got, or 0: all of them end at the same step."""
        received = self._signals.received or 0
        if self.args.world_size > 1:
            flag = torch.tensor([received], device=self.args.device)
            received = int(self.accelerator.gather(flag).max())
        return received

    def _save_checkpoint(self, model, trial):
        """The parent's; then the manifest, and only then what needs a whole checkpoint: the push, and deleting older ones."""
        args, run_dir = self.args, Path(self._get_output_dir(trial))
        folder = run_dir / f"checkpoint-{self.state.global_step}"
        if args.should_save:  # a mixture of this run and an earlier one would look whole
            remove_checkpoint(folder)
        self.accelerator.wait_for_everyone()
        # The parent appends to the list of a class with several callbacks, and fails at one that the checkpoint had not.
        callbacks = [c for c in [*self.callback_handler.callbacks, self.control] if isinstance(c, ExportableState)]
        self.state.stateful_callbacks = {type(callback).__name__: [] for callback in callbacks}
        pushes, args.push_to_hub = args.push_to_hub, False
        limit, args.save_total_limit = args.save_total_limit, None
        remedy = "Make room and resume with `resume_from_checkpoint=True`; earlier checkpoints are untouched."
        try:
            with disk_errors_named(folder, remedy):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()  # every process has written its random state
                if args.should_save:
                    best, self.state.best_model_checkpoint = self.state.best_model_checkpoint, None
                    self.state.save_to_json(str(folder / STATE))
                    self.state.best_model_checkpoint = best
                    seal(folder)
        except OSError:
            if args.should_save:
                remove_checkpoint(folder)
            raise
        finally:
            args.push_to_hub, args.save_total_limit = pushes, limit
        self._saved_step = self.state.global_step
        if pushes:
            self._push_from_checkpoint(str(folder))
        if args.should_save:
            uploading = [] if self.pusher is None else self.pusher.folders
            rotate(run_dir, limit, keep=[self.state.best_model_checkpoint, *uploading])

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Weights, processing class and the record, without `training_args.bin`."""
        if not self.args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with disk_errors_named(
            folder, "Make room, then save again: the weights are in memory until the process ends."
        ):
            self._save_weights(folder)
            write_record(folder / self.record_file, self.record())

    def _save_weights(self, folder: Path) -> None:
        """Write the weights and all that loading them needs into an existing folder."""
        self.accelerator.unwrap_model(self.model).save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    # --- sharing -------------------------------------------------------------------------------------------------------------

    @property
    def _repo_name(self) -> str:
        return self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository, or find it.

        Raises:
            ValueError: it cannot be written with this token, or the Hub does not answer.
        """
        if not self.is_world_process_zero():
            return
        name = self._repo_name
        private = self.args.hub_private_repo if private is None else private
        self.pusher = Pusher(name, token or self.args.hub_token, private, self.args.push_timeout)
        try:
            self.hub_model_id = self.pusher.create()
        except HubError as error:
            remedy = (
                "Try again later, or train without `push_to_hub` and call `trainer.push_to_hub()` then."
                if error.may_pass
                else "Log in with `hf auth login`, pass a `hub_token` that may write there, or another `hub_model_id`."
            )
            raise ValueError(
                f"`push_to_hub`: {name!r} cannot be created or found on the Hub: {error}. {remedy}"
            ) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload the weights and pages of the output folder, and the checkpoint where `hub_strategy` says so."""
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == "end":
            return
        with disk_errors_tolerated(args.output_dir, "This save is not pushed."):
            publish(checkpoint_folder, args.output_dir, (*PRIVATE, *self.private))
            self.create_model_card()
            self.callback_handler.on_push_begin(args, self.state, self.control)
            common = {
                "message": f"Training in progress, step {self.state.global_step}",
                "revision": args.hub_revision,
                "every": args.hub_always_push,
            }
            self.pusher.push(args.output_dir, ignored=NOT_UPLOADED, changing=True, **common)
            if args.hub_strategy in ("checkpoint", "all_checkpoints"):
                name = "last-checkpoint" if args.hub_strategy == "checkpoint" else Path(checkpoint_folder).name
                self.pusher.push(checkpoint_folder, path_in_repo=name, **common)

    def _finish_current_push(self, patience: float | None = None) -> None:
        if self.pusher is not None:
            self.pusher.finish(patience)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """
        Upload the weights, the card and the reports of the output folder. Never fails for what the network does: it tells what
        did not arrive, and the command that repeats the push.

        Args:
            commit_message, token, revision, private: as in [`~transformers.Trainer`].
            blocking (`bool`, *optional*, defaults to `True`): wait for the upload, at most `push_timeout` seconds.
            **kwargs: of `create_model_card`.

        Returns:
            the commit's information, None if it did not arrive; or a `concurrent.futures.Future` of that, if not `blocking`.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        revision = self.args.hub_revision if revision is None else revision
        refused = None
        if self.hub_model_id is None:
            try:
                self.init_hf_repo(token, private)
            except ValueError as error:
                refused = error
        self.create_model_card(model_name=kwargs.pop("model_name", None) or self._repo_name.split("/")[-1], **kwargs)
        if refused is not None:
            command = self.pusher.command(self.args.output_dir, revision=revision, ignored=NOT_UPLOADED)
            logger.warning(f"{refused} All of it lies here; this command pushes it: {command}")
            return None
        push = self.pusher.push(
            self.args.output_dir, commit_message, revision=revision, ignored=NOT_UPLOADED, token=token, changing=True
        )
        if not blocking:
            return push
        self._finish_current_push()
        return push.result()

    # --- logging -------------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if self.is_world_process_zero():
            self._journal.write(self.state.log_history)


def in_use_message(output_dir: str | os.PathLike, found: Sequence[Path], what: str) -> str:
    return (
        f"`output_dir` is {str(output_dir)!r}, which holds {what} ({_listed(output_dir, found)}). Continue that with "
        "`resume_from_checkpoint=True` (--resume_from_checkpoint true), choose another folder, or pass "
        "`overwrite_output_dir=True` (--overwrite_output_dir) to remove what is there."
    )


def _listed(folder: str | os.PathLike, paths: Sequence[Path]) -> str:
    return ", ".join(path.relative_to(folder).as_posix() for path in paths[:3]) + ", ..." * (len(paths) > 3)
