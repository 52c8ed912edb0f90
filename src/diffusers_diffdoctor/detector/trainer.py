# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Train the artifact detector: images and their maps in, mean squared error out (DiffDoctor, stage one).

Left out on purpose: the data loop of the paper. It makes datasets, and this trains on one.
"""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from transformers import EvalPrediction, Trainer, TrainingArguments

from .configuration_artifact_detector import ArtifactDetectorConfig


IMAGE, MAP = "image", "artifact_map"
PIXELS, LABELS = "pixel_values", "labels"


@dataclass
class ArtifactDetectorTrainingArguments(TrainingArguments):
    r"""
    What [`~transformers.TrainingArguments`] has, and:

    Args:
        learning_rate (`float`, *optional*, defaults to 6e-5): SegFormer's own; the paper names none.
        flip_probability (`float`, *optional*, defaults to 0): probability in [0, 1] that a training image is mirrored, its
            map with it.
        jpeg_probability (`float`, *optional*, defaults to 0): probability in [0, 1] that a training image goes through JPEG,
            so that the detector cannot learn the compression of a source instead of its artifacts.
        jpeg_quality_min, jpeg_quality_max (`int`, *optional*, default to 50 and 95): range of the JPEG quality, 1 to 100.
        threshold (`float`, *optional*, defaults to 0.5): highest confidence from which an image counts as having artifacts,
            in the evaluation's rates.
    """

    learning_rate: float = field(default=6e-5, metadata={"help": "Initial learning rate; 6e-5 is SegFormer's own."})
    # The collator reads columns that the model's forward does not name.
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Must stay false."})
    flip_probability: float = field(
        default=0.0, metadata={"help": "Probability that a training image is mirrored, its map with it."}
    )
    jpeg_probability: float = field(
        default=0.0, metadata={"help": "Probability that a training image goes through JPEG."}
    )
    jpeg_quality_min: int = field(default=50, metadata={"help": "Lowest JPEG quality, 1 to 100."})
    jpeg_quality_max: int = field(default=95, metadata={"help": "Highest JPEG quality, 1 to 100."})
    threshold: float = field(
        default=0.5, metadata={"help": "Highest confidence from which an image counts as having artifacts."}
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("flip_probability", "jpeg_probability", "threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie in [0, 1], found {getattr(self, name)}.")
        if not 1 <= self.jpeg_quality_min <= self.jpeg_quality_max <= 100:
            raise ValueError(
                "`jpeg_quality_min` and `jpeg_quality_max` must be in order and lie in [1, 100], found "
                f"{self.jpeg_quality_min} and {self.jpeg_quality_max}."
            )
        if self.remove_unused_columns:
            raise ValueError("`remove_unused_columns` must be false: the collator reads the columns of the dataset.")


class ArtifactDetectorCollator:
    """Rows of a dataset to a batch for the detector.

    A row has either `image` and `artifact_map`, PIL images of one size, the map 8-bit with 255 = 1.0 = artifact; they are
    prepared by [`ArtifactDetectorImageProcessor`]. Or it has `pixel_values` (3, h, w) and `labels` (1, H, W), which are
    stacked as they are. Prepared images of different shapes are padded on the right and below with the mean colour, their
    maps with 0.

    Args:
        config: configuration of the detector.
        flip_probability, jpeg_probability, jpeg_quality: augmentation, see [`ArtifactDetectorTrainingArguments`]. Drawn from
            torch's generator, so that runs can be repeated; resumed in the middle of an epoch, a run draws others.
    """

    def __init__(
        self,
        config: ArtifactDetectorConfig,
        flip_probability: float = 0.0,
        jpeg_probability: float = 0.0,
        jpeg_quality: tuple[int, int] = (50, 95),
    ):
        from . import ArtifactDetectorImageProcessor

        self.processor = ArtifactDetectorImageProcessor.for_detector(config)
        self.flip_probability = flip_probability
        self.jpeg_probability = jpeg_probability
        self.jpeg_quality = jpeg_quality

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if all(PIXELS in row for row in rows):
            return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in (PIXELS, LABELS)}
        images, maps = zip(*(self._augment(*_read(row)) for row in rows))
        # One by one: images of different shapes are no batch yet.
        prepared = [
            self.processor(image, artifact_maps=artifact_map, return_tensors="pt")
            for image, artifact_map in zip(images, maps)
        ]
        height, width = (max(part[PIXELS].shape[side] for part in prepared) for side in (-2, -1))
        return {
            name: torch.cat(
                [
                    F.pad(part[name].float(), (0, width - part[name].shape[-1], 0, height - part[name].shape[-2]))
                    for part in prepared
                ]
            )
            for name in (PIXELS, LABELS)
        }

    def _augment(self, image: Image.Image, artifact_map: Image.Image) -> tuple[Image.Image, Image.Image]:
        if torch.rand(()) < self.flip_probability:
            image, artifact_map = ImageOps.mirror(image), ImageOps.mirror(artifact_map)
        if torch.rand(()) < self.jpeg_probability:
            low, high = self.jpeg_quality
            file = io.BytesIO()
            image.save(file, "JPEG", quality=int(torch.randint(low, high + 1, ())))
            image = Image.open(file).convert("RGB")
        return image, artifact_map


def _read(row: dict[str, Any]) -> tuple[Image.Image, Image.Image]:
    for name in (IMAGE, MAP):
        if not isinstance(row.get(name), Image.Image):
            raise TypeError(
                f"The column `{name}` must hold PIL images, found {type(row.get(name)).__name__}. With `datasets`, cast it: "
                f'dataset.cast_column("{name}", datasets.Image()).'
            )
    image, artifact_map = row[IMAGE].convert("RGB"), row[MAP]
    if artifact_map.mode not in ("L", "1"):
        raise ValueError(
            f"The column `{MAP}` must hold 8-bit maps of one channel (mode L, 255 = artifact), found mode "
            f"{artifact_map.mode}; convert them so that 1.0 becomes 255."
        )
    if image.size != artifact_map.size:
        raise ValueError(
            f"An image of {image.size[0]} x {image.size[1]} pixels has a map of {artifact_map.size[0]} x "
            f"{artifact_map.size[1]}; a map must have the size of its image."
        )
    return image, artifact_map.convert("L")


def detector_metrics(prediction: EvalPrediction, threshold: float = 0.5) -> dict[str, float]:
    """Metrics from the figures per image that [`ArtifactDetectorTrainer`] collects.

    Args:
        prediction: `predictions` (N, 2) with the mean squared error and the highest confidence of each image,
            `label_ids` (N,) with the highest value of its true map.
        threshold: highest confidence from which an image counts as having artifacts.

    Returns:
        `mse`; `mse_clean`, over images whose true map is all zero; `true_positive_rate`, the share of images with artifacts
        that are found; `false_positive_rate`, the share of the others in which artifacts are claimed. A metric over no
        image is left out.
    """
    (error, confidence), truth = torch.as_tensor(prediction.predictions).T, torch.as_tensor(prediction.label_ids)
    found, broken = (confidence >= threshold).float(), truth >= threshold
    metrics = {
        "mse": error,
        "mse_clean": error[truth == 0],
        "true_positive_rate": found[broken],
        "false_positive_rate": found[~broken],
    }
    return {name: values.mean().item() for name, values in metrics.items() if len(values)}


class ArtifactDetectorTrainer(Trainer):
    """Trains an [`ArtifactDetectorForSemanticSegmentation`] with the loss `L_AD`, the mean squared error of the confidence.

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
        model: a detector, or the id or folder of one.
        args: [`ArtifactDetectorTrainingArguments`].
        train_dataset, eval_dataset: a `datasets.Dataset`, or a torch dataset of dictionaries, with the columns that
            [`ArtifactDetectorCollator`] reads. `eval_dataset` may be a dictionary of them.
        data_collator: instead of the [`ArtifactDetectorCollator`]; then augmentation is its own business.
        compute_metrics: instead of [`detector_metrics`], with the same input: figures per image, not maps, which would not
            fit in memory.
        **kwargs: what [`~transformers.Trainer`] takes.

    Evaluation reports `eval_loss` and the metrics of [`detector_metrics`].

    Raises:
        ValueError: a dataset is empty or lacks a column.
    """

    _tag_names = ["diffusers-diffdoctor", "artifact-detection"]

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
        from . import ArtifactDetectorForSemanticSegmentation

        args = ArtifactDetectorTrainingArguments() if args is None else args
        if not isinstance(args, ArtifactDetectorTrainingArguments):
            raise TypeError(f"`args` must be ArtifactDetectorTrainingArguments, found {type(args).__name__}.")
        if isinstance(model, (str, os.PathLike)):
            model = ArtifactDetectorForSemanticSegmentation.from_pretrained(model, dtype=torch.float32)
        if not isinstance(model, ArtifactDetectorForSemanticSegmentation):
            raise TypeError(f"`model` must be an artifact detector, or the id or folder of one, found {model!r:.100}.")
        _check_dataset("train_dataset", train_dataset)
        for name, dataset in eval_dataset.items() if isinstance(eval_dataset, dict) else [("", eval_dataset)]:
            _check_dataset(f"eval_dataset[{name!r}]" if name else "eval_dataset", dataset)
        self.eval_collator = data_collator
        if data_collator is None:
            self.eval_collator = ArtifactDetectorCollator(model.config)
            data_collator = ArtifactDetectorCollator(
                model.config,
                args.flip_probability,
                args.jpeg_probability,
                (args.jpeg_quality_min, args.jpeg_quality_max),
            )
        if compute_metrics is None:

            def compute_metrics(prediction):
                return detector_metrics(prediction, args.threshold)

        kwargs.setdefault("processing_class", getattr(self.eval_collator, "processor", None))  # saved with the weights
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=data_collator,
            compute_metrics=compute_metrics,
            **kwargs,
        )

    def get_eval_dataloader(self, *args, **kwargs):
        return self._without_augmentation(super().get_eval_dataloader, *args, **kwargs)

    def get_test_dataloader(self, *args, **kwargs):
        return self._without_augmentation(super().get_test_dataloader, *args, **kwargs)

    def _without_augmentation(self, get_dataloader, *args, **kwargs):
        training_collator, self.data_collator = self.data_collator, self.eval_collator
        try:
            return get_dataloader(*args, **kwargs)
        finally:
            self.data_collator = training_collator

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """(loss, figures (B, 2), truth (B,)); see [`detector_metrics`]."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs[LABELS]
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        if prediction_loss_only:
            return outputs.loss.detach(), None, None
        confidence = F.interpolate(
            outputs.logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False
        ).sigmoid()
        error = (confidence - labels).square().flatten(1).mean(dim=1)
        figures = torch.stack([error, confidence.flatten(1).amax(dim=1)], dim=1)
        return outputs.loss.detach(), figures, labels.flatten(1).amax(dim=1)

    # The parent puts the tensors of a checkpoint's file into the model by their names there. Files keep the names that
    # SegFormer had before transformers 5, so it would find none and go on with random weights.
    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self._load_weights(resume_from_checkpoint)

    def _load_best_model(self):
        self._load_weights(self.state.best_model_checkpoint)

    def _load_weights(self, folder: str) -> None:
        model = self.accelerator.unwrap_model(self.model)
        model.load_state_dict(type(model).from_pretrained(folder).state_dict())

    def create_model_card(self, *args, **kwargs):
        """The detector's card says what it is and how to call it; one that is there is kept."""
        card = os.path.join(self.args.output_dir, "README.md")
        if self.is_world_process_zero() and not os.path.exists(card):
            model = self.accelerator.unwrap_model(self.model)
            with open(card, "w", encoding="utf-8") as file:
                file.write(
                    model.model_card(self.hub_model_id or os.path.basename(os.path.normpath(self.args.output_dir)))
                )


def _check_dataset(name: str, dataset: Any) -> None:
    if dataset is None:
        return
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError(f"`{name}` is empty.")
    columns = getattr(dataset, "column_names", None)  # of `datasets`
    if columns is None and hasattr(dataset, "__getitem__"):
        columns = dataset[0].keys() if isinstance(dataset[0], dict) else ()
    if columns is None:  # a stream that does not know its columns; the collator looks at its rows
        return
    for wanted in ((PIXELS, LABELS), (IMAGE, MAP)):
        if set(wanted) <= set(columns):
            return
    raise ValueError(
        f"`{name}` has the columns {sorted(columns)}; needed are `{IMAGE}` and `{MAP}`, or `{PIXELS}` and `{LABELS}`. "
        "Rename yours."
    )
