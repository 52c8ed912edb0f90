# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Uploads to the Hub that never cost a run anything: in the background, tried again, and told of when they do not arrive."""

import os
import shlex
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, thread
from pathlib import Path
from typing import Any

from huggingface_hub import upload_folder
from transformers.utils import logging

from ..files import LOCK, RUNNING, written_atomically


# What lies in an output folder and is nobody else's: checkpoints go their own way.
NOT_UPLOADED = ["_*", "checkpoint-*", ".*.unfinished/*", LOCK, RUNNING, "training_args.bin"]
# Statuses of requests that will not be answered otherwise when they are made again.
FINAL = {400, 401, 403, 404, 413, 422}

logger = logging.get_logger(__name__)


class Pusher:
    """Uploads folders one after the other, in the order of the calls, so that an earlier state never replaces a later one.

    The thread is a daemon: a connection that hangs does not keep the process alive.

    Args:
        repo_id: an existing repository of models.
        token: that may write to it; without one that of the machine.
        patience: seconds that one attempt may take, and that [`finish`](Pusher.finish) waits.
        attempts: how often an upload is tried that fails for a reason that may pass.
        pause: seconds before the second attempt; before each further one it is twice as long, or as the Hub asks for.
    """

    def __init__(
        self, repo_id: str, token: str | None = None, patience: float = 1800, attempts: int = 5, pause: float = 2
    ):
        self.repo_id, self.token = repo_id, token
        self.patience, self.attempts, self.pause = patience, attempts, pause
        self._jobs: deque[dict[str, Any]] = deque()  # the first is being uploaded
        self._missing: dict[str, str] = {}  # command that would repeat a push -> why it did not arrive
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def is_busy(self) -> bool:
        """Whether an upload is under way or waits."""
        return bool(self._jobs)

    @property
    def folders(self) -> list[str]:
        """Folders that are still read from."""
        return [job["folder_path"] for job in list(self._jobs)]

    def push(
        self,
        folder: str | os.PathLike,
        message: str,
        path_in_repo: str | None = None,
        revision: str | None = None,
        ignored: Sequence[str] = (),
    ) -> Future:
        """Upload a folder in the background. The future gives the commit's information, or None if it did not arrive."""
        job = {
            "folder_path": os.fspath(folder),
            "commit_message": message,
            "path_in_repo": path_in_repo,
            "revision": revision,
            "ignore_patterns": list(ignored),
        }
        with self._changed:
            self._jobs.append(job)
            job["future"] = Future()
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="push", daemon=True)
                self._thread.start()
        return job["future"]

    def finish(self) -> list[str]:
        """Wait for the uploads, then say in one warning what did not arrive and how to repeat it: those commands."""
        deadline = time.monotonic() + self.patience
        with self._changed:
            while self._jobs and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            missing = dict(self._missing)
            for job in self._jobs:
                missing[self.command(job)] = (
                    f"the Hub had not answered after {self.patience:g} seconds (`push_timeout`)"
                )
            self._missing.clear()
            if self._jobs:
                _let_go()
        if missing:
            told = "\n".join(f"  {command}\n    ({why})" for command, why in missing.items())
            logger.warning(
                f"Not everything arrived on the Hub. All of it lies here; these commands repeat the push:\n{told}"
            )
        return list(missing)

    def command(self, job: dict[str, Any]) -> str:
        """The line for a shell that does what the job does."""
        words = ["hf", "upload", self.repo_id, job["folder_path"], job["path_in_repo"] or "."]
        for pattern in job["ignore_patterns"]:
            words += ["--exclude", pattern]
        if job["revision"] is not None:
            words += ["--revision", job["revision"]]
        return shlex.join(words)

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._jobs:
                    self._thread = None
                    return
                job = self._jobs[0]
            result, why = self._upload(job)
            with self._changed:
                command = self.command(job)
                if why is None:
                    self._missing.pop(command, None)
                else:
                    self._missing[command] = why
                self._jobs.popleft()
                job["future"].set_result(result)
                self._changed.notify_all()

    def _upload(self, job: dict[str, Any]) -> tuple[Any, str | None]:
        """The commit's information, or why there is none."""
        for attempt in range(1, self.attempts + 1):
            arguments = {key: value for key, value in job.items() if key != "future"}
            arguments["ignore_patterns"] = list(job["ignore_patterns"])  # the client adds its own to the list
            answer: Future = Future()
            threading.Thread(target=self._attempt, args=(arguments, answer), daemon=True).start()
            try:
                return answer.result(timeout=self.patience), None
            except Exception as error:
                silent = isinstance(error, TimeoutError) and not answer.done()
                why = f"no answer in {self.patience:g} seconds" if silent else reason(error)
                if silent or attempt == self.attempts or not may_pass(error):
                    logger.warning(f"The push of {job['folder_path']} to {self.repo_id} failed: {why}.")
                    return None, why
                pause = max(self.pause * 2 ** (attempt - 1), min(60, _asked_for(error)))
                logger.warning(
                    f"The push of {job['folder_path']} to {self.repo_id} failed: {why}. Trying again in {pause:g} seconds."
                )
                time.sleep(pause)
        raise AssertionError("unreachable: the last attempt returns")

    def _attempt(self, arguments: dict[str, Any], answer: Future) -> None:
        try:
            answer.set_result(upload_folder(repo_id=self.repo_id, token=self.token, **arguments))
        except BaseException as error:
            answer.set_exception(error)


def _let_go() -> None:
    """The client sends large files from a pool of threads. They are daemons, because those of `Pusher` are, and yet Python waits
    for the threads of every pool when a process ends, for hours if the Hub is silent."""
    for worker in list(thread._threads_queues):
        if worker.daemon:
            thread._threads_queues.pop(worker, None)


def may_pass(error: BaseException) -> bool:
    """Whether the same push could be answered otherwise a little later; so could one whose address for a file has expired."""
    return _status(error) not in FINAL and not isinstance(error, (ValueError, FileNotFoundError))


def reason(error: BaseException) -> str:
    """The error in a clause, with what caused it where another stands before it."""
    if error.__cause__ is not None and _status(error) is None:
        return f"{_first_line(error)}: {reason(error.__cause__)}"
    status = _status(error)
    line = _first_line(error)
    return (f"HTTP status {status}, " if status and str(status) not in line else "") + line


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0][:200].rstrip(".")


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _asked_for(error: BaseException) -> float:
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    try:
        return float(headers.get("Retry-After", 0))
    except ValueError:  # a date
        return 0.0


def publish(checkpoint: str | os.PathLike, output_dir: str | os.PathLike, private: Sequence[str]) -> None:
    """Bring what a checkpoint shares with a finished run into the output folder, file by file, whole each.

    `private` are patterns of the files that only resuming needs.
    """
    for path in Path(checkpoint).iterdir():
        if path.is_file() and not any(path.match(pattern) for pattern in private):
            with written_atomically(Path(output_dir, path.name)) as unfinished:  # an upload may be reading
                unfinished.write_bytes(path.read_bytes())
