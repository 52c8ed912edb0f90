# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Every answer, kept: one SQLite file, which a kill leaves whole, and which several processes may share."""

import os
import sqlite3
import threading
from pathlib import Path

from .client import Answer


TABLES = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, text TEXT NOT NULL, tokens_in INTEGER NOT NULL, tokens_out INTEGER NOT NULL,
    refused TEXT
);
CREATE TABLE IF NOT EXISTS spent (
    model TEXT PRIMARY KEY, requests INTEGER NOT NULL, tokens_in INTEGER NOT NULL, tokens_out INTEGER NOT NULL, money REAL NOT NULL
);
"""


class AnswerCache:
    """Answers by the key of their request, and what was spent on them. Neither requests nor tokens of access are in it.

    Args:
        path: of the file, which is made where there is none.

    Raises:
        ValueError: the file is something else.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._base = sqlite3.connect(self.path, timeout=60, check_same_thread=False, isolation_level=None)
        try:
            self._base.executescript(TABLES)
        except sqlite3.DatabaseError as error:
            self._base.close()
            raise ValueError(f"`cache` {str(path)!r} cannot be used ({error}). Name another file.") from error

    def get(self, key: str) -> Answer | None:
        with self._lock:
            found = self._base.execute(
                "SELECT text, tokens_in, tokens_out, refused FROM answers WHERE key = ?", (key,)
            ).fetchone()
        return None if found is None else Answer(*found)

    def put(self, key: str, model: str, answer: Answer) -> None:
        """Keep an answer; it is on the disk when this returns."""
        with self._lock:
            self._base.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?)", (key, model, *answer))

    def add_spent(self, model: str, requests: int, tokens_in: int, tokens_out: int, money: float) -> None:
        with self._lock:
            self._base.execute(
                "INSERT INTO spent VALUES (?, ?, ?, ?, ?) ON CONFLICT (model) DO UPDATE SET requests = requests + "
                "excluded.requests, tokens_in = tokens_in + excluded.tokens_in, tokens_out = tokens_out + excluded.tokens_out, "
                "money = money + excluded.money",
                (model, requests, tokens_in, tokens_out, money),
            )

    def spent(self) -> tuple[int, int, int, float]:
        """Requests, tokens in, tokens out and money of all runs with this file."""
        with self._lock:
            row = self._base.execute(
                "SELECT SUM(requests), SUM(tokens_in), SUM(tokens_out), SUM(money) FROM spent"
            ).fetchone()
        return tuple(number or 0 for number in row)

    def __len__(self) -> int:
        with self._lock:
            return self._base.execute("SELECT COUNT(*) FROM answers").fetchone()[0]

    def close(self) -> None:
        with self._lock:
            self._base.close()
