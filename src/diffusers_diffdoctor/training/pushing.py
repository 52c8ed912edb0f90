# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Uploads to the Hub that never cost a run anything: in the background, tried again, and told of when they do not arrive."""

import atexit
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, constants
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects
from transformers.utils import logging

from ..files import LOCK, RUNNING, written_atomically


# What lies in an output folder and is nobody else's: checkpoints go their own way.
NOT_UPLOADED = ["_*", "checkpoint-*", ".*.unfinished/*", "worst_cases/*", LOCK, RUNNING, "training_args.bin"]
COPY = ".push-", ".unfinished"  # begin and end of the names of folders that hold what is being uploaded
MOST_WAITING = 8
REQUEST = Path(__file__).with_name("hub_request.py")

logger = logging.get_logger(__name__)


class HubError(Exception):
    """Why the Hub did not do what was asked, in a clause; `may_pass` is whether it may do it later."""

    def __init__(self, why: str, may_pass: bool = True, retry_after: float = 0):
        super().__init__(why)
        self.may_pass, self.retry_after = may_pass, retry_after


@dataclass
class Push:
    """An upload that was asked for.

    Attributes:
        folder: what the user knows it as.
        path_in_repo: where it goes. Two pushes to one `place` are two states of the same thing.
        command: the line for a shell that does the same.
        arguments: of `HfApi.upload_folder`.
        copy: folder to upload from and to remove afterwards; None where `folder` itself is read.
        future: gives the commit's information, or None if the push does not arrive.
    """

    folder: str
    path_in_repo: str | None
    command: str
    arguments: dict[str, Any]
    copy: str | None
    future: Future = field(default_factory=Future)

    @property
    def place(self) -> tuple[str | None, str | None]:
        return self.path_in_repo, self.arguments["revision"]

    def close(self, result: CommitInfo | None) -> None:
        if self.copy is not None:
            shutil.rmtree(self.copy, ignore_errors=True)
        self.future.set_result(result)


