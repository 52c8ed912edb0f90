# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Files: find images, read without waiting, write whole or not at all, tell contents apart."""

import hashlib
import json
import os
import shutil
import socket
import stat
from collections import Counter, deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from filelock import FileLock, Timeout


# --- finding images ------------------------------------------------------------------------------------------------------------

IMAGE_SUFFIXES = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff")
# Names of images that are not read: people look for these among what was, so they are told apart from other files.
UNREAD_SUFFIXES = (
    *(
        ".gif",
        ".heic",
        ".heif",
        ".hif",
        ".avif",
        ".jxl",
        ".jp2",
        ".j2k",
        ".jpx",
        ".jpf",
        ".svg",
        ".svgz",
        ".psd",
        ".psb",
    ),
    *(".xcf", ".kra", ".eps", ".ico", ".cur", ".icns", ".dib", ".tga", ".pcx", ".sgi", ".ppm", ".pgm", ".pbm", ".pnm"),
    *(".pam", ".pfm", ".qoi", ".exr", ".hdr", ".dds", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
)

NO_IMAGE_NAME = "name that is no image's"
SEARCHED_ALREADY = "folder that is searched already, under another name"
SPECIAL_FILES = {
    stat.S_IFIFO: "named pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
    stat.S_IFDIR: "folder",
}


class Skipped(NamedTuple):
    """A path that a search left out by rule, and the rule: a noun that can be counted."""

    path: Path
    reason: str

    @property
    def may_hide_images(self) -> bool:
        """An image, or what could be or hold one: all but other files' names and folders that were searched anyway."""
        return self.reason not in (NO_IMAGE_NAME, SEARCHED_ALREADY)


@dataclass(frozen=True)
class Found:
    """What a search came upon. Each path is in one of the two: `images` are to be read, `skipped` are not, by rule."""

    images: list[Path]
    skipped: list[Skipped]

    def __len__(self) -> int:
        return len(self.images) + len(self.skipped)

    def reasons(self) -> dict[str, int]:
        """How often each rule was applied, the most frequent first."""
        return dict(Counter(reason for _, reason in self.skipped).most_common())


def find_images(paths: Sequence[str | os.PathLike], excluded: Iterable[str | os.PathLike] = ()) -> Found:
    """Files as given, and the images of folders at any depth: absolute paths, each once, always in the same order.

    Within a folder the order is that of names, files before folders. Folders that are links are followed after all others, so
    that each folder is searched once, under its own name where it has one here: loops of links end. Nothing is opened but
    folders; an image that turns out to be unreadable, a link that leads nowhere say, is for the reader to count.

    Skipped are, in folders: files whose name does not end in one of `IMAGE_SUFFIXES`; and anywhere: pipes, sockets, devices,
    folders that cannot be opened or that are searched already, and links without an image's name that cannot be followed.

    Args:
        paths: files (taken whatever their name) and folders.
        excluded: files and folders that are passed over without being counted, such as the one that results are written to.

    Raises:
        ValueError: `paths` is empty or has no image in it.
        OSError: a path does not exist, or cannot be asked for.
    """
    if not paths:
        raise ValueError("No path was given: name image files or folders.")
    search = _Search(excluded)
    for path in paths:
        search.named(_absolute(path))
    search.follow_links()
    found = Found(
        list(search.images), [Skipped(*item) for item in search.skipped.items() if item[0] not in search.images]
    )
    if not found.images:
        skipped = f" Skipped: {listed(found.reasons())}." if found.skipped else ""
        raise ValueError(
            f"No image found in {', '.join(map(str, paths))}: looked for files that end in "
            f"{', '.join(IMAGE_SUFFIXES)}.{skipped}"
        )
    return found


def _absolute(path: str | os.PathLike) -> Path:
    """The absolute path without `..`, as it was named; with links resolved only where `..` follows one."""
    plain = os.path.abspath(path)
    try:
        as_meant = os.path.samefile(plain, path)
    except OSError:  # at least one of them does not exist
        as_meant = not os.path.exists(path)
    return Path(plain if as_meant else os.path.realpath(path))


class _Search:
    """The state of one [`find_images`]."""

    def __init__(self, excluded: Iterable[str | os.PathLike]):
        self.images: dict[Path, None] = {}  # a set that keeps the order
        self.skipped: dict[Path, str] = {}
        self.linked: deque[Path] = deque()
        self.excluded = {_absolute(path) for path in excluded}
        self.excluded_folders = {_identity(path) for path in self.excluded if path.is_dir()}
        self.searched: dict[Hashable, Path] = {}

    def named(self, path: Path) -> None:
        """A path that the user named."""
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(f"{path} is neither a file nor a folder.") from None
        try:
            mode = os.stat(path).st_mode
        except OSError:
            self.images[path] = None  # a link that leads nowhere
            return
        if stat.S_ISDIR(mode):
            self.folder(path)
        elif stat.S_ISREG(mode):
            self.images[path] = None
        else:
            self.skipped[path] = _special(mode)

    def folder(self, top: Path) -> None:
        """All images in a folder and in the real folders in it."""
        todo = [top]
        while todo:
            folder = todo.pop()
            try:
                identity = _identity(folder)
                if identity in self.searched:
                    if self.searched[identity] != folder:
                        self.skipped[folder] = SEARCHED_ALREADY
                    continue
                self.searched[identity] = folder
                with os.scandir(folder) as entries:
                    entries = sorted(entries, key=lambda entry: entry.name)
            except OSError as error:
                self.skipped[folder] = f"folder that cannot be opened ({error.strerror})"
                continue
            inner = [Path(entry.path) for entry in entries if self.entry(entry)]
            todo += reversed(inner)

    def entry(self, entry: os.DirEntry) -> bool:
        """Sort in what a folder holds; returns whether it is a real folder, to be searched in its turn."""
        path, name = Path(entry.path), entry.name.lower()
        if path in self.excluded:
            return False
        try:
            if entry.is_dir(follow_symlinks=False):
                return not self.is_excluded(path)
            # asks the disk for links and special files only
            mode = stat.S_IFREG if entry.is_file(follow_symlinks=False) else os.stat(path).st_mode
        except OSError as error:
            if name.endswith(IMAGE_SUFFIXES):
                self.images[path] = None
            else:
                self.skipped[path] = f"link that cannot be followed ({error.strerror})"
            return False
        if stat.S_ISDIR(mode):
            if not self.is_excluded(path):
                self.linked.append(path)
        elif not stat.S_ISREG(mode):
            self.skipped[path] = _special(mode)
        elif name.endswith(IMAGE_SUFFIXES):
            self.images[path] = None
        elif name.endswith(UNREAD_SUFFIXES):
            self.skipped[path] = f"format that is not read ({os.path.splitext(name)[1]})"
        else:
            self.skipped[path] = NO_IMAGE_NAME
        return False

    def is_excluded(self, folder: Path) -> bool:
        try:
            return bool(self.excluded_folders) and _identity(folder) in self.excluded_folders
        except OSError:  # locked or gone: counted when it cannot be opened
            return False

    def follow_links(self) -> None:
        while self.linked:
            self.folder(self.linked.popleft())


def _identity(path: Path) -> Hashable:
    """The same for all names of a folder."""
    status = os.stat(path)
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)  # some file systems number none


