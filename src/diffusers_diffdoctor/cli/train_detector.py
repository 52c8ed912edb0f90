# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor train-detector`: train an artifact detector on labelled images, measure it on held-out ones, save it with a card.

The example `train_detector.py` is this script. What a run needs is an argument: one of `ScriptArguments` below or of
`ArtifactDetectorTrainingArguments`, on the command line or in a recipe. What is left out: making the data, see `diffdoctor data`.

One process:
    diffdoctor train-detector --train_dataset annotated photos --output_dir detector
Eight GPUs:
    accelerate launch --config_file examples/accelerate/multi_gpu.yaml -m diffdoctor train-detector --train_dataset ...
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from datasets import Dataset
from transformers import TrainerCallback, set_seed

from ..data import load_rows
from ..data.shards import split_name
from ..detector import ArtifactDetectorTrainer, ArtifactDetectorTrainingArguments
from ..detector.architectures import ARCHITECTURES, load_detector, new_detector
from ..detector.sampling import GroupSampler
from ..detector.training_data import check_data, check_dataset
from ..evaluation.detector_figures import figure_table
from ..files import FolderInUse
from ..seeds import derive_seed
from .evaluate_detector import print_table
from .reach import check_reachable
from .training import Parser, recipes_in, resume_point


RECIPES = Path(__file__).parents[1] / "detector/recipes"
DEFAULT_RECIPE = "backbone"


@dataclass
class ScriptArguments:
    """What to train, and on what."""

    train_dataset: list[str] | None = field(
        default=None,
        metadata={
            "help": "Labelled images, from one or several: [NAME=]DATASET[:SPLIT], each a folder of a stage, a folder with Parquet "
            "files, one of images with a metadata.jsonl, or an id on the Hub. The names, by default the last part of a path, "
            "are those of --source_weights; with a single dataset without a name its column `source` has them."
        },
    )
    eval_dataset: list[str] | None = field(
        default=None,
        metadata={
            "help": "Labelled images to evaluate on, likewise. The sets of several are evaluated apart, by their names; without any, a "
            "part of the training data is held out."
        },
    )
    hold_out: float = field(
        default=0.05,
        metadata={
            "help": "Share of the rows of each training dataset that is held out for evaluation where there is no --eval_dataset; "
            "0 for none. Rows that belong together, such as variants of one image, may be torn apart."
        },
    )
    model: str | None = field(
        default=None,
        metadata={
            "help": "Where training begins: a detector, a SegFormer or another pretrained encoder of AutoBackbone, by folder or id on "
            "the Hub; or b0 to b5, a SegFormer of that size with random weights."
        },
    )
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Short side in pixels at which the detector sees images, a multiple of 32; without it the model's own, or 512."
        },
    )

    def __post_init__(self):
        if not 0 <= self.hold_out <= 0.5:
            raise ValueError(f"`--hold_out` is {self.hold_out}, but must be a share in [0, 0.5]: 0 for none.")


def recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return recipes_in(RECIPES)


def parse(
    argv: Sequence[str], recipe: str | None = DEFAULT_RECIPE, prog: str | None = None
) -> tuple[ScriptArguments, ArtifactDetectorTrainingArguments]:
    """Flags win over the recipe, given as `--config` or by default `recipe`, which wins over the defaults."""
    parser = Parser(
        ScriptArguments,
        ArtifactDetectorTrainingArguments,
        recipes(),
        description="Train an artifact detector on labelled images.",
        own_title="what to train, and on what",
        prog=prog,
    )
    return parser.parse(argv, recipe)


# --- data ----------------------------------------------------------------------------------------------------------------------


class Named(NamedTuple):
    """A dataset of the command line."""

    text: str  # as it was given
    name: str  # "" where none was given
    dataset: str
    split: str

    def load(self, argument: str) -> Dataset:
        """Its rows. Errors name the argument."""
        try:
            rows = load_rows(self.dataset, self.split)
        except (ValueError, OSError) as error:
            raise ValueError(f"`{argument} {self.text}`: {error}") from error
        check_dataset(f"{argument} {self.text}", rows)
        return rows


