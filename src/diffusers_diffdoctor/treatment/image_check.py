# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Open every image of a dataset before a run, so that none of them ends it hours later.

Every process looks at its share, in threads: Pillow decodes without Python's lock. What was found usable is remembered under
`HF_HOME`, by the fingerprint of the dataset and by size and time of the files it points at, so that the same dataset is not
decoded again at every start.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import PIL
from accelerate.utils import gather_object
from huggingface_hub import constants
from tqdm.auto import tqdm
from transformers import is_datasets_available

from ..files import digest, write_atomically
from ..images import read_image


THREADS = 8
ROWS_AT_A_TIME = 16
WORTH_REMEMBERING = 100  # images; fewer are opened again sooner than anybody notices
QUIET_SECONDS = 2.0  # until a progress bar is shown
ROWS_TOLD, LETTERS_TOLD, ROWS_IN_CODE = 3, 160, 20


class UnusableImages(ValueError):
    """Images of a dataset cannot be used; `rows` are the numbers of all of them."""

    def __init__(self, name: str, count: int, reasons: dict[int, str]):
        self.rows = sorted(reasons)
        told = "; ".join(f"row {row}: {reasons[row]}" for row in self.rows[:ROWS_TOLD])
        more = f"; and {len(reasons) - ROWS_TOLD} more" if len(reasons) > ROWS_TOLD else ""
        few = len(reasons) <= ROWS_IN_CODE
        rows = f"{{{', '.join(map(str, self.rows))}}}" if few else "set(error.rows)"
        super().__init__(
            f"`{name}` has {len(reasons)} of {count} images that cannot be used ({told}{more}). Repair or remove them, or leave "
            f"their rows out: `dataset.select(sorted(set(range(len(dataset))) - {rows}))`"
            + ("." if few else ", where `error` is this one.")
        )


def check_images(
    dataset: Any, name: str, process_index: int = 0, world_size: int = 1, show_progress: bool = True
) -> None:
    """Open the images of all rows, each process its share; all of them raise what any of them finds.

    Args:
        dataset: rows with the column "image", anything that [`read_image`] reads.
        name: what errors call the dataset.
        process_index, world_size: this process, and how many look.
        show_progress: show a bar, if it takes longer than two seconds, on the first process.

    Raises:
        UnusableImages: a `ValueError` with the number of images that cannot be used, the first with their reasons, and the
            remedy.
    """
    count = len(dataset)
    remembered = _remembered_at(dataset) if count >= WORTH_REMEMBERING else None
    if all(gather_object([remembered is not None and remembered.is_file()])):
        return
    rows = range(process_index, count, world_size)
    with tqdm(
        total=len(rows),
        desc=f"opening the images of {name}",
        unit="image",
        delay=QUIET_SECONDS,
        disable=not show_progress or process_index > 0,
    ) as bar:
        reasons = dict(gather_object(list(_unusable(dataset, rows, bar.update))))
    if reasons:
        raise UnusableImages(name, count, reasons)
    if remembered is not None:
        with suppress(OSError):  # remembering saves time, and is no reason to stop
            remembered.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(remembered, json.dumps({"images": count}))


def _unusable(dataset: Any, rows: Sequence[int], done: Callable[[int], None]) -> Iterator[tuple[int, str]]:
    parts = [rows[start : start + ROWS_AT_A_TIME] for start in range(0, len(rows), ROWS_AT_A_TIME)]

    def look(part: Sequence[int]) -> list[tuple[int, str]]:
        return [(row, reason) for row in part if (reason := _reason(dataset, row)) is not None]

    with ThreadPoolExecutor(THREADS if _bears_threads(dataset) else 1) as pool:
        for part, found in zip(parts, pool.map(look, parts)):
            yield from found
            done(len(part))


def _reason(dataset: Any, row: int) -> str | None:
    """Why the image of a row cannot be used; `None` if it can."""
    try:
        read_image(dataset[row]["image"])
        return None
    except Exception as error:
        file, said = _file_of(dataset, row), " ".join(str(error).split()) or type(error).__name__
        said = said if file is None or file in said else f"{file!r}: {said}"
        return said if len(said) <= LETTERS_TOLD else f"{said[:LETTERS_TOLD]}..."


def _bears_threads(dataset: Any) -> bool:
    """Whether rows may be read side by side: not by code of the user's, nor where two rows may be one object of Pillow's."""
    if _is_dataset(dataset):
        return dataset.format["type"] != "custom"
    return isinstance(dataset, list) and all(isinstance(row["image"], (str, os.PathLike)) for row in dataset)


def _is_dataset(dataset: Any) -> bool:
    if not is_datasets_available():
        return False
    from datasets import Dataset

    return isinstance(dataset, Dataset)


def _file_of(dataset: Any, row: int) -> str | None:
    """The file that a row of a `datasets.Dataset` points at, or that it was made of."""
    if not _is_dataset(dataset):
        return None
    value = dataset.with_format("arrow")[row].column("image")[0].as_py()
    return value.get("path") if isinstance(value, dict) else None


def _remembered_at(dataset: Any) -> Path | None:
    """The file that exists if all images of the dataset were usable; `None` where that cannot be told of a later start."""
    if not _is_dataset(dataset):
        return None
    known = [PIL.__version__, dataset._fingerprint]
    try:
        for file in _files(dataset):
            status = os.stat(file)
            known.append(f"{file}\0{status.st_size}\0{status.st_mtime_ns}")
    except (OSError, ValueError):  # to be opened, and named if it cannot be; a path on the Hub cannot be asked
        return None
    return Path(constants.HF_HOME, "diffdoctor", "checked", digest("\n".join(known)))


def _files(dataset: Any) -> Iterable[str]:
    """Files whose content is not in the dataset's own, in the order of its table."""
    for chunk in dataset.data.column("image").chunks:
        names = {chunk.type.field(i).name for i in range(chunk.type.num_fields)}
        if {"bytes", "path"} <= names:
            chunk = chunk.field("path").filter(chunk.field("bytes").is_null())
        elif str(chunk.type) not in ("string", "large_string"):
            continue
        yield from (file for file in chunk.to_pylist() if file is not None)
