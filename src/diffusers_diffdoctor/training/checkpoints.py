# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What makes a folder a whole checkpoint: a manifest, written last, with the size and the digest of every file.

A kill at any moment leaves a checkpoint without manifest, or one whose manifest is right. Whatever happens to a file later (cut,
emptied, exchanged, lost) differs from the manifest, so that no run goes on from half a state in silence.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

from transformers.utils import logging

from ..files import digest, write_atomically
from ..loading import wrong_archive


MANIFEST = "manifest.json"

logger = logging.get_logger(__name__)


def seal(checkpoint: str | os.PathLike) -> None:
    """Write the manifest: from here on the checkpoint counts as whole. Everything reaches the disk before this returns."""
    folder = Path(checkpoint)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    write_atomically(folder / MANIFEST, json.dumps({"files": files}, indent=2) + "\n")
    _flush_to_disk(folder)


def damage(checkpoint: str | os.PathLike) -> str | None:
    """What keeps a checkpoint from being whole, in one clause that names the file, or None."""
    folder = Path(checkpoint)
    if not (folder / MANIFEST).is_file():
        return f"it was not written to its end (no {MANIFEST})"
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        wanted = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"its {MANIFEST} cannot be read"
    for name, (size, sha256) in wanted.items():
        path = folder / name
        try:
            if not path.is_file():
                return f"its {name} is missing"
            if path.stat().st_size != size:
                return f"its {name} has {path.stat().st_size} bytes, but was written with {size}"
            if digest(path) != sha256:
                return f"its {name} has another content than was written"
        except OSError as error:
            return f"its {name} cannot be read ({error.strerror})"
    return None


def checkpoints(output_dir: str | os.PathLike) -> dict[int, Path]:
    """Steps and folders of the checkpoints in `output_dir`, whole or not, in the order of their steps."""
    folder = Path(output_dir)
    found = {
        int(match[1]): path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    }
    return dict(sorted(found.items()))


def last_checkpoint(output_dir: str | os.PathLike, missing_ok: bool = False) -> Path | None:
    """The whole checkpoint of `output_dir` with the most steps; later ones that are damaged are named in a warning.

    Raises:
        ValueError: there is no whole one, and that is not `missing_ok`; it is said what is wrong with each.
    """
    damaged = []
    for path in reversed(checkpoints(output_dir).values()):
        wrong = damage(path)
        if wrong is None:
            if damaged:
                logger.warning(f"Resuming from {path}, because {' and '.join(damaged)}.")
            return path
        damaged.append(f"{path.name} is damaged: {wrong}")
    if missing_ok:
        return None
    why = f" ({'; '.join(damaged)})" if damaged else ""
    raise ValueError(
        f"`resume_from_checkpoint` is True, but {str(output_dir)!r} has no whole checkpoint{why}. Start without it, or pass the "
        "path of a checkpoint."
    )


def check_whole(checkpoint: str | os.PathLike) -> None:
    """A `ValueError` that names what is wrong with a checkpoint, and the remedy."""
    if not Path(checkpoint).is_dir():
        raise ValueError(
            f"`resume_from_checkpoint` is {str(checkpoint)!r}, which is no checkpoint: there is no such folder."
        )
    wrong = damage(checkpoint)
    if wrong is not None:
        raise ValueError(
            f"`resume_from_checkpoint` is {str(checkpoint)!r}, which is damaged: {wrong}. Resume from the one before; "
            "`resume_from_checkpoint=True` finds it."
        )


@contextmanager
def refusals_named(checkpoint: str | os.PathLike, *patterns: str) -> Iterator[None]:
    """For loading files that match `patterns`: a `ValueError` that names those which would run code or fill the memory.

    Torch refuses a pickled file that would run code, but does not say which, so that the candidates are named.
    """
    files = sorted(path for pattern in patterns for path in Path(checkpoint).glob(pattern))
    for path in files:
        wrong = wrong_archive(path)
        if wrong:
            raise ValueError(
                f"Checkpoint {str(checkpoint)!r} has a damaged file: {path.name} {wrong}. Take another one."
            )
    try:
        yield
    except UnpicklingError as error:
        names = [path.name for path in files]
        raise ValueError(
            f"Checkpoint {str(checkpoint)!r} has a file ({' or '.join(names)}) with more in it than tensors and numbers, which "
            "could run code. It was not loaded. Do not resume from a checkpoint of somebody else."
        ) from error


def remove_checkpoint(folder: str | os.PathLike) -> None:
    """Delete a checkpoint, its manifest first: what a kill in between leaves must not look whole."""
    Path(folder, MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def rotate(output_dir: str | os.PathLike, limit: int | None, keep: Iterable[str | os.PathLike | None] = ()) -> None:
    """Leave the newest checkpoints, `limit` with those of `keep`; the newest of all is always among them."""
    if not limit or limit < 0:
        return
    kept = {Path(path).name for path in keep if path is not None}
    found = list(checkpoints(output_dir).values())
    newest, others = found[-1:], [path for path in found[:-1] if path.name not in kept]
    room = limit - len(newest) - len([path for path in found[:-1] if path.name in kept])
    for path in others[: len(others) - max(0, room)]:
        remove_checkpoint(path)


def _flush_to_disk(folder: Path) -> None:
    """Older checkpoints are deleted next, so that this one must not only lie in memory."""
    for path in [*folder.rglob("*"), folder]:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:  # folders cannot be opened on Windows
            continue
        try:
            os.fsync(descriptor)
        except OSError:  # nor synchronised on some network file systems
            pass
        finally:
            os.close(descriptor)
