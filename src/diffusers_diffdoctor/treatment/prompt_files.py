# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Prompts from text files, folders and the Hub: the one reader of what `--prompts` and its like name.

Texts are taken as they stand in the file. In particular nothing guesses a type, so that a prompt "NA" or "2024" stays a text,
and only what a text editor shows as the end of a line is one.

| file | a prompt is |
|---|---|
| .txt | a line. Blank lines are left out, and so are comments, which begin with `#` and a blank; `#hashtag` is a prompt |
| .csv | a cell of the column `prompt`. The first line names the columns, a comma stands between cells, `"` around a text with commas, quotes (doubled) or line breaks |
| .jsonl | the field `prompt` of an object, one object for each line |
| .json | the field `prompt` of an object in a list, or a text in a list of texts |
| folder or id | a row of what `datasets.load_dataset` makes of it, split "train" |

Files are UTF-8, with or without a byte order mark.
"""

import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, load_dataset


def read_prompt_file(name: str, column: str = "prompt") -> Dataset:
    """Rows with the column "prompt" from a file, a folder or an id of the Hub; see the table above.

    Args:
        name: path with one of the endings .txt, .csv, .jsonl, .json; a folder, or an id.
        column: what the column is called there; where none is, "prompt" is taken.

    Returns:
        A dataset with the column "prompt", from a file also "category" if every row has one, else all columns.

    Raises:
        FileNotFoundError: there is neither such a file nor folder, and no data set of that id can be loaded.
        ValueError: the file is not UTF-8 or not of its format, has no such column or no prompt, or a row without one; line
            and remedy are named. Or a data set cannot be read, or has images only.
    """
    path = Path(name)
    suffix = path.suffix.lower()
    if suffix in FORMATS:
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {name!r} to read prompts from.")
        rows = FORMATS[suffix](_decode(path), name)
        return Dataset.from_list(_checked(rows, column, name))
    if path.is_file():
        raise ValueError(
            f"{name!r} has none of the endings {', '.join(FORMATS)}: rename it, or convert it to one of these."
        )
    try:
        dataset = load_dataset(name, split="train")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{name!r} is neither a file nor a folder here, and cannot be loaded from the Hub: {error}"
            if not path.is_dir()
            else f"{name!r} is a folder without data that `datasets.load_dataset` can read: {error}"
        ) from error
    except (
        Exception
    ) as error:  # a script, which is not run, or whatever a reader meets; the cause's first line says it
        said = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{name!r} cannot be read: {said[0]}") from error
    if "image" in dataset.column_names and set(dataset.column_names) <= {"image", "label"}:
        raise ValueError(
            f"{name!r} has images without prompts: add a file metadata.jsonl beside them, with a line "
            '{"file_name": "0.png", "prompt": "a photo of a hand"} for each.'
        )
    found = _column(dataset.column_names, column, repr(name))
    return dataset if found == "prompt" else dataset.rename_column(found, "prompt")


def read_image_prompts(name: str, images: Sequence[Path], column: str = "prompt") -> list[str]:
    """The prompt of each image.

    Args:
        name: a .csv, .jsonl or .json file whose rows have `file_name`, relative to its folder, and a prompt, as `metadata.jsonl` of an
            image folder; or a file of [`read_prompt_file`] with as many prompts as there are images, in their order.
        images: absolute paths.
        column: what the column of the prompts is called there; where none is, "prompt" is taken.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is wrong, an image has no prompt in it, or there are more or fewer prompts than images.
    """
    path = Path(name)
    prompts = list(read_prompt_file(name, column)["prompt"])
    if path.suffix.lower() in FORMATS:
        rows = [row for _, row in FORMATS[path.suffix.lower()](_decode(path), name)]
        if all("file_name" in row for row in rows):
            by_file = {str((path.parent / row["file_name"]).absolute()): prompt for row, prompt in zip(rows, prompts)}
            left = [image for image in images if str(image) not in by_file]
            if left:
                raise ValueError(
                    f"{name!r} has no prompt for {len(left)} of {len(images)} images, the first is {left[0]}."
                )
            return [by_file[str(image)] for image in images]
    if len(prompts) != len(images):
        raise ValueError(
            f"{name!r} has {len(prompts)} prompts for {len(images)} images. Add a column `file_name`, or give one prompt for each "
            "image, in the order of their names."
        )
    return prompts


def distinct(dataset: Dataset) -> tuple[Dataset, int]:
    """The first row of each prompt, and the number of rows left out."""
    first = {prompt: i for i, prompt in reversed(list(enumerate(dataset["prompt"])))}
    return dataset.select(sorted(first.values())), len(dataset) - len(first)


def hold_out(dataset: Dataset, every: int = 10) -> tuple[Dataset, Dataset]:
    """Rows to train on, and each `every`-th to evaluate on. Prompts must be [`distinct`], or one would be in both.

    Raises:
        ValueError: fewer than two rows.
    """
    if len(dataset) < 2:
        raise ValueError(f"of {len(dataset)} prompt none is left to train on when every {every}th is held out.")
    held_out = range(0, len(dataset), every)
    return dataset.select([i for i in range(len(dataset)) if i % every]), dataset.select(held_out)


def _decode(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 ({error}). Save it with that encoding.") from error


# Each reader goes from a text to (line or row for people, the row).


def _lines(text: str) -> list[tuple[str, str]]:
    """Not `str.splitlines`, which also cuts at form feeds and at Unicode's line separators, which are part of a prompt."""
    return [(f"line {i}", line) for i, line in enumerate(re.split(r"\r\n|\r|\n", text), 1) if line.strip()]