def read_names(texts: Sequence[str], argument: str) -> list[Named]:
    """`[NAME=]DATASET[:SPLIT]`, the datasets there and, where there are several, each with a name of its own.

    Raises:
        OSError: a dataset does not exist.
        ValueError: two have one name.
    """
    found = []
    for text in texts:
        match = None if os.path.exists(text) else re.fullmatch(r"([\w.-]+)=(.+)", text)
        name, rest = match.groups() if match else ("", text)
        dataset, split = split_name(rest)
        if not os.path.exists(dataset):
            check_reachable(dataset, argument, "dataset")
        if len(texts) > 1 and not name:
            name = re.split(r"[/\\]", dataset.rstrip("/\\"))[-1].removesuffix(".parquet")
        found.append(Named(text, name, dataset, split))
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"`{argument}` has two datasets of the name {name!r}: give them others, as in `first=path/to/{name}`."
            )
    return found


class Data(NamedTuple):
    """What the trainer takes: a dataset, or several by their names."""

    train: Any
    evaluation: Any


def read_data(script: ScriptArguments, say: Callable[[str], None] = print) -> Data:
    """What the arguments name; that all of it is there is looked at before any of it is read."""
    if not script.train_dataset:
        raise ValueError(
            "`--train_dataset` is missing: name labelled images, such as a folder of `diffdoctor data inject` or `data merge`."
        )
    training = read_names(script.train_dataset, "--train_dataset")
    evaluation = read_names(script.eval_dataset or [], "--eval_dataset")
    rows = {one.name: one.load("--train_dataset") for one in training}
    if evaluation:
        held_out = {one.name: one.load("--eval_dataset") for one in evaluation}
        held_out = held_out if len(held_out) > 1 or "" not in held_out else held_out[""]
    else:
        rows, held_out = hold_out(rows, script.hold_out)
        if held_out is not None:
            say(f"{len(held_out)} rows of the training data are held out for evaluation.")
    return Data(rows if "" not in rows else rows[""], held_out)


def hold_out(rows: dict[str, Dataset], share: float) -> tuple[dict[str, Dataset], Any]:
    """Each dataset without a share of its rows, and these as one dataset, or None. Which ones depends on their number alone, so
    that a run that goes on holds out the same."""
    if share == 0:
        return rows, None
    kept, held = {}, []
    for name, dataset in rows.items():
        count = len(dataset)
        if count < 2:
            raise ValueError(
                f"`--train_dataset` {name} has a single row, of which none can be held out: add rows, name others to evaluate on with "
                "`--eval_dataset`, or pass `--hold_out 0`."
            )
        order = torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed("hold out", count))).tolist()
        most = max(1, round(share * count))
        held.append(dataset.select(sorted(order[:most])))
        kept[name] = dataset.select(sorted(order[most:]))
    return kept, held[0] if len(held) == 1 else torch.utils.data.ConcatDataset(held)


def check_evaluation(args: ArtifactDetectorTrainingArguments, evaluation: Any) -> None:
    """Refuse now what would fail at the first evaluation, or after the last."""
    if evaluation is None and args.eval_strategy != "no":
        raise ValueError(
            f"`--eval_strategy {args.eval_strategy.value}` has nothing to evaluate on with `--hold_out 0`: name an `--eval_dataset`, or "
            "pass `--eval_strategy no --load_best_model_at_end false`."
        )
    metric = (args.metric_for_best_model or "").removeprefix("eval_")
    if isinstance(evaluation, dict) and metric and not any(metric.startswith(f"{name}_") for name in evaluation):
        raise ValueError(
            f"`--metric_for_best_model {args.metric_for_best_model}` is of no set of `--eval_dataset`, which are evaluated apart: name "
            f"one, such as {next(iter(evaluation))}_{metric}."
        )


