# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Names that came from somewhere else, made fit for what is published: local paths, file names, text on a page."""

import getpass
import hashlib
import os
import re
from pathlib import PureWindowsPath
from typing import Any
from urllib.parse import unquote, urlsplit


# --- paths of this machine ---------------------------------------------------------------------------------------------------


def shortened(value: Any) -> Any:
    """A value without what only this machine knows: absolute paths become their last component.

    What is a path, where the whole text is one line: what begins with `file://`, with a Windows drive or share, with `~/` or the
    home folder of a user of this machine; and what begins with `/` and exists, lies in a top-level folder that exists, or has
    several components and no blank in it. So `/imagine a cat` stays. In any other text the home folder becomes `~`, and so does
    a component that is the user's name, of an absolute path or of one that begins with `..`.

    Relative paths, ids of the Hub, URLs and prompts stay as they are.

    Args:
        value: a text or path, or a dictionary (of which keys stay), list or tuple of such values at any depth. Others are
            returned untouched.
    """
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        return _shortened(value)
    if isinstance(value, dict):
        return {key: shortened(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shortened(item) for item in value]
    if isinstance(value, tuple):
        return tuple(shortened(item) for item in value)
    return value


def _shortened(text: str) -> str:
    homes, user = _homes(), _user()
    path = _as_path(text, homes)
    if path is not None:
        last = PureWindowsPath(path).name if _is_windows(path) else os.path.basename(path.rstrip("/"))
        return "~" if path.rstrip("/\\") in homes or last == user else last or text
    for home in homes:
        # as a whole: not `/root` in `/rootless` or in `https://example.com/root`
        text = re.sub(rf"(?:file://|(?<![\w.~/\\-])){re.escape(home)}(?![\w-]|\.\w)", "~", text)
    if user:
        component = rf"(?<=[/\\]){re.escape(user)}(?![^\s/\\'\"`,;:)\]}}])"
        text = re.sub(
            r"(?:file://|(?<![\w.~:/\\-]))(?:[A-Za-z]:[/\\]|\.\.[/\\]|[/\\])[^\s'\"`]*",
            lambda match: re.sub(component, "~", match[0]),
            text,
        )
    return text


def _as_path(text: str, homes: list[str]) -> str | None:
    """The text as a normalised path where all of it is an absolute one, else None."""
    if not text or "\n" in text or "\0" in text:
        return None
    if text.lower().startswith("file://"):
        return unquote(urlsplit(text).path) or text
    if _is_windows(text):
        return text
    if text.startswith("~"):
        expanded = os.path.expanduser(text)
        return os.path.normpath(expanded) if expanded != text else None
    if not text.startswith("/"):
        return None
    path = "/" + os.path.normpath(text).lstrip("/")
    components = path.split("/")[1:]
    if any(path == home or path.startswith(f"{home}/") for home in homes):
        return path
    if len(components) > 1 and not re.search(r"\s", path):
        return path
    return path if components[0] and _exists(f"/{components[0]}") else None


def _is_windows(text: str) -> bool:
    return re.match(r"[A-Za-z]:[/\\]|\\\\\w", text) is not None


def _exists(path: str) -> bool:
    try:
        return os.path.lexists(path)
    except (OSError, ValueError):  # such as a name that is too long
        return False


def _homes() -> list[str]:
    """The home folder in all its spellings, the longest first. Not one that is the root of a disk."""
    found = {os.path.expanduser("~"), os.path.expanduser(f"~{_user()}")}
    found |= {os.path.realpath(home) for home in found if os.path.isabs(home)}
    found |= {home.replace("\\", "/") for home in found} | {home.replace("\\", "\\\\") for home in found}
    found = {home.rstrip("/\\") for home in found if os.path.isabs(home) and os.path.dirname(home) != home}
    return sorted(found, key=lambda home: (-len(home), home))


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a number without a name, as in some containers
        return ""


# --- file names --------------------------------------------------------------------------------------------------------------

LONGEST_NAME = 60
_DIGEST_LENGTH = 16
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)", re.I)  # names of devices on Windows


def harmless(text: str) -> str:
    """The text with `_` for all but ASCII letters, digits, `-` and `_`. Several texts become one."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", text)


def file_name(text: str) -> str:
    """A text as the name of a file or folder: ASCII letters, digits, `-` and `_`, at most 60 of them, never empty.

    A text that is such a name stays as it is. Any other ends in a digest of itself, so that two texts never get one name (on a
    disk that tells capitals apart).
    """
    clean = harmless(text)
    looks_made_here = re.search(rf"-[0-9a-f]{{{_DIGEST_LENGTH}}}$", text)
    if clean == text and 0 < len(text) <= LONGEST_NAME and not looks_made_here and not _RESERVED.fullmatch(text):
        return text
    ending = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST_LENGTH]
    return f"{clean[: LONGEST_NAME - _DIGEST_LENGTH - 1]}-{ending}"


# --- text in a terminal ---------------------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """A text on one line, without what commands a terminal or cannot be encoded."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


# --- text on a page ------------------------------------------------------------------------------------------------------------

# Words stay readable in the source: `-` and `_` between letters or digits are no markup, nor is `.` after a letter.
_MARKUP = re.compile(
    r"""
      [&<>"`*\[\]{}!|~\#\\$@=+^]
    | (?<![^\W_]) [-_] | [-_] (?![^\W_])      # `---`, a list's `-`, `__strong__`
    | (?<![^\W_]) \. | (?<=\d) \. (?!\d) | (?<=\d) \)      # `1.` and `1)` of a list
    | (?<=www) \. | : (?!\s)      # addresses become links by themselves
    """,
    re.I | re.X,
)


def markdown(text: str) -> str:
    """A text for the prose and the tables of a Markdown page, on one line: a reader sees the text and nothing of it takes effect.

    What would be markup, or raw HTML, is written as a numeric character reference, which Markdown takes for the character itself.
    Runs of white space are one blank, as they are on any page.
    """
    text = " ".join(text.encode("utf-8", "replace").decode("utf-8").split())
    text = re.sub(r"[\x00-\x1f\x7f-\x9f]", "\ufffd", text)
    return _MARKUP.sub(lambda match: f"&#{ord(match[0])};", text)