class Pusher:
    """Uploads folders one after the other, in the order of the calls, so that an earlier state never replaces a later one.

    One daemon thread works through them. Each attempt is a process of its own, see `hub_request`: it is ended when its time is
    over, and ends with this one, so that what hangs keeps nobody waiting and sends nothing outdated later.

    Args:
        repo_id: a repository of models. It must exist, or be made by [`create`](Pusher.create).
        token: that may write to it; without one that of the machine.
        private: whether a repository that is created is private; the default of its owner without it.
        patience: seconds that one push may take, and that [`finish`](Pusher.finish) waits.
        attempts: how often a push is tried that fails for a reason that may pass.
        pause: seconds before the second attempt; before each further one it is three times as long, or as the Hub asks for.
        silence: seconds after which an attempt fails in which nothing moves.
    """

    def __init__(
        self,
        repo_id: str,
        token: str | None = None,
        private: bool | None = None,
        patience: float = 1800,
        attempts: int = 6,
        pause: float = 5,
        silence: float = 120,
    ):
        self.repo_id, self.token, self.private = repo_id, token, private
        self.patience, self.attempts, self.pause, self.silence = patience, attempts, pause, silence
        self._waiting: deque[Push] = deque()
        self._running: Push | None = None
        self._process: subprocess.Popen | None = None  # of the attempt under way
        self._ending = False  # the attempt under way, and all further ones of its push
        self._why: str | None = None  # the last attempt failed
        self._missing: dict[tuple, tuple[Push, str]] = {}  # place -> what did not arrive there, and why
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        atexit.register(self.finish)  # pushes that nobody has waited for

    @property
    def is_busy(self) -> bool:
        """Whether an upload is under way or waits."""
        return self._running is not None or bool(self._waiting)

    @property
    def folders(self) -> list[str]:
        """Folders that are still read from."""
        with self._changed:
            pushes = [*([] if self._running is None else [self._running]), *self._waiting]
        return [push.folder for push in pushes if push.copy is None]

    def create(self, patience: float = 60) -> str:
        """Create the repository or find it: its id with the owner's name.

        Raises:
            HubError: there is none that can be written, or the Hub has not answered in `patience` seconds.
        """
        arguments = {"repo_id": self.repo_id, "token": self.token, "private": self.private, "exist_ok": True}
        self.repo_id = self._insist("create_repo", arguments, f"Finding {self.repo_id} on the Hub", patience)[
            "repo_id"
        ]
        return self.repo_id

    def push(
        self,
        folder: str | os.PathLike,
        message: str,
        path_in_repo: str | None = None,
        revision: str | None = None,
        ignored: Sequence[str] = (),
        token: str | None = None,
        changing: bool = False,
        every: bool = False,
    ) -> Future:
        """Upload a folder in the background.

        Args:
            folder: what to upload. It must stay as it is, unless it is `changing`: then what it holds is copied first, into a
                hidden folder in it.
            message: of the commit.
            path_in_repo: where to; the root of the repository without it.
            revision: a branch that exists; `main` without it.
            ignored: patterns of the files that stay here.
            token: instead of the pusher's.
            every: whether an earlier push to the same place that still waits must arrive too. Otherwise this one takes its
                place. At most 8 wait; the oldest is given up.

        Returns:
            a future of the commit's information, or of None if the push does not arrive or another takes its place.
        """
        folder, copy = os.fspath(folder), None
        if changing:
            try:
                copy = _copy(folder, ignored)
            except (
                OSError
            ) as error:  # a full disk: what was copied is gone, and the files themselves can still be read
                logger.warning(
                    f"{folder} is uploaded without being copied first ({error}): let nothing write there until then."
                )
        arguments = {
            "repo_id": self.repo_id,
            "folder_path": folder if copy is None else copy,
            "commit_message": message,
            "path_in_repo": path_in_repo,
            "revision": revision,
            "ignore_patterns": list(ignored),
            "token": token or self.token,
        }
        push = Push(folder, path_in_repo, self.command(folder, path_in_repo, revision, ignored), arguments, copy)
        with self._changed:
            for earlier in [] if every else [one for one in self._waiting if one.place == push.place]:
                self._waiting.remove(earlier)
                earlier.close(None)
            if len(self._waiting) >= MOST_WAITING:
                earlier = self._waiting.popleft()
                self._missing[earlier.place] = earlier, f"{MOST_WAITING} later pushes waited as well"
                earlier.close(None)
            self._waiting.append(push)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="push", daemon=True)
                self._thread.start()
        return push.future

    def finish(self, patience: float | None = None) -> list[str]:
        """Wait for the pushes, at most `patience` seconds, and end what is under way then.

        Says in one warning what did not arrive, why, and how to repeat it.

        Returns:
            the commands that repeat it.
        """
        patience = self.patience if patience is None else patience
        deadline = time.monotonic() + patience
        with self._changed:
            while self.is_busy and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            if self._running is not None:
                self._ending = True
                why = self._why or "the Hub had not answered"
                self._missing[self._running.place] = self._running, f"given up after {patience:g} seconds; {why}"
                if self._process is not None:
                    self._process.kill()
                self._changed.notify_all()
            for push in self._waiting:
                self._missing.setdefault(push.place, (push, f"given up after {patience:g} seconds, behind others"))
                push.close(None)
            self._waiting.clear()
            while self._running is not None:
                self._changed.wait()
            missing, self._missing, self._ending = list(self._missing.values()), {}, False
        if missing:
            told = "\n".join(f"  {push.command}\n    ({why})" for push, why in missing)
            logger.warning(
                f"Not everything arrived on the Hub. All of it lies here; these commands repeat the push, after `hf auth login` "
                f"where this machine has no token:\n{told}"
            )
        return [push.command for push, _ in missing]

    def command(
        self,
        folder: str | os.PathLike,
        path_in_repo: str | None = None,
        revision: str | None = None,
        ignored: Sequence[str] = (),
    ) -> str:
        """The line for a shell that uploads the folder, and creates the repository where there is none."""
        words = ["hf", "upload", self.repo_id, os.fspath(folder), path_in_repo or "."]
        for pattern in ignored:
            words += ["--exclude", pattern]
        words += ["--revision", revision] if revision is not None else []
        words += ["--private"] if self.private else []
        return shlex.join(words)

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    self._thread = None
                    return
                push = self._running = self._waiting.popleft()
            result = why = None
            what = f"The push of {push.folder} to {self.repo_id}"
            try:
                made = self._insist("upload_folder", push.arguments, what, self.patience)
                result = CommitInfo(
                    *(made[name] for name in ("commit_url", "commit_message", "commit_description", "oid"))
                )
            except Exception as error:
                why = str(error)
                if not self._ending:
                    logger.warning(f"{what} failed: {why}.")
            with self._changed:
                if why is None:
                    self._missing.pop(push.place, None)
                elif not self._ending:
                    self._missing[push.place] = push, why
                push.close(result)
                self._running = None
                self._changed.notify_all()

    def _insist(self, call: str, arguments: dict[str, Any], what: str, patience: float) -> dict[str, Any]:
        """The result of a call of the client, tried again while its failure may pass and `patience` seconds are not over."""
        deadline, self._why = time.monotonic() + patience, None
        for attempt in range(1, self.attempts + 1):
            try:
                return self._attempt(call, arguments, deadline - time.monotonic(), patience)
            except HubError as error:
                self._why = str(error)
                pause = max(self.pause * 3 ** (attempt - 1), error.retry_after)
                if self._ending or not error.may_pass or attempt == self.attempts:
                    raise
                if pause >= deadline - time.monotonic():
                    asked = f", to be asked again in {pause:g} seconds" if pause == error.retry_after else ""
                    raise HubError(f"{error}{asked}") from error
                logger.warning(f"{what} failed: {error}. Trying again in {pause:g} seconds.")
            with self._changed:
                self._changed.wait_for(lambda: self._ending, pause)
            if self._ending:
                raise HubError(self._why)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _attempt(self, call: str, arguments: dict[str, Any], limit: float, patience: float) -> dict[str, Any]:
        """One call in a process of its own, which is ended after `limit` seconds."""
        job = {"call": call, "arguments": arguments, "silence": self.silence}
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # the client that this process has
            "HF_ENDPOINT": constants.ENDPOINT,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        try:
            with tempfile.TemporaryFile() as output:
                process = subprocess.Popen(
                    [sys.executable, str(REQUEST)],
                    stdin=subprocess.PIPE,  # not the command line, which others can read, for the token
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # Ctrl-C is for this process, which may wait for the push
                )
                try:
                    with self._changed:
                        self._process = process
                        if self._ending:
                            process.kill()
                    process.stdin.write(json.dumps(job).encode() + b"\n")
                    process.stdin.flush()
                    process.wait(limit)
                except subprocess.TimeoutExpired:
                    raise HubError(f"no answer in {patience:g} seconds", may_pass=True) from None
                except BrokenPipeError:
                    pass  # it says why below
                finally:
                    process.kill()
                    process.wait()
                    with self._changed:
                        self._process = None
                    with suppress(BrokenPipeError):
                        process.stdin.close()
                output.seek(0)
                lines = output.read().decode(errors="replace").split("\n")
        except OSError as error:  # no process or no file could be had
            raise HubError(str(error)) from error
        said = [line for line in lines if line.strip()]
        try:
            answer = json.loads(said[-1])
            if "result" not in answer:
                raise HubError(answer["why"], answer["may_pass"], answer["retry_after"])
            return answer["result"]
        except (IndexError, ValueError, TypeError, KeyError):
            last = said[-1][:200] if said else "without a word"
            raise HubError(f"the upload's process ended with status {process.returncode}: {last}") from None


