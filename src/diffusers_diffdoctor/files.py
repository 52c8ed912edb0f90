# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Files: find images, write whole or not at all, tell contents apart."""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def find_images(paths: Sequence[str | os.PathLike], excluded: Iterable[str | os.PathLike] = ()) -> list[Path]:
    """Files as given, and the images of folders at any depth in order of name: absolute paths, each once.

    Args:
        paths: files (taken whatever their name) and folders.
        excluded: folders that are not searched, such as the one that results are written to.

    Raises:
        ValueError: `paths` is empty or has no image in it.
        FileNotFoundError: a path does not exist.
    """
    if not paths:
        raise ValueError("No path was given: name image files or folders.")
    excluded = {Path(os.path.abspath(folder)) for folder in excluded}
    found: dict[Path, None] = {}  # a set that keeps the order
    for path in paths:
        path = Path(os.path.abspath(path))
        if path.is_dir():
            for folder, folders, names in os.walk(path):
                folders[:] = sorted(name for name in folders if Path(folder, name) not in excluded)
                images = sorted(name for name in names if name.lower().endswith(IMAGE_SUFFIXES))
                found.update((Path(folder, name), None) for name in images)
        elif path.is_file():
            found[path] = None
        else:
            raise FileNotFoundError(f"{path} is neither a file nor a folder.")
    if not found:
        raise ValueError(
            f"No image found in {', '.join(map(str, paths))}: looked for files that end in "
            f"{', '.join(IMAGE_SUFFIXES)}."
        )
    return list(found)


@contextmanager
def written_atomically(path: str | os.PathLike) -> Iterator[Path]:
    """`with written_atomically(path) as unfinished:` write a file or a folder at `unfinished`; it then appears at `path`.

    Whoever looks at `path` sees what was there before or all that was written, never half of it; after an error, what was
    there before. `unfinished` has the name of `path`, in a folder of its own on the same file system. A folder can take
    the place of an empty one only. One writer at a time.
    """
    path = Path(path)
    workspace = path.with_name(f".{path.name}.unfinished")
    shutil.rmtree(workspace, ignore_errors=True)  # of a writer that was killed
    workspace.mkdir()
    try:
        unfinished = workspace / path.name
        yield unfinished
        if unfinished.is_dir() and path.is_dir():
            path.rmdir()  # Windows cannot replace it
        os.replace(unfinished, path)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def write_atomically(path: str | os.PathLike, content: str | bytes) -> Path:
    """Write text (as UTF-8) or bytes by [`written_atomically`]; returns the path."""
    with written_atomically(path) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
    return Path(path)


def digest(content: str | bytes | Path | Iterable[str | bytes | memoryview]) -> str:
    """sha256 in hexadecimal of a text (as UTF-8), of bytes, of the file at a `Path`, or of parts, joined."""
    if isinstance(content, Path):
        content = _chunks(content)
    elif isinstance(content, (str, bytes)):
        content = [content]
    sha256 = hashlib.sha256()
    for part in content:  # file names need not be UTF-8
        sha256.update(part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part)
    return sha256.hexdigest()


def _chunks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            yield chunk
