# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The arguments of a detector's training."""

import json
import math
from dataclasses import dataclass, field
from typing import Any

from ..training import RunArguments
from .augmentation import PRESETS, Augmentation
from .configuration_artifact_detector import SIZE_MULTIPLE
from .losses import LOSSES


@dataclass
class ArtifactDetectorTrainingArguments(RunArguments):
    r"""
    What [`~transformers.TrainingArguments`] and [`~diffusers_diffdoctor.training.RunArguments`] have, and:

    Args:
        learning_rate (`float`, *optional*, defaults to 6e-5): SegFormer's own; the paper names none.
        loss (`str`, *optional*, defaults to `"mse"`): `"mse"`, the paper's squared error of the confidence, or `"bce_dice"`,
            cross-entropy with Dice, which is ours: squared error has no gradient left where a network that starts from
            random weights has settled on "nothing anywhere". See `losses`.
        source_weights (`dict[str, float]` or `str`, *optional*): for each source of training data a number of at least 0, in
            whose proportions images are drawn, or JSON of that: `{"human": 2, "photo": 1}`. Sources are the names of a dictionary
            of datasets, or the values of the column `source`. An epoch has as many draws as there are rows; those of a source are
            drawn in turn, see `sampling`. Without it every row is drawn once an epoch.
        balance (`str`, *optional*): `"category"` or `"artifacts"`: draw the categories (column `category`, texts or lists of them),
            or images with and without artifacts (whose map reaches `threshold`; every map is read before training), equally
            often, within each source if there are `source_weights`.
        ema_decay (`float`, *optional*): decay per update, in (0, 1), of an exponential moving average of the weights (update n
            decays by no more than n / (9 + n), and the first one by 0). With it, evaluation uses the average, and the saved
            weights are it; `trainer.model` keeps those that are trained.
        augmentation (`str`, *optional*, defaults to `"none"`): a preset of [`~detector.augmentation.Augmentation`]: `"none"`,
            `"light"` (mirrored, JPEG) or `"strong"` (scaled, turned, recoloured, blurred, noisy, resampled, JPEG and WebP too).
        augmentation_kwargs (`dict` or `str`, *optional*): fields of the preset to change, as a dictionary or as JSON.
        shrink_probability (`float`, *optional*, defaults to 0): probability in [0, 1] of the paper's dynamic augmentation: that
            an image whose map stays below `shrink_below` is reduced and padded back to its size, so that small sound structures
            appear in training.
        shrink_below (`float`, *optional*, defaults to 0.1): confidence in (0, 1]. The paper names none; this is the one above
            which its treatment punishes a pixel.
        crop_probability (`float`, *optional*, defaults to 0): probability in [0, 1] that a training image larger than the
            detector sees it is not made smaller, but cut to a square of that side, somewhere in it.
        image_size_min, image_size_max (`int`, *optional*): range of the short side in pixels, multiples of 32, at which training
            batches are seen, each at one drawn from it. Without them all are seen at the detector's `image_size`, as evaluation
            always is.
        map_maximum (`int`, *optional*): the value of 8-bit artifact maps that stands for 1.0: 255 (confidences) or 1 (class
            indices). Without it 255, and a map whose highest value is 1 is refused, because it could be either; not in rows with a
            `source`, which stages of `diffdoctor data` wrote, with 255.
        threshold (`float`, *optional*, defaults to 0.5): confidence, and value of a map, in (0, 1] from which a pixel counts as an
            artifact, and an image with such a pixel as having artifacts.
        worst_cases (`int`, *optional*, defaults to 16): images of highest squared error that an evaluation draws, beside truth and
            confidence, as one PNG in `worst_cases/` of the output folder, of which the newest 20 are kept; 0 for none. They
            are not pushed.
    """

    _VALID_DICT_FIELDS = [*RunArguments._VALID_DICT_FIELDS, "augmentation_kwargs"]

    learning_rate: float = field(default=6e-5, metadata={"help": "Initial learning rate; 6e-5 is SegFormer's own."})
    # The collator reads columns that the model's forward does not name.
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Must stay false."})
    loss: str = field(
        default="mse",
        metadata={
            "help": "Loss: mse (squared error, paper) or bce_dice (cross-entropy with Dice, ours), for networks that start from "
            "random weights, whose squared error has no gradient left where they have settled on nothing anywhere."
        },
    )
    source_weights: dict | str | None = field(
        default=None,
        metadata={
            "help": 'Proportions in which images of the sources are drawn, as JSON: \'{"human": 2, "photo": 1}\'; without it every '
            "row once an epoch."
        },
    )
    balance: str | None = field(
        default=None,
        metadata={
            "help": "Draw equally often: category (the categories of the column `category`) or artifacts (images with and without)."
        },
    )
    ema_decay: float | None = field(
        default=None,
        metadata={"help": "Decay of a moving average of the weights, used in evaluation and saved; none without it."},
    )
    augmentation: str = field(
        default="none",
        metadata={"help": "Augmentation of training images: none, light or strong.", "choices": list(PRESETS)},
    )
    augmentation_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Fields of the augmentation to change, as JSON, such as '{\"rotation\": 30}'."}
    )
    shrink_probability: float = field(
        default=0.0,
        metadata={
            "help": "Probability that an image whose map stays below shrink_below is reduced and padded back to its size: the "
            "paper's dynamic augmentation."
        },
    )
    shrink_below: float = field(
        default=0.1, metadata={"help": "Highest confidence below which an image may be reduced, above 0 (ours)."}
    )
    crop_probability: float = field(
        default=0.0,
        metadata={
            "help": "Probability that a training image larger than the detector sees it is cut to that size, not made smaller."
        },
    )
    image_size_min: int | None = field(
        default=None,
        metadata={"help": "Smallest short side in pixels at which training batches are seen, a multiple of 32."},
    )
    image_size_max: int | None = field(
        default=None,
        metadata={"help": "Largest short side in pixels at which training batches are seen, a multiple of 32."},
    )
    map_maximum: int | None = field(
        default=None,
        metadata={
            "help": "Value of 8-bit artifact maps that stands for 1.0: 255 or 1. By default 255, and a highest value of 1 is "
            "refused unless the row has a `source`."
        },
    )
    threshold: float = field(
        default=0.5, metadata={"help": "Confidence from which a pixel, and an image with it, counts as an artifact."}
    )
    worst_cases: int = field(
        default=16, metadata={"help": "Images of highest error that each evaluation draws; 0 for none."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.data_seed is None:
            self.data_seed = self.seed
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"`train_sampling_strategy` must be 'random' or 'sequential', found {self.train_sampling_strategy!r}: images "
                "have no length to group them by."
            )
        self.source_weights = _read_weights(self.source_weights)
        if self.balance not in (None, "category", "artifacts"):
            raise ValueError(f"`balance` must be category or artifacts, or left out, found {self.balance!r}.")
        if self.train_sampling_strategy == "sequential" and not (self.source_weights is self.balance is None):
            raise ValueError(
                "`source_weights` and `balance` draw at random: `train_sampling_strategy` must be 'random'."
            )
        if self.loss not in LOSSES:
            raise ValueError(f"`loss` must be one of {', '.join(LOSSES)}, found {self.loss!r}.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be in (0, 1), or left out, found {self.ema_decay}.")
        if not 0 <= self.crop_probability <= 1:
            raise ValueError(f"`crop_probability` must lie in [0, 1], found {self.crop_probability}.")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"`threshold` must lie in (0, 1], found {self.threshold}.")
        if self.worst_cases < 0:
            raise ValueError(f"`worst_cases` must be at least 0, found {self.worst_cases}.")
        self.build_augmentation()  # a ValueError if it cannot
        if self.image_sizes is not None and not (
            None not in self.image_sizes
            and SIZE_MULTIPLE <= self.image_size_min <= self.image_size_max
            and all(side % SIZE_MULTIPLE == 0 for side in self.image_sizes)
        ):
            raise ValueError(
                f"`image_size_min` and `image_size_max` must be multiples of {SIZE_MULTIPLE} in order, or both be left out, found "
                f"{self.image_size_min} and {self.image_size_max}."
            )
        if self.map_maximum not in (None, 1, 255):
            raise ValueError(f"`map_maximum` must be 255, 1 or None, found {self.map_maximum}.")
        if self.remove_unused_columns:
            raise ValueError("`remove_unused_columns` must be false: the collator reads the columns of the dataset.")

    @property
    def image_sizes(self) -> tuple[int, int] | None:
        """Range of the short side at which training batches are seen, or None."""
        sizes = (self.image_size_min, self.image_size_max)
        return None if sizes == (None, None) else sizes

    def build_augmentation(self) -> Augmentation:
        """What the arguments say about it.

        Raises:
            ValueError: an unknown preset or field, or a value out of its range.
        """
        changes = {} if self.augmentation_kwargs is None else self.augmentation_kwargs
        if not isinstance(changes, dict):
            raise ValueError(
                f"`augmentation_kwargs` must be a dictionary, or one as JSON in braces, found {changes!r:.100}."
            )
        shrink = {"shrink_probability": self.shrink_probability, "shrink_below": self.shrink_below}
        return Augmentation.preset(self.augmentation, **shrink | changes)


def _read_weights(given: dict[str, float] | str | None) -> dict[str, float] | None:
    """`source_weights` as a dictionary."""
    weights = given
    if isinstance(given, str):
        try:
            weights = json.loads(given)
        except ValueError:
            weights = given
    if weights is None:
        return None
    numbers = list(weights.values()) if isinstance(weights, dict) else [None]
    if not all(isinstance(number, (int, float)) and math.isfinite(number) and number >= 0 for number in numbers):
        raise ValueError(
            f'`source_weights` must give each source a number of at least 0, such as {{"human": 2, "photo": 1}}, found {given!r}.'
        )
    if not sum(numbers) > 0:
        raise ValueError(f"`source_weights` must have a weight above 0, found {given!r}.")
    return weights