# --- the model -----------------------------------------------------------------------------------------------------------------


def check_model_is_there(name: str | None) -> None:
    """Said before any data are read. Neither weights nor their kind are looked at."""
    if name is None:
        raise ValueError(
            f"`--model` is missing: name a detector or a pretrained encoder, or one of {', '.join(ARCHITECTURES)} for random weights."
        )
    if Path(name).is_dir():
        if not Path(name, "config.json").is_file():
            raise ValueError(
                f"`--model {name}` is a folder without a config.json: name one that `save_pretrained` wrote."
            )
    elif name not in ARCHITECTURES:
        check_reachable(name, "--model", remedy=f"For random weights name one of {', '.join(ARCHITECTURES)}.")


def make_model(script: ScriptArguments, seed: int):
    set_seed(seed)  # of random weights
    changes = {} if script.image_size is None else {"image_size": script.image_size}
    if script.model in ARCHITECTURES and not Path(script.model).is_dir():
        return new_detector(script.model, **changes)
    return load_detector(script.model, **changes)


# --- the run -------------------------------------------------------------------------------------------------------------------


def run(argv: Sequence[str], recipe: str | None = DEFAULT_RECIPE, prog: str | None = None) -> int:
    """Train, evaluate, save.

    Args:
        argv: the arguments of the command line.
        recipe: default of `--config`.
        prog: name of the program in messages.
    """
    try:
        script, args = parse(argv, recipe, prog or "diffdoctor train-detector")
        say = print if args.process_index == 0 else lambda text: None
        # recipes have as many as a GPU's machine; more than there are processors only wait, and torch warns. Rows are the same
        args.dataloader_num_workers = min(args.dataloader_num_workers, os.cpu_count() or 1)
        resume = resume_point(args, ArtifactDetectorTrainer)
        check_model_is_there(script.model)
        with args.main_process_first(desc="reading the data"):  # the others find them in the cache
            data = read_data(script, say)
        check_evaluation(args, data.evaluation)
        check_data(args, *data)
        if script.model in ARCHITECTURES and args.loss == "mse":
            say("`--loss mse` often learns nothing from random weights; `--loss bce_dice` does.")
        model = make_model(script, args.seed)
        trainer = ArtifactDetectorTrainer(model, args, train_dataset=data.train, eval_dataset=data.evaluation)
    except (ValueError, OSError, yaml.YAMLError) as error:  # its message says what to do; a traceback would bury it
        raise SystemExit(f"error: {error}") from error  # `diffdoctor --traceback train-detector` shows where
    trainer.add_callback(_TellPlan(trainer, say))
    say(f"{model.num_parameters() / 1e6:.1f} M parameters, {len(trainer.train_dataset)} images to train on.")
    try:
        trainer.train(resume_from_checkpoint=resume)
    except FolderInUse as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        return 130  # a checkpoint was saved, and the trainer has said where
    if data.evaluation is not None:
        if not trainer.figures or trainer.saved_step != trainer.state.global_step:
            trainer.evaluate()  # what is saved, which may be the best and not the last
        for prefix, figures in trainer.figures.items() if trainer.is_world_process_zero() else ():
            say(f"\n{prefix.removeprefix('eval').removeprefix('_') or 'Evaluation'}, of the detector that is saved:")
            print_table(*figure_table(figures))
    trainer.save_model()
    trainer.create_model_card()
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.end_training()  # a process that others are still connected to may end in an abort
    return 0


class _TellPlan(TrainerCallback):
    """How often rows are drawn, which is known when training begins."""

    def __init__(self, trainer: ArtifactDetectorTrainer, say: Callable[[str], None]):
        self.trainer, self.say = trainer, say

    def on_train_begin(self, args, state, control, **kwargs):
        if isinstance(self.trainer.sampler, GroupSampler):
            self.say(self.trainer.sampler.plan())