def _special(mode: int) -> str:
    return SPECIAL_FILES.get(stat.S_IFMT(mode), "special file")


def listed(reasons: dict[str, int]) -> str:
    """Reasons and how often they were met, in one line: "named pipe: 2, device: 1"."""
    return ", ".join(f"{reason}: {count}" for reason, count in reasons.items())


# --- reading and writing -------------------------------------------------------------------------------------------------------


def read_regular_file(path: str | os.PathLike, most_bytes: int | None = None) -> bytes:
    """The content of a file. Never waits for a writer: what is no regular file is refused without being opened.

    Raises:
        ValueError: the path is a folder, a pipe, a socket or a device, or the file is larger than `most_bytes`.
        OSError: the file does not exist, cannot be read, or lost a part while it was read.
    """
    name = repr(os.fspath(path))
    _refuse_special(name, os.stat(path).st_mode)
    with open(path, "rb", opener=_not_waiting) as file:
        status = os.fstat(file.fileno())
        _refuse_special(name, status.st_mode)
        if most_bytes is not None and status.st_size > most_bytes:
            raise ValueError(
                f"{name} is too large to be opened safely: {status.st_size} bytes, the limit is {most_bytes}."
            )
        content = file.read(status.st_size)
    if len(content) < status.st_size:
        raise OSError(f"{name} became shorter while it was read: {len(content)} of {status.st_size} bytes.")
    return content


