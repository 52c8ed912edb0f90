# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Datasets as shards: what a stage reads one after the other, and what one process works on at a time.

A shard is a Parquet file, of a folder or of a dataset of the Hub, or a group of image files. Parquet is read in pieces and its
images are left undecoded, so that a shard of any size fits into memory and one broken image costs nothing but itself.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, load_dataset

from ..files import digest, find_images, read_regular_file, written_atomically
from .schema import FEATURES, IMAGES, Row, conform, with_schema


PATTERN = "{split}-{number:05d}-of-{count:05d}.parquet"
ROWS_AT_A_TIME = 100  # in memory, and in a row group of a file: what the Hub's viewer likes
MEGABYTE = 10**6
SHARD_MEGABYTES = 256
DEFAULT_SPLIT = "train"
# "train-00000-of-00002.parquet", with whatever the Hub or others put behind it, and "train.parquet" for the usual splits
SPLIT_IN_NAME = re.compile(
    r"(?:(\w+)-\d+(?:-of-\d+(?:\W.*)?)?|(train|test|validation|valid|val|dev)(?:\W.*)?)\.parquet"
)


class Quarantined(NamedTuple):
    """A row that goes no further, and why."""

    path: str | None  # of its image, as the row names it
    reason: str
    again: bool = False  # whether another run of the stage should try it


@dataclass(frozen=True)
class ParquetShard:
    """A Parquet file with the columns of the schema, at least `image`."""

    path: Path
    first: int  # number of its first row in its dataset
    rows: int
    dataset: int = 0  # number of its dataset among the inputs of the stage

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this shard from another without reading it."""
        return {"name": self.path.name, "rows": self.rows, "bytes": self.path.stat().st_size}

    @property
    def features(self) -> Features:
        """Of the rows that [`read`] gives: the schema, and behind it the file's further columns."""
        return with_schema(Features.from_arrow_schema(pq.read_schema(self.path)))

    def read(self) -> Iterator[Row | Quarantined]:
        """The rows, conforming to the schema, in order; those that do not are quarantined."""
        with pq.ParquetFile(self.path) as file:
            for batch in file.iter_batches(ROWS_AT_A_TIME):
                for row in batch.to_pylist():
                    try:
                        yield conform(row)
                    except ValueError as error:
                        yield Quarantined(_path_of(row), str(error))


@dataclass(frozen=True)
class FileShard:
    """Image files, each a row without a label."""

    files: tuple[tuple[Path, str], ...]  # with the name that a row gives it
    sizes: tuple[int, ...]  # bytes
    first: int
    dataset: int = 0

    @property
    def rows(self) -> int:
        return len(self.files)

    @property
    def identity(self) -> dict[str, Any]:
        names = (f"{name}\0{size}\0" for (_, name), size in zip(self.files, self.sizes))
        return {"name": self.files[0][1], "rows": self.rows, "bytes": sum(self.sizes), "sha256": digest(names)}

    @property
    def features(self) -> Features:
        return FEATURES

    def read(self) -> Iterator[Row | Quarantined]:
        for path, name in self.files:
            try:
                yield conform({"image": {"bytes": read_regular_file(path), "path": name}})
            except (OSError, ValueError) as error:
                yield Quarantined(name, getattr(error, "strerror", None) or str(error))


@dataclass(frozen=True)
class LoadedShard:
    """Rows of a dataset that the library `datasets` has read from a folder of images: in order, each image still in its file."""

    rows_of: Any  # a `datasets.Dataset`
    folder: Path  # outside of which no file is read
    first: int = 0
    dataset: int = 0

    @property
    def rows(self) -> int:
        return len(self.rows_of)

    @property
    def identity(self) -> dict[str, Any]:
        return {"name": self.folder.name, "rows": self.rows, "bytes": 0, "fingerprint": self.rows_of._fingerprint}

    @property
    def features(self) -> Features:
        return with_schema(self.rows_of.features)

    def read(self) -> Iterator[Row | Quarantined]:
        for row in self.rows_of:
            try:
                yield conform(row | {name: self._file(row[name]) for name in IMAGES if row.get(name)})
            except (OSError, ValueError) as error:
                yield Quarantined(_path_of(row), getattr(error, "strerror", None) or str(error))

    def _file(self, value: Any) -> Any:
        if not isinstance(value, dict) or value.get("bytes") is not None or not value.get("path"):
            return value
        path = Path(value["path"]).resolve()
        if not path.is_relative_to(self.folder.resolve()):
            raise ValueError(f"{value['path']!r} lies outside of the folder of the dataset.")
        return {"bytes": read_regular_file(path), "path": str(path.relative_to(self.folder.resolve()))}


