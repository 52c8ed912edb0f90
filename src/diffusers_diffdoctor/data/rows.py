# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""A dataset as rows that can be asked for by their number, for training."""

import glob
import os
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, Image, load_dataset

from .schema import FEATURES, IMAGES, OPTIONAL
from .shards import DEFAULT_SPLIT, LoadedShard, find_or_load_shards


COLUMNS = (*FEATURES, *OPTIONAL, "year")


def load_rows(dataset: str | os.PathLike, split: str = DEFAULT_SPLIT) -> Dataset:
    """The rows of a dataset with the columns of the schema, `ignore_map` and `year` where they are, and no others.

    Args:
        dataset: a folder of a stage, a folder with Parquet files or one file, a folder of images with a metadata.jsonl, or the id of
            a dataset on the Hub whose files are Parquet.
        split: to take.

    Returns:
        Images are decoded when a row is asked for. The library `datasets` keeps a copy of Parquet rows on its disk cache
        (`HF_DATASETS_CACHE`), which takes the room once more.

    Raises:
        ValueError: it cannot be read, or images are only paths, which could lead anywhere on this machine.
        FileNotFoundError: it does not exist.
    """
    shards = find_or_load_shards(dataset, split)
    if isinstance(shards[0], LoadedShard):
        rows = shards[0].rows_of
        rows = rows.select_columns([name for name in COLUMNS if name in rows.column_names])
    else:
        there = pq.read_schema(shards[0].path).names
        try:
            rows = load_dataset(
                "parquet",
                data_files=[glob.escape(str(shard.path)) for shard in shards],  # they are taken for patterns
                split="train",
                columns=[name for name in COLUMNS if name in there],
            )
        except Exception as error:  # of a library whose errors have many types; the cause's first line says it
            said = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
            raise ValueError(f"{os.fspath(dataset)!r} cannot be read: {said[0][:300]}") from error
    for name in IMAGES:
        if name in rows.column_names:
            rows = rows.cast_column(name, Image(decode=False))
            _refuse_paths(rows, name, shards[0].folder if isinstance(shards[0], LoadedShard) else None)
            rows = rows.cast_column(name, Image())
    return rows


def _refuse_paths(rows: Dataset, name: str, folder: Path | None) -> None:
    """Every image must have its bytes, or lie in the folder of its dataset."""
    images = rows.data.column(name)
    without = pc.and_(pc.is_valid(images), pc.is_null(pc.struct_field(images, "bytes")))
    if not pc.any(without).as_py():
        return
    if folder is None:
        raise ValueError(
            f"`{name}` must hold the bytes of image files, but {pc.sum(without).as_py()} rows have only paths."
        )
    top = folder.resolve()
    for path in pc.struct_field(pc.filter(images, without), "path").to_pylist():
        if not Path(path).resolve().is_relative_to(top):
            raise ValueError(f"`{name}` has the file {path!r}, which lies outside of the folder of the dataset.")