def _not_waiting(path: str, flags: int) -> int:
    """A pipe may take the file's place after one has looked: opening it must not wait for its writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _refuse_special(name: str, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise ValueError(f"{name} is a {_special(mode)}, not a file.")


@contextmanager
def written_atomically(path: str | os.PathLike) -> Iterator[Path]:
    """`with written_atomically(path) as unfinished:` write a file or a folder at `unfinished`; it then appears at `path`.

    Whoever looks at `path` sees what was there before or all that was written, never half of it; after an error, what was
    there before. `unfinished` has the name of `path`, in a folder of its own on the same file system. A folder can take
    the place of an empty one only. A file has the permissions of any new file, by the umask. One writer at a time.
    """
    path = Path(path)
    workspace = unfinished_at(path)
    shutil.rmtree(workspace, ignore_errors=True)  # of a writer that was killed
    workspace.mkdir()
    try:
        unfinished = workspace / path.name
        yield unfinished
        if unfinished.is_file():  # safetensors makes files that only their owner can read
            usual = workspace / f"{path.name}.usual"
            usual.touch()
            shutil.copymode(usual, unfinished)
        if unfinished.is_dir() and path.is_dir():
            path.rmdir()  # Windows cannot replace it
        os.replace(unfinished, path)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def unfinished_at(path: Path) -> Path:
    """The folder in which [`written_atomically`] works; one that is left is of a writer that was killed."""
    return path.with_name(f".{path.name}.unfinished")


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


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """The `name: value` lines of a YAML file. An alias, of which a few lines can unfold to gigabytes, is refused.

    Raises:
        ValueError: it is something else; the file is not named.
        OSError: it cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        aliases = [event.anchor for event in yaml.parse(text, yaml.SafeLoader) if isinstance(event, yaml.AliasEvent)]
        content = None if aliases else yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"no YAML: {' '.join(str(error).split())[:300]}") from error
    if aliases:
        raise ValueError(f"it has the alias *{aliases[0]}: write the value out.")
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, but must hold `name: value` lines.")
    return content


# --- one writer ----------------------------------------------------------------------------------------------------------------

LOCK, RUNNING = ".diffdoctor.lock", ".diffdoctor.running"  # that a folder is written to, and by whom
_HELD: dict[Path, int] = {}  # folders of this process, and how often


class FolderInUse(RuntimeError):
    """Another process writes into the folder."""


@contextmanager
def only_run(folder: str | os.PathLike) -> Iterator[None]:
    """Context in which no other process that asks for it writes into the folder. The same process may ask again inside.

    The system frees the lock of a process that is killed. On a file system without locks nothing is locked.

    Raises:
        FolderInUse: another process has the folder; it is named.
    """
    folder = Path(os.path.realpath(folder))
    if folder in _HELD:
        _HELD[folder] += 1
        try:
            yield
        finally:
            _HELD[folder] -= 1
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock, who = FileLock(folder / LOCK, timeout=0), folder / RUNNING
    try:
        lock.acquire()
    except Timeout:
        raise FolderInUse(
            f"{str(folder)!r} is in use by {_named(who)}. Wait until it has ended, or choose another folder."
        ) from None
    except (NotImplementedError, OSError):  # a file system without locks
        yield
        return
    _HELD[folder] = 1
    try:
        with suppress(OSError):  # a name is a courtesy, for which a full disk may have no room
            write_atomically(who, json.dumps({"process": os.getpid(), "host": socket.gethostname()}))
        yield
    finally:
        del _HELD[folder]
        who.unlink(missing_ok=True)
        lock.release()


def _named(who: Path) -> str:
    try:
        found = json.loads(who.read_text(encoding="utf-8"))
        return f"process {found['process']} on {found['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
