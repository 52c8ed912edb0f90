# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`metrics.jsonl`: the log of a run, one JSON object for each line."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..disk import disk_errors_tolerated
from ..files import write_atomically


METRICS = "metrics.jsonl"


class Journal:
    """Appends to the file, which it never reads: a run that begins or resumes replaces it by the log in memory, so that
    neither the lines of another run nor a damaged file stand in its way.

    Args:
        folder: where the file lies.
    """

    def __init__(self, folder: str | os.PathLike):
        self.path = Path(folder, METRICS)
        self._waiting: list[str] = []  # lines that found no room
        self._replaces = False
        self.ours = False  # whether this journal has written the file

    def replace(self) -> None:
        """The next line replaces the file by the whole log."""
        self._replaces = True

    def write(self, log_history: Sequence[Mapping[str, Any]]) -> None:
        """Bring the newest entry of the log into the file. A full disk is said, and made up for with a later line."""
        self._waiting.append(json.dumps(log_history[-1]) + "\n")
        with disk_errors_tolerated(self.path, "Its lines are kept, and written with a later one."):
            if self._replaces:
                write_atomically(self.path, "".join(json.dumps(entry) + "\n" for entry in log_history))
                self._replaces = False
            else:
                self._append("".join(self._waiting).encode())
            self._waiting.clear()
            self.ours = True

    def _append(self, content: bytes) -> None:
        with open(self.path, "ab", buffering=0) as file:
            size = file.tell()
            try:
                written = file.write(content)
                while written < len(content):
                    written += file.write(content[written:])
            except OSError:
                with suppress(OSError):  # a device has no length
                    os.truncate(self.path, size)  # no half line
                raise