def _read_txt(text: str, name: str) -> list[tuple[str, dict]]:
    return [(where, {"prompt": line}) for where, line in _lines(text) if not re.match(r"\s*#+(\s|$)", line)]


def _read_csv(text: str, name: str) -> list[tuple[str, dict]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows, header, line = [], None, 1
    try:
        for cells in reader:
            where, line = f"line {line}", reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
            elif len(cells) != len(header):
                raise ValueError(
                    f"{name!r} has {len(cells)} cells in {where}, but {len(header)} columns {header}. Put a text with "
                    'commas between quotes: "a cat, asleep".'
                )
            else:
                rows.append((where, dict(zip(header, cells))))
    except csv.Error as error:
        raise ValueError(
            f"{name!r} is no CSV from line {line} on: {error}. Put a text with quotes between quotes, and double those in "
            'it: "a ""good"" cat".'
        ) from error
    return rows


def _read_jsonl(text: str, name: str) -> list[tuple[str, dict]]:
    rows = []
    for where, line in _lines(text):
        try:
            rows.append((where, json.loads(line)))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{name!r} has no JSON in {where}: {error}.") from error
    return rows


def _read_json(text: str, name: str) -> list[tuple[str, dict]]:
    try:
        rows = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{name!r} is no JSON: {error}. One object for each line is the format .jsonl.") from error
    if not isinstance(rows, list):
        raise ValueError(f"{name!r} holds a {type(rows).__name__}, but must hold a list of objects or of texts.")
    return [(f"row {i}", {"prompt": row} if isinstance(row, str) else row) for i, row in enumerate(rows)]


FORMATS = {".txt": _read_txt, ".csv": _read_csv, ".jsonl": _read_jsonl, ".json": _read_json}


def _checked(rows: list[tuple[str, dict]], column: str, name: str) -> list[dict[str, str]]:
    if not rows:
        raise ValueError(f"{name!r} holds no prompt.")
    result = []
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{name!r} has a {type(row).__name__} in {where}, but must have an object there.")
        prompt = row[_column(list(row), column, f"{name!r}, {where},")]
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{name!r} has no prompt in {where}: found {prompt!r}. Remove the row or give it a text.")
        result.append({"prompt": prompt.strip(), "category": row.get("category")})
    if not all(isinstance(row["category"], str) and row["category"] for row in result):
        for row in result:
            del row["category"]
    return result


def _column(columns: list[str], wanted: str, where: str) -> str:
    for name in (wanted, "prompt"):
        if name in columns:
            return name
    raise ValueError(f"{where} has no column {wanted!r}, only {columns}. Name one of them with `--prompt_column`.")