Shard = ParquetShard | FileShard | LoadedShard


def _path_of(row: Row) -> str | None:
    image = row.get("image")
    path = image.get("path") if isinstance(image, dict) else None
    return path if isinstance(path, str) else None


# --- what a dataset consists of ------------------------------------------------------------------------------------------------


def find_shards(dataset: str | os.PathLike, split: str = DEFAULT_SPLIT, number: int = 0) -> list[ParquetShard]:
    """The Parquet files of a dataset in the order of their names.

    Args:
        dataset: a folder with Parquet files at any depth, such as a stage writes; one Parquet file; or the id of a dataset on the
            Hub that holds Parquet files, which are downloaded into the cache of `huggingface_hub`.
        split: the split to take: files whose name begins with it, or all where no file has a split in its name.
        number: of the dataset among several.

    Raises:
        FileNotFoundError: there is no such folder or dataset.
        ValueError: it has no Parquet file, no such split, no column `image`, or a file that is no whole Parquet file.
    """
    chosen = parquet_files(dataset, split)
    shards, first = [], 0
    for file in chosen:
        try:
            metadata, columns = pq.read_metadata(file), pq.read_schema(file).names
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{str(file)!r} is no whole Parquet file: {error}") from error
        if "image" not in columns:
            raise ValueError(f"{str(file)!r} has no column `image`; it has {', '.join(columns)}. Rename yours.")
        shards.append(ParquetShard(file, first, metadata.num_rows, number))
        first += metadata.num_rows
    if not first:
        raise ValueError(f"{os.fspath(dataset)!r} has no rows.")
    return shards


def parquet_files(dataset: str | os.PathLike, split: str | None = None) -> list[Path]:
    """The Parquet files of a dataset in the order of their names, of all splits without one. See [`find_shards`]."""
    path = Path(dataset)
    if path.is_file():  # named by itself, whatever split its name says
        return [path]
    if path.is_dir():
        _refuse_unfinished(path)
        files = _parquet_files(path)
    else:
        return _download(os.fspath(dataset), split)
    return _of_split(files, split, os.fspath(dataset))


def find_or_load_shards(
    dataset: str | os.PathLike,
    split: str = DEFAULT_SPLIT,
    number: int = 0,
    excluded: Iterable[str | os.PathLike] = (),
) -> list[Shard]:
    """As [`find_shards`], and also folders without Parquet files: of images with a `metadata.jsonl` (or .csv), as `datasets` reads
    them, with `file_name`, `artifact_map_file_name` and the other columns of the schema; or of image files alone, which are rows
    without a label.

    Args:
        excluded: files and folders that are not searched for image files.
    """
    path = Path(dataset)
    if not path.is_dir() or _parquet_files(path):
        return find_shards(dataset, split, number)
    if not any(path.rglob("metadata.jsonl")) and not any(path.rglob("metadata.csv")):
        top = path.absolute()
        files = [(file, file.relative_to(top).as_posix()) for file in find_images([top], excluded).images]
        return group_files(files, SHARD_MEGABYTES, number)
    try:
        rows = load_dataset("imagefolder", data_dir=str(path), split=split)
    except Exception as error:  # of a library whose errors have many types
        raise ValueError(
            f"{str(path)!r} cannot be read as a folder of images: {' '.join(str(error).split())[:300]}"
        ) from error
    for name, feature in rows.features.items():
        if isinstance(feature, Image):
            rows = rows.cast_column(name, Image(decode=False))
    return [LoadedShard(rows, path, 0, number)]


