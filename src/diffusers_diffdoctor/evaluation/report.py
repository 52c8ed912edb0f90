# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""HTML reports that need no server and ask nobody for anything.

The few pictures of a section are inlined, so that the page alone is whole. The many of a gallery lie beside it and are loaded when
they come into sight. All text is escaped. The page's own script and style are the only ones that its policy lets run; without
the script the page still shows everything.
"""

import base64
import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from .. import __version__
from ..files import written_atomically


TEMPLATE, SCRIPT, STYLE = "report_template.html", "report.js", "report.css"
PICTURES = "report_files"  # the folder beside a page that holds the pictures of its galleries
SMALL = 160  # pixels: pictures of up to this side are kept exactly, and shown with square pixels


@dataclass
class Figure:
    """A number at the head of the report: "Artifact frequency", "82.0 % → 21.5 %", "95 % interval ..."."""

    label: str
    value: str
    note: str = ""
    tone: str = "plain"  # "good", "bad" or "plain"


@dataclass
class Table:
    """`rows` of texts under `columns`, which sort them; the first column is read as the name of the row."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Picture:
    """A PIL image, or the path of a PNG, JPEG or WEBP file taken as it is, with a caption and a line of small print."""

    image: Image.Image | str | os.PathLike
    caption: str = ""
    note: str = ""


@dataclass
class View:
    """A picture of a card.

    Attributes:
        label: what it shows, such as "before".
        address: where it lies, see [`address`].
        size: its width and height in pixels.
        full: where a larger one lies; by default there is none.
    """

    label: str
    address: str
    size: tuple[int, int]
    full: str = ""

    @property
    def small(self) -> bool:
        return max(self.size) <= SMALL


@dataclass
class Card:
    """One image of many, or one pair.

    Attributes:
        title: a file's name, a prompt.
        views: pictures in pairs that are compared: (image, diagnosis), or (before, after) and the diagnoses of the two.
        numbers: one for each of the gallery's `numbers`.
        verdict, tone: a word, and whether it is "good", "bad" or "plain".
        category: what it belongs to, if that is known.
        note: a line of small print, for people.
    """

    title: str
    views: Sequence[View]
    numbers: Sequence[float]
    verdict: str = ""
    tone: str = "plain"
    category: str = ""
    note: str = ""


@dataclass
class Gallery:
    """Cards that can be searched, filtered, sorted, compared and enlarged.

    Attributes:
        cards: in the order that is shown first; a generator will do.
        numbers: what the cards' numbers are called, to sort by.
        order: what the first order is called.
        categories: what the cards' categories are called, such as "folder".
        slider: lay the pictures of a pair over each other, with a slider between them.
    """

    cards: Iterable[Card]
    numbers: Sequence[str]
    order: str
    categories: str = "category"
    slider: bool = False


@dataclass
class Section:
    """A part of the report: a heading, then whatever of text, files, table, pictures, gallery and code is given.

    `files` are names of files beside the page, which are linked. `wide` pictures take the width of the page; others stand
    beside each other.
    """

    heading: str
    text: str = ""
    table: Table | None = None
    pictures: Sequence[Picture] = field(default_factory=list)
    wide: bool = False
    code: str = ""
    gallery: Gallery | None = None
    files: Sequence[str] = ()


def html_report(
    path: str | os.PathLike,
    title: str,
    figures: Sequence[Figure] = (),
    sections: Sequence[Section] = (),
    summary: str = "",
) -> Path:
    """Write a report; the file appears whole or not at all. But for galleries, whose pictures lie beside it, it needs nothing else.

    Args:
        path: HTML file to write.
        title: heading of the page.
        figures: the numbers that matter, shown large.
        sections: the rest, in order.
        summary: one or two sentences under the title.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("diffusers_diffdoctor", "evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    own = {name: files(__package__).joinpath(name).read_text(encoding="utf-8") for name in (SCRIPT, STYLE)}
    page = environment.get_template(TEMPLATE).stream(
        title=title,
        summary=summary,
        figures=figures,
        sections=sections,
        inline=inline_image,
        version=__version__,
        script=own[SCRIPT],
        style=own[STYLE],
        hashes={name: _csp_hash(text) for name, text in (("script", own[SCRIPT]), ("style", own[STYLE]))},
    )
    page.enable_buffering(100)
    with written_atomically(path) as unfinished:
        page.dump(str(unfinished), encoding="utf-8", errors="replace")  # file names need not be UTF-8
    return Path(path)


def address(path: str | os.PathLike, folder: str | os.PathLike) -> str:
    """How a page in `folder` names a file elsewhere: relative, so that both can move together, whatever bytes are in its name."""
    try:
        relative = Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # on another drive of Windows
        return Path(path).absolute().as_uri()
    return quote(os.fsencode(relative))


def fitted(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """(width, height), shrunk until no side is longer than `longest` pixels."""
    scale = min(1, longest / max(size))
    return max(1, round(scale * size[0])), max(1, round(scale * size[1]))


def encode(image: Image.Image, longest: int | None = None) -> bytes:
    """A picture as WEBP, shrunk as [`fitted`] says; small ones, whose pixels matter, without loss."""
    if longest is not None and max(image.size) > longest:
        image = image.resize(fitted(image.size, longest), Image.Resampling.LANCZOS, reducing_gap=2.0)
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "WEBP", lossless=max(image.size) <= SMALL, quality=85, method=2)
    return buffer.getvalue()


def inline_image(image: Image.Image | str | os.PathLike) -> str:
    """A `data:` address that holds the picture."""
    data = encode(image) if isinstance(image, Image.Image) else Path(image).read_bytes()
    kind = "png" if data.startswith(b"\x89PNG") else "webp" if data.startswith(b"RIFF") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _csp_hash(text: str) -> str:
    """What a Content-Security-Policy calls an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"
