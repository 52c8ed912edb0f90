# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Train the artifact detector: images and their maps in, confidences out (DiffDoctor, stage one).

Left out on purpose: the data loop of the paper. It makes datasets, and this trains on one.
"""

import math
import os
import time
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import DistributedType, broadcast, gather_object
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import TrainerCallback, set_seed

from ..disk import disk_errors_tolerated
from ..evaluation.detector_figures import DetectorFigures, count_images, headline
from ..loading import errors_named
from ..names import file_name
from ..training import RunTrainer
from ..training.record import missing_entries_named, plain, read_record
from . import ArtifactDetectorImageProcessor
from .architectures import load_detector
from .averaging import moving_average
from .collator import GROUPS, LABELS, PIXELS, SIZES, ArtifactDetectorCollator
from .losses import LOSSES
from .model_card import data_facts, write_card
from .modeling_artifact_detector import ArtifactDetectorForSemanticSegmentation, check_labels, squared_error
from .sampling import DrawnRows, EpochSampler, GroupSampler, groups_of
from .training_arguments import ArtifactDetectorTrainingArguments
from .training_data import HighestOfMap, check_data
from .worst_cases import WorstCases, remove_pictures, write_picture


LIVE_WEIGHTS = "live_model.safetensors"  # of a checkpoint: those that are trained, where its own are their average

# of a configuration: they differ with the library and the folder
NOT_COMPARED = {"transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype"}


class ArtifactDetectorTrainer(RunTrainer):
    """Trains an [`ArtifactDetectorForSemanticSegmentation`] to give every pixel the confidence that it is an artifact.

    ```python
    trainer = ArtifactDetectorTrainer(
        model=ArtifactDetectorForSemanticSegmentation(ArtifactDetectorConfig()),
        args=ArtifactDetectorTrainingArguments(output_dir="detector", num_train_epochs=3),
        train_dataset=dataset,                   # columns "image", "artifact_map"
        eval_dataset=held_out,
    )
    trainer.train()
    ```

    Args:
        model: a detector, or the id or folder of one, or of a pretrained encoder that gets a new decode head, see
            [`~detector.architectures.load_detector`].
        args: [`ArtifactDetectorTrainingArguments`].
        train_dataset: a `datasets.Dataset`, or a torch dataset of dictionaries, with the columns that
            [`ArtifactDetectorCollator`] reads; or a dictionary of them, whose names are the sources of `source_weights`.
        eval_dataset: likewise; the sets of a dictionary are evaluated apart.
        data_collator: instead of the [`ArtifactDetectorCollator`]; then augmentation is its own business.
        compute_metrics: further metrics, from a `transformers.EvalPrediction`: `predictions` (N, 3) with the mean squared error,
            the highest confidence and the loss of each image, all of pixels that count, `label_ids` (N,) with the highest value of
            its true map. Maps would not fit into memory.
        **kwargs: what [`~transformers.Trainer`] takes.

    The loss is the mean of [`losses.LOSSES`] over all images of an update, on all processes: an image weighs the same whatever
    the batch, the accumulation and the number of processes are. Evaluation reports `eval_loss`, the same mean over its images, and
    `eval_` with the names of [`~evaluation.DetectorFigures`]; `figures` keeps those of categories and generators too, by the
    prefix of the last evaluation with each. Its worst cases are drawn into `worst_cases/` of the output folder.

    Raises:
        ValueError: a dataset or an argument does not fit, see [`~detector.training_data.check_data`].
    """

    _tag_names = ["diffusers-diffdoctor", "artifact-detection"]
    private = (LIVE_WEIGHTS,)
    loss_is_scaled_for_ga = True  # `compute_loss` divides by the images of the update
    outputs = ("model*.safetensors", "model.safetensors.index.json", "config.json", "preprocessor_config.json")

    def __init__(
        self,
        model: Any = None,
        args: ArtifactDetectorTrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        data_collator: Any = None,
        compute_metrics: Any = None,
        **kwargs,
    ):
        args = ArtifactDetectorTrainingArguments() if args is None else args
        if not isinstance(args, ArtifactDetectorTrainingArguments):
            raise TypeError(f"`args` must be ArtifactDetectorTrainingArguments, found {type(args).__name__}.")
        self._row_sources, self._row_classes = check_data(args, train_dataset, eval_dataset)
        if isinstance(model, (str, os.PathLike)):
            set_seed(args.seed)  # of a new head's random weights
            model = load_detector(model)
        if not isinstance(model, ArtifactDetectorForSemanticSegmentation):
            raise TypeError(f"`model` must be an artifact detector, or the id or folder of one, found {model!r:.100}.")
        self._data = data_facts(train_dataset)
        if isinstance(train_dataset, dict):
            train_dataset = torch.utils.data.ConcatDataset(train_dataset.values())
        self.eval_collator = data_collator
        if data_collator is None:
            self.eval_collator = ArtifactDetectorCollator(
                model.config, map_maximum=args.map_maximum, for_evaluation=True
            )
            data_collator = ArtifactDetectorCollator(
                model.config,
                args.build_augmentation(),
                args.crop_probability,
                args.image_sizes,
                samples_at_once=args.train_batch_size * args.world_size,
                map_maximum=args.map_maximum,
                seed=args.data_seed,
            )
            # saved with the weights
            kwargs.setdefault("processing_class", ArtifactDetectorImageProcessor.for_detector(model.config))
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=data_collator,
            # the parent's own mean counts an image twice where processes have unequal numbers of them
            compute_metrics=lambda prediction: {
                "loss": float(np.mean(prediction.predictions[:, 2], dtype=np.float64)),
                **(compute_metrics(prediction) if compute_metrics is not None else {}),
            },
            **kwargs,
        )
        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(
                f"`ArtifactDetectorTrainer` does not shard models ({self.accelerator.distributed_type}): launch with plain data "
                "parallelism, see examples/accelerate/multi_gpu.yaml."
            )
        self._start_average()
        self.sampler = self._evaluation = None
        self.figures: dict[str, dict[str, Any]] = {}
        self.add_callback(_AtEpochsAndUpdates(self))

    def _start_average(self) -> None:
        """Moving average with the weights as they are for its first value; None without `ema_decay`."""
        model, decay = self.accelerator.unwrap_model(self.model), self.args.ema_decay
        self.average = None if decay is None else moving_average(model, decay)

    @property
    def evaluated_model(self) -> ArtifactDetectorForSemanticSegmentation:
        """What is evaluated and saved: the moving average of the weights, or the model itself without one."""
        return self.accelerator.unwrap_model(self.model) if self.average is None else self.average.module

    def record(self) -> dict[str, Any]:
        """What is written beside the weights, and compared when a run resumes: the run, the architecture, the rows."""
        config = self.accelerator.unwrap_model(self.model).config.to_dict()
        rows = len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None
        return {
            "config": _compared(config),
            "rows": rows,
            "data": self._data,
            "started_from": self.evaluated_model.config.name_or_path or None,
            "trained": time.strftime("%Y-%m", time.gmtime()),
            "average_updates": None if self.average is None else int(self.average.n_averaged),
            **super().record(),
        }

    def check_record(self, folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
        then, now = plain(then["config"]), plain(now["config"])
        differing = [f"{key} {then.get(key)!r}, here {now.get(key)!r}" for key in now if then.get(key) != now[key]]
        if differing:
            raise ValueError(
                f"The detector of checkpoint {str(folder)!r} has {'; '.join(differing)}. Resume with a detector of its "
                "configuration."
            )

    def get_train_dataloader(self):
        whole = self.train_dataset
        if hasattr(whole, "__len__"):
            self.train_dataset = DrawnRows(whole, tell=isinstance(self.data_collator, ArtifactDetectorCollator))
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = whole

    def _get_dataloader(self, *args, **kwargs):
        loader = super()._get_dataloader(*args, **kwargs)
        # A loader draws a seed whenever it starts workers. From torch's own generator, the network's dropout would depend on
        # how many there are and whether they persist, and a resumed run would end otherwise.
        loader.base_dataloader.generator = torch.Generator().manual_seed(self.args.data_seed)
        return loader

    def _get_train_sampler(self, train_dataset: Any = None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, DrawnRows):
            return super()._get_train_sampler(train_dataset)
        args = self.args
        if args.source_weights is None and args.balance is None:
            shuffle = args.train_sampling_strategy != "sequential"
            self.sampler = EpochSampler(len(dataset), args.data_seed, shuffle)
        else:
            classes = self._with_and_without_artifacts() if args.balance == "artifacts" else self._row_classes
            groups = groups_of(self._row_sources, classes, args.source_weights)
            self.sampler = GroupSampler(groups, len(dataset), args.data_seed)
        return self.sampler

    def _with_and_without_artifacts(self) -> list[list[str]]:
        """The class of each row by its map; each process reads its part of them."""
        rows, rank, world = self.train_dataset.rows, self.accelerator.process_index, self.accelerator.num_processes
        mine = range(rank, len(rows), world)
        maps = torch.utils.data.DataLoader(
            HighestOfMap(rows, self.args.map_maximum), 64, sampler=mine, num_workers=self.args.dataloader_num_workers
        )
        shown = tqdm(maps, desc="Reading maps", disable=rank > 0 or self.args.disable_tqdm)
        highest = torch.zeros(len(rows))
        highest[list(mine)] = torch.cat([batch.float() for batch in shown])
        highest = self.accelerator.reduce(highest.to(self.args.device)).tolist()
        return [["artifacts" if value >= self.args.threshold else "no artifacts"] for value in highest]

    def get_eval_dataloader(self, *args, **kwargs):
        return self._without_augmentation(super().get_eval_dataloader, *args, **kwargs)

    def get_test_dataloader(self, *args, **kwargs):
        return self._without_augmentation(super().get_test_dataloader, *args, **kwargs)

    def _without_augmentation(self, get_dataloader, *args, **kwargs):
        """With every row once: a training that leaves out the last ones of an epoch must not be judged without them."""
        training_collator, drop_last = self.data_collator, self.args.dataloader_drop_last
        self.data_collator, self.args.dataloader_drop_last = self.eval_collator, False
        try:
            loader = get_dataloader(*args, **kwargs)
        finally:
            self.data_collator, self.args.dataloader_drop_last = training_collator, drop_last
        if self.args.world_size > 1 and not hasattr(loader.dataset, "__len__"):
            raise ValueError(
                f"`eval_dataset` is a stream ({type(loader.dataset).__name__}), of which several processes would count some rows "
                "twice. Load it without streaming."
            )
        return loader

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of an update, and how many images they hold on all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = torch.tensor(float(sum(len(batch[LABELS]) for batch in batches)), device=device)
        return batches, self.accelerator.reduce(count)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The sum of the images' losses over the images of the update: each weighs the same in it."""
        if self.compute_loss_func is not None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs[LABELS]
        check_labels(inputs[PIXELS], labels)
        outputs = model(pixel_values=inputs[PIXELS])
        losses = LOSSES[self.args.loss](_upsample(outputs.logits, labels.shape[-2:]), labels)
        # DDP averages the gradients of the processes, so each takes its sum times their number over the count of all.
        loss = losses.sum() * self.accelerator.num_processes / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not math.isfinite(norm) and self.accelerator.scaler is None:  # a scaler skips such steps by itself
            raise FloatingPointError(
                f"The gradient's norm is {float(norm)} in step {self.state.global_step + 1}. The weights were not updated. Resume "
                "from the last checkpoint with a lower `learning_rate` or `max_grad_norm`, or in float32 (`bf16=False`)."
            )
        return norm

    # --- evaluation ----------------------------------------------------------------------------------------------------------

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        """The parent's, with the figures of [`DetectorFigures`] and a picture of the worst cases.

        Each process evaluates with the statistics of normalisation layers that are saved, which are those of the first one.
        """
        for buffer in self.evaluated_model.buffers():
            broadcast(buffer)
        self._evaluation = _Evaluation(DetectorFigures(self.args.threshold), WorstCases(self.args.worst_cases))
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        whole, *others = gather_object([self._evaluation])
        self._evaluation = whole
        for other in others:
            whole.figures.merge(other.figures)
            whole.worst.merge(other.worst)
        figures = self.figures[metric_key_prefix] = whole.figures.compute()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in headline(figures).items()})
        _warn_of_one_sided(figures["all"])
        if self.is_world_process_zero():
            with disk_errors_tolerated(self.args.output_dir, "The picture of the worst cases is left out."):
                name = file_name(metric_key_prefix)
                write_picture(whole.worst, self.args.output_dir, name, self.saved_step)
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """(None, figures (B, 3), truth (B,)): see `compute_metrics`; and what [`evaluation_loop`] adds up, by the way.

        Each image is seen without the padding that its batch brought, and measured at the full size of its map: the figures
        are those of `confidence`, image by image, whatever the batch is.
        """
        inputs, model = self._prepare_inputs(inputs), model if self.average is None else self.average.module
        pixels, labels = inputs[PIXELS], inputs[LABELS]
        check_labels(pixels, labels)
        whole = torch.tensor([(*pixels.shape[-2:], *labels.shape[-2:])] * len(labels))
        groups = defaultdict(list)  # size -> rows of the batch
        for row, size in enumerate(inputs.get(SIZES, whole).tolist()):
            groups[tuple(size)].append(row)
        columns = [inputs.get(name, [None] * len(labels)) for name in GROUPS]
        first, real = self._place_of_batch(len(labels))
        figures = labels.new_empty(len(labels), 3)
        for (h, w, height, width), rows in groups.items():
            seen, truth = pixels[rows, :, :h, :w], labels[rows, :, :height, :width]
            with torch.no_grad(), self.accelerator.autocast():
                logits = _upsample(model(pixel_values=seen).logits, (height, width))
            confidence = logits.sigmoid()
            figures[rows, 0] = squared_error(confidence, truth)
            figures[rows, 1] = confidence.where(truth >= 0, 0).flatten(1).amax(dim=1)
            figures[rows, 2] = LOSSES[self.args.loss](logits, truth)
            counts = count_images(confidence, truth, self.args.threshold)
            for i, row in enumerate(rows):
                if row < real:
                    self._evaluation.figures.add(counts[i : i + 1], *([values[row]] for values in columns))
                    self._evaluation.worst.add(
                        first + row, float(figures[row, 0]), self._as_image(seen[i]), truth[i], confidence[i]
                    )
        return None, figures, labels.flatten(1).amax(dim=1)

    def _place_of_batch(self, size: int) -> tuple[int, int]:
        """The number of a batch's first row, and how many of its rows are real: several processes fill up the last round of
        batches with rows that were evaluated before."""
        state, world, rank = self.accelerator.gradient_state, self.args.world_size, self.args.process_index
        first = (self._evaluation.batches * world + rank) * self.args.eval_batch_size
        self._evaluation.batches += 1
        if world == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return first, size
        return first, min(max(state.remainder - rank * size, 0), size)

    def _as_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised (3, h, w) back to [0, 1]."""
        config = self.evaluated_model.config
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (config.image_mean, config.image_std))
        return (pixels * std + mean).clamp(0, 1)

    # --- checkpoints ---------------------------------------------------------------------------------------------------------

    def _take_over(self, step: int | None, again: bool = False) -> None:
        super()._take_over(step, again)
        if self.is_world_process_zero():
            remove_pictures(self.args.output_dir, after=step or 0)

    def _save_weights(self, folder: Path) -> None:
        self.evaluated_model.save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        self._write_card(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.average is not None and self.args.should_save:
            state = self.accelerator.unwrap_model(self.model).state_dict()
            save_file({name: value.contiguous() for name, value in state.items()}, Path(output_dir, LIVE_WEIGHTS))

    # The parent puts the tensors of a checkpoint's file into the model by their names there. Files keep the names that
    # SegFormer had before transformers 5, so it would find none and go on with random weights.
    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """The trained weights, and their average if the checkpoint has one; else the average starts from them."""
        folder = Path(resume_from_checkpoint)
        self._load_weights(folder)
        if (folder / LIVE_WEIGHTS).is_file():
            if self.average is not None:
                record = folder / self.record_file
                with missing_entries_named(record):
                    self.average.n_averaged.fill_(read_record(record)["average_updates"])
            with errors_named(folder, f"Checkpoint {str(folder)!r}"):
                self.accelerator.unwrap_model(self.model).load_state_dict(load_file(folder / LIVE_WEIGHTS))

    def _load_best_model(self):
        folder = Path(self.state.best_model_checkpoint)
        self._load_weights(folder)
        self._best_step = read_record(folder / self.record_file)["step"]

    def _load_weights(self, folder: Path) -> None:
        """The weights of a folder, which are what a new average starts from."""
        model = self.accelerator.unwrap_model(self.model)
        with errors_named(folder, f"Checkpoint {str(folder)!r}"):
            model.load_state_dict(type(model).from_pretrained(folder).state_dict())
        self._start_average()

    def create_model_card(self, *args, **kwargs):
        """The detector's card says what it is, how to call it, what it learned from and how well it does; one that somebody has
        edited is kept."""
        if self.is_world_process_zero():
            self._write_card(self.args.output_dir, self.hub_model_id)

    def _write_card(self, folder: str | os.PathLike, name: str | None = None) -> None:
        write_card(folder, self.evaluated_model, name, record=self.record(), log_history=self.state.log_history)


def _upsample(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)


def _compared(config: dict[str, Any]) -> dict[str, Any]:
    """What a configuration, and those within it, say of the architecture."""
    return {
        key: _compared(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in NOT_COMPARED
    }


@dataclass
class _Evaluation:
    """What one process has of an evaluation."""

    figures: DetectorFigures
    worst: WorstCases
    batches: int = 0


def _warn_of_one_sided(figures: dict[str, float]) -> None:
    broken, images = figures["images_with_artifacts"], figures["images"]
    if images and broken in (0, images):
        missing, undefined = ("with", "misses") if broken == 0 else ("without", "false_alarms")
        warnings.warn(
            f"The evaluation has no image {missing} artifacts, so that {undefined} and image_auroc are nan. It needs images of both "
            "kinds: maps that reach the threshold, and maps of zeros.",
            stacklevel=2,
        )


class _AtEpochsAndUpdates(TrainerCallback):
    """Tells the sampler the epoch, whose draws carry it into the workers, and moves the average on after each update."""

    def __init__(self, trainer: ArtifactDetectorTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.trainer.sampler is not None:
            self.trainer.sampler.epoch = int(state.epoch or 0)

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.average is not None:
            self.trainer.average.update_parameters(self.trainer.accelerator.unwrap_model(self.trainer.model))
