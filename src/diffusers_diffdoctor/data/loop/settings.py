# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What loop.yaml says, and its sections as words of a command line."""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...files import read_yaml
from ..shards import split_name


SECTIONS = ("categorize", "label", "balance", "prompts", "synthesize", "mine", "annotate", "train")
OPTIONAL_SECTIONS = ("categorize", "prompts", "synthesize")


@dataclass
class LoopSettings:
    """What loop.yaml says. A section has the arguments of its command, without those that the loop gives itself.

    Args:
        output_dir: folder of the loop.
        pool: images that nobody has labelled: a dataset.
        train_dataset: labelled images that each round's training begins with, `[NAME=]DATASET[:SPLIT]`.
        detector: the first one, a folder or an id of the Hub; without it the loop trains it from `train_dataset`.
        eval_dataset: labelled images, each `NAME=DATASET`, on which each round's detector is measured.
        rounds: at least 1.
        pseudo_from_round: the first round whose training takes the detector's own labels for simple images; 0 for none. The first
            detector is what the loop is there to mend, so that its labels are not taught.
        launcher: words before `-m diffdoctor` for the steps that use GPUs, such as [accelerate, launch].
        categorize: section of `data categorize`; without it the images need categories, or none stands out.
        label, balance, mine: sections.
        prompts, synthesize: sections, both or neither: new images of what stands out.
        annotate: `copies` (masks of an image, 1), `share` (of the masks that must be there before the round goes on, 1.0).
        train: section of `train-detector`. Its `model` is by default the detector of the round before. Its `source_weights` may name
            `masks` (what people painted in all rounds) and `pseudo` beside the names of `train_dataset`; where a round has none, the
            first of `train_dataset` is drawn as often more, so that the share of the others stays.

    Raises:
        ValueError: a value is of another type or out of range; it is named.
    """

    output_dir: str
    pool: str
    train_dataset: list[str] = field(default_factory=list)
    detector: str | None = None
    eval_dataset: list[str] = field(default_factory=list)
    rounds: int = 2
    pseudo_from_round: int = 2
    launcher: list[str] = field(default_factory=list)
    categorize: dict[str, Any] | None = None
    label: dict[str, Any] = field(default_factory=dict)
    balance: dict[str, Any] = field(default_factory=dict)
    prompts: dict[str, Any] | None = None
    synthesize: dict[str, Any] | None = None
    mine: dict[str, Any] = field(default_factory=dict)
    annotate: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("output_dir", "pool", "detector"):
            value = getattr(self, name)
            if not (isinstance(value, str) and value.strip()) and not (name == "detector" and value is None):
                raise ValueError(f"`{name}` must be a text, found {value!r:.100}.")
        for name in ("train_dataset", "eval_dataset", "launcher"):
            value = getattr(self, name)
            if isinstance(value, str):
                value = value.split() if name == "launcher" else [value]
                setattr(self, name, value)
            if not isinstance(value, list) or not all(isinstance(word, str) and word for word in value):
                raise ValueError(f"`{name}` must be a list of texts, found {value!r:.100}.")
        for name, least in (("rounds", 1), ("pseudo_from_round", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"`{name}` must be a whole number of at least {least}, found {value!r:.100}.")
        for name in SECTIONS:
            value = getattr(self, name)
            if value is None and name not in OPTIONAL_SECTIONS:
                setattr(self, name, {})
            elif value is not None and not isinstance(value, dict):
                raise ValueError(f"`{name}` must be `argument: value` lines, found {value!r:.100}.")
        if (self.prompts is None) != (self.synthesize is None):
            raise ValueError("`prompts` and `synthesize` belong together: give both sections, or neither.")
        if not self.train_dataset:
            raise ValueError("`train_dataset` is missing: masks and photographs that every training begins with.")
        if self.detector is None and "model" not in self.train:
            raise ValueError("Without a `detector` the loop trains the first one: say in `train: model:` from what.")
        self._check_annotate()
        self._check_names()

    def _check_annotate(self) -> None:
        unknown = set(self.annotate) - {"copies", "share"}
        if unknown:
            raise ValueError(f"`annotate` has `copies` and `share`, found {', '.join(sorted(map(str, unknown)))}.")
        copies, share = self.copies, self.share
        if type(copies) is not int or copies < 1:
            raise ValueError(f"`annotate: copies` must be a whole number of at least 1, found {copies!r:.100}.")
        if type(share) not in (int, float) or not 0 < share <= 1:
            raise ValueError(f"`annotate: share` must lie in (0, 1], found {share!r:.100}.")

    def _check_names(self) -> None:
        for name, texts in (("train_dataset", self.train_dataset), ("eval_dataset", self.eval_dataset)):
            names = [named(text)[0] for text in texts]
            twice = [one for one, count in Counter(names).items() if count > 1]
            if twice:
                raise ValueError(f"`{name}` has {twice[0]!r} twice: give names, as in `first=path/to/{twice[0]}`.")
            taken = {"masks", "pseudo"} & set(names)
            if name == "train_dataset" and taken:
                raise ValueError(f"`{name}`: {min(taken)!r} is a name of the loop's own: give another.")

    @property
    def copies(self) -> int:
        return self.annotate.get("copies", 1)

    @property
    def share(self) -> float:
        return self.annotate.get("share", 1.0)


def read_settings(path: str | os.PathLike, output_dir: str | None = None) -> LoopSettings:
    """The settings of a YAML file.

    Args:
        path: of the file.
        output_dir: instead of the file's.

    Raises:
        ValueError: the file is no YAML, has an alias, or something that no loop has; it is named.
        OSError: it cannot be read.
    """
    try:
        content = read_yaml(path)
        known = {one.name for one in dataclasses.fields(LoopSettings)}
        unknown = [str(name) for name in content if name not in known]
        if unknown:
            raise ValueError(f"there is no {', '.join(unknown)}; a loop has {', '.join(sorted(known))}")
        missing = [name for name in ("output_dir", "pool") if name not in content and not (output_dir and "_" in name)]
        if missing:
            raise ValueError(f"`{missing[0]}` is missing")
        return LoopSettings(**content | ({"output_dir": output_dir} if output_dir else {}))
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error


def named(text: str) -> tuple[str, str]:
    """`[NAME=]DATASET[:SPLIT]` as (name, dataset); without a name, the last part of the path."""
    name, equals, rest = text.partition("=")
    if equals and not os.path.exists(text):
        return name, rest
    return os.path.basename(split_name(text)[0].rstrip("/\\")).removesuffix(".parquet"), text


def arguments(section: Mapping[str, Any], dash: str = "-") -> list[str]:
    """A section of the settings as words of a command line.

    Args:
        section: argument -> value; a list is several words, a dictionary is JSON, true is the flag alone, none is no argument.
        dash: within a flag: "-" or "_".
    """
    words = []
    for name, value in section.items():
        flag = "--" + str(name).replace("-", "_").replace("_", dash)
        if value is None or (value is False and dash == "-"):
            continue
        if isinstance(value, bool):
            words += [flag] if dash == "-" else [flag, str(value).lower()]
        elif isinstance(value, dict):
            words += [flag, json.dumps(value)]
        else:
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    return words
