# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Tables that people open in a spreadsheet."""

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .files import written_atomically


FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")  # a spreadsheet may take a text that begins so for a formula


def write_csv(path: str | os.PathLike, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> Path:
    """Write a table as CSV in UTF-8, whole or not at all, row by row.

    Nothing in it is a formula to a spreadsheet: a text that begins with `=`, `+`, `-`, `@`, a tab or a line break is preceded by an
    apostrophe. Numbers are written as they are, None as an empty cell, names that are not UTF-8 with `\\udcXX` for their bytes.

    Args:
        path: file to write.
        columns: keys of the rows, and names of the columns.
        rows: a mapping for each; keys that are no column are left out.
    """
    with (
        written_atomically(path) as unfinished,
        open(unfinished, "w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        table = csv.writer(file)  # with its own line ends: before Python 3.13, cells are quoted for these only
        table.writerow(columns)
        table.writerows([_cell(row[column]) for column in columns] for row in rows)
    return Path(path)


def _cell(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