def _copy(folder: str, ignored: Sequence[str]) -> str:
    """What is uploaded of a folder, copied into a hidden one in it."""
    before, after = COPY
    copy = tempfile.mkdtemp(after, before, folder)
    try:
        names = [path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()]
        patterns = [*ignored, *DEFAULT_IGNORE_PATTERNS, f"{before}*{after}/*"]
        for name in filter_repo_objects(names, ignore_patterns=patterns):
            Path(copy, name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(folder, name), Path(copy, name))
    except BaseException:
        shutil.rmtree(copy, ignore_errors=True)
        raise
    return copy


def remove_copies(folder: str | os.PathLike) -> None:
    """Remove from a folder what a process that was killed was uploading."""
    before, after = COPY
    for path in Path(folder).glob(f"{before}*{after}"):
        shutil.rmtree(path, ignore_errors=True)


def publish(checkpoint: str | os.PathLike, output_dir: str | os.PathLike, private: Sequence[str]) -> None:
    """Bring what a checkpoint shares with a finished run into the output folder, file by file, whole each.

    `private` are patterns of the files that only resuming needs.
    """
    for path in Path(checkpoint).iterdir():
        if path.is_file() and not any(path.match(pattern) for pattern in private):
            with written_atomically(Path(output_dir, path.name)) as unfinished:
                shutil.copyfile(path, unfinished)
