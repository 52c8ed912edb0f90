# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What a detector's trainer looks at in its datasets before it reads them: columns, sources and classes of rows, empty maps."""

from typing import Any

import torch

from ..images import read_artifact_map
from .augmentation import from_picture, without_ignored
from .collator import IGNORE, IMAGE, LABELS, MAP, PIXELS, read_map
from .sampling import groups_of
from .training_arguments import ArtifactDetectorTrainingArguments


def check_data(
    args: ArtifactDetectorTrainingArguments, train_dataset: Any, eval_dataset: Any
) -> tuple[list[str | None] | None, list[list[str]] | None]:
    """Refuse datasets that cannot be trained on, or not by these arguments, before a model is loaded.

    Returns:
        The source of each row of the training data where there are `source_weights`, and the categories of each where it is
        balanced by them; else None.

    Raises:
        ValueError: a dataset is empty, lacks a column or has rows that are not labelled; `source_weights` fit no source; a stream
            where rows must be asked for by their number.
    """
    for argument, given in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
        for name, dataset in given.items() if isinstance(given, dict) else [("", given)]:
            check_dataset(f"{argument}[{name!r}]" if name else argument, dataset)
    sources = classes = None
    if train_dataset is None:  # only to evaluate
        return sources, classes
    if isinstance(train_dataset, dict):
        for dataset in train_dataset.values():
            _rows(dataset, "A dictionary of sources")
    if args.source_weights is not None:
        sources = _sources_of_rows(train_dataset)
        groups_of(sources, None, args.source_weights)  # what fits no source is refused now
    if args.balance == "category":
        listed = _column("category", train_dataset, "balance")
        classes = [[names] if isinstance(names, str) else names or [] for names in listed]
    return sources, classes


def _sources_of_rows(dataset: Any) -> list[str | None]:
    """By the names of a dictionary of datasets, or the column of one."""
    if not isinstance(dataset, dict):
        return _column("source", dataset, "source_weights")
    return [name for name, its_rows in dataset.items() for _ in range(_rows(its_rows, "`source_weights`"))]


def _column(name: str, dataset: Any, argument: str) -> list[Any]:
    """The column that an argument needs, of a dictionary of datasets one after the other."""
    if isinstance(dataset, dict):
        return [value for one in dataset.values() for value in _column(name, one, argument)]
    count = _rows(dataset, f"`{argument}`")
    columns = _columns(dataset)
    if name not in columns:
        raise ValueError(f"`{argument}` needs a column `{name}` in `train_dataset`, which has {sorted(columns)}.")
    return list(dataset[name]) if hasattr(dataset, "column_names") else [dataset[i][name] for i in range(count)]


def _rows(dataset: Any, argument: str) -> int:
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            f"{argument} needs a `train_dataset` whose rows can be asked for by their number, found {type(dataset).__name__}. "
            "Load it without streaming, or mix it by yourself."
        )
    return len(dataset)


def _columns(dataset: Any) -> set[str] | None:
    """None for a stream that does not know them."""
    columns = getattr(dataset, "column_names", None)  # of `datasets`
    if columns is None and hasattr(dataset, "__len__"):
        columns = dataset[0].keys() if isinstance(dataset[0], dict) else ()
    return None if columns is None else set(columns)


def check_dataset(name: str, dataset: Any) -> None:
    """Refuse a dataset that is empty, lacks a column or, as far as that is cheap to see, has rows that are not labelled."""
    if dataset is None:
        return
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError(f"`{name}` is empty.")
    columns = _columns(dataset)
    if columns is None:  # the collator looks at its rows
        return
    if {PIXELS, LABELS} <= columns:
        return
    if {IMAGE, MAP} <= columns:
        table = getattr(dataset, "data", None)  # of `datasets`; a selection of rows shares that of all
        unlabelled = table.column(MAP).null_count if table is not None and len(table) == len(dataset) else 0
        if unlabelled:
            raise ValueError(
                f"`{name}` has {unlabelled} rows of {len(dataset)} without an `{MAP}`, which are not labelled. Label them with "
                f"`diffdoctor data label`, or leave them out: dataset.filter(lambda row: row[{MAP!r}] is not None)."
            )
        return
    raise ValueError(
        f"`{name}` has the columns {sorted(columns)}; needed are `{IMAGE}` and `{MAP}`, or `{PIXELS}` and `{LABELS}`. "
        "Rename yours."
    )


class HighestOfMap(torch.utils.data.Dataset):
    """Of each row the highest value of its map, in [0, 1], or -1 where none of it counts."""

    def __init__(self, rows: Any, maximum: int | None):
        self.rows, self.maximum = rows, maximum

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> float:
        row = self.rows[number]
        if LABELS in row:
            return float(row[LABELS].max())
        artifact_map = read_map(row, self.maximum)
        if row.get(IGNORE) is None:
            return artifact_map.getextrema()[1] / 255
        return float(without_ignored(from_picture(artifact_map), read_artifact_map(row[IGNORE], 255)).max())
