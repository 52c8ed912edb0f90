# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""A disk that is full or takes nothing: said by its name, whatever library met it."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging


ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
# torch and safetensors write by themselves and say so in exceptions of their own
WORDS = (
    "No space left",
    "quota exceeded",
    "File too large",
    "Read-only file system",
    "PytorchStreamWriter",
    "inline_container",
    "unexpected pos",
    "iostream error",
)

logger = logging.get_logger(__name__)


def is_of_the_disk(error: BaseException) -> bool:
    """Whether the error is about a disk that cannot be written."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in ERRORS
    return isinstance(error, Exception) and any(word in str(error) for word in WORDS)


def describe(path: str | os.PathLike, error: BaseException) -> str:
    """'runs/flux cannot be written (No space left on device; 0.3 MB are free on its disk)'."""
    why = (getattr(error, "strerror", None) or str(error).strip() or type(error).__name__).splitlines()[0][:200]
    existing = next(parent for parent in (Path(path).absolute(), *Path(path).absolute().parents) if parent.exists())
    return f"{os.fspath(path)} cannot be written ({why}; {shutil.disk_usage(existing).free / 1e6:,.1f} MB are free on its disk)"


@contextmanager
def disk_errors_named(path: str | os.PathLike, remedy: str) -> Iterator[None]:
    """An error of the disk becomes an `OSError` that names the path, the room left and the remedy."""
    try:
        yield
    except Exception as error:
        if not is_of_the_disk(error):
            raise
        number = error.errno if isinstance(error, OSError) and error.errno is not None else errno.ENOSPC
        raise OSError(number, f"{describe(path, error)}. {remedy}") from error


@contextmanager
def disk_errors_tolerated(path: str | os.PathLike, what: str) -> Iterator[None]:
    """An error of the disk is logged with what it means, and the work goes on: for what can be written again later."""
    try:
        yield
    except Exception as error:
        if not is_of_the_disk(error):
            raise
        logger.warning(f"{describe(path, error)}. {what}")