def _parquet_files(folder: Path) -> list[Path]:
    """Those at any depth that lie in no hidden folder, in order."""
    found = sorted(folder.rglob("*.parquet"))
    return [file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def _refuse_unfinished(folder: Path) -> None:
    """A stage that was stopped has left some of its shards: they must not be taken for the whole."""
    plan = folder / "stage.json"
    if not plan.is_file():
        return
    try:
        finished = json.loads(plan.read_text(encoding="utf-8")).get("counts") is not None
    except (ValueError, AttributeError, OSError) as error:
        raise ValueError(f"{str(plan)!r} cannot be read ({error}): run the stage again.") from error
    if not finished:
        raise ValueError(
            f"{str(folder)!r} is not finished: the stage that writes it was stopped or is running. Run its command again."
        )


def _of_split(files: Sequence[Path], split: str | None, dataset: str) -> list[Path]:
    if not files:
        raise ValueError(
            f"{dataset!r} has no Parquet file. Image files become a dataset by `diffdoctor data photos`; any other dataset of "
            "the library `datasets` by `dataset.to_parquet(path)`."
        )
    splits = {file: match[1] or match[2] for file in files if (match := SPLIT_IN_NAME.fullmatch(file.name))}
    named = sorted(set(splits.values()))
    if split is None or len(splits) < len(files) or named == []:
        return list(files)
    chosen = [file for file in files if splits[file] == split]
    if not chosen:
        raise ValueError(
            f"{dataset!r} has no split {split!r}; it has {', '.join(named)}. Write {dataset}:{named[0]}, say."
        )
    return chosen


def _download(dataset: str, split: str | None) -> list[Path]:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    missing = f"{dataset!r} is neither a folder nor a dataset of the Hub"
    try:
        info = HfApi().dataset_info(dataset)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(f"{missing}: {str(error).splitlines()[0]}") from error
    except Exception as error:  # of the transport, whose types depend on the client's version
        raise FileNotFoundError(f"{missing} that can be reached: {error}") from error
    names = sorted(file.rfilename for file in info.siblings if file.rfilename.endswith(".parquet"))
    chosen = _of_split([Path(name) for name in names], split, dataset)
    return [Path(hf_hub_download(dataset, name.as_posix(), repo_type="dataset", revision=info.sha)) for name in chosen]


def rows_at(shards: Sequence[Shard], places: Iterable[tuple[int, int]]) -> dict[tuple[int, int], Row]:
    """Rows by (number of their shard, position among those of its rows that conform to the schema), each shard read once."""
    wanted: dict[int, set[int]] = {}
    for number, position in places:
        wanted.setdefault(number, set()).add(position)
    found = {}
    for number, positions in wanted.items():
        rows = (row for row in shards[number].read() if not isinstance(row, Quarantined))
        for position, row in enumerate(islice(rows, max(positions) + 1)):
            if position in positions:
                found[number, position] = row
    return found


def split_name(text: str) -> tuple[str, str]:
    """ "name:split" as (name, split); without a split, `DEFAULT_SPLIT`. A path that exists is taken as it is."""
    name, colon, split = text.rpartition(":")
    if not colon or os.path.exists(text) or not re.fullmatch(r"\w+", split):
        return text, DEFAULT_SPLIT
    return name, split


def group_files(files: Sequence[tuple[Path, str]], shard_megabytes: float, number: int = 0) -> list[FileShard]:
    """Files in groups of about `shard_megabytes`, in order; a file that is gone counts as empty."""
    sizes = []
    for path, _ in files:
        try:
            sizes.append(path.stat().st_size)
        except OSError:
            sizes.append(0)
    return [
        FileShard(tuple(files[begin:end]), tuple(sizes[begin:end]), begin, number)
        for begin, end in ranges_of_size(sizes, shard_megabytes)
    ]


def ranges_of_size(sizes: Sequence[int], megabytes: float) -> list[tuple[int, int]]:
    """Ranges [begin, end) of neighbours whose sizes in bytes add up to at most `megabytes`, or that are one that is larger."""
    ranges, begin, total = [], 0, 0
    for number, size in enumerate(sizes):
        if number > begin and total + size > megabytes * MEGABYTE:
            ranges.append((begin, number))
            begin, total = number, 0
        total += size
    return [*ranges, (begin, len(sizes))] if sizes else []


# --- writing -------------------------------------------------------------------------------------------------------------------


def write_shard(path: Path, rows: Iterable[Row], features: Features) -> int:
    """Write rows to a Parquet file, which appears when it is whole; the same rows give the same bytes. Returns their number."""
    schema, count, waiting = features.arrow_schema, 0, []
    with written_atomically(path) as unfinished, pq.ParquetWriter(unfinished, schema) as writer:
        for row in rows:
            waiting.append({name: row.get(name) for name in features})
            count += 1
            if len(waiting) == ROWS_AT_A_TIME:
                writer.write_table(pa.Table.from_pylist(waiting, schema))
                waiting.clear()
        if waiting:
            writer.write_table(pa.Table.from_pylist(waiting, schema))
    return count
