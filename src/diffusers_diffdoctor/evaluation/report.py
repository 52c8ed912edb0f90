# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""One HTML file that needs nothing else: inlined pictures, escaped text, no request to anywhere."""

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from .. import __version__
from ..files import write_atomically


TEMPLATE = "report_template.html"


@dataclass
class Figure:
    """A number at the head of the report: "Artifact frequency", "82.0 % → 21.5 %", "95 % interval ..."."""

    label: str
    value: str
    note: str = ""
    tone: str = "plain"  # "good", "bad" or "plain"


@dataclass
class Table:
    """`rows` of texts under `columns`; the first column is read as the name of the row."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Picture:
    """A PIL image, or the path of a PNG or JPEG file taken as it is, with a caption and a line of small print."""

    image: Image.Image | str | os.PathLike
    caption: str = ""
    note: str = ""


@dataclass
class Section:
    """A part of the report: a heading, then whatever of text, table, pictures and code is given.

    `wide` pictures take the width of the page; others stand beside each other.
    """

    heading: str
    text: str = ""
    table: Table | None = None
    pictures: Sequence[Picture] = field(default_factory=list)
    wide: bool = False
    code: str = ""


def html_report(
    path: str | os.PathLike,
    title: str,
    figures: Sequence[Figure] = (),
    sections: Sequence[Section] = (),
    summary: str = "",
) -> Path:
    """Write a self-contained report; the file appears whole or not at all.

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
    html = environment.get_template(TEMPLATE).render(
        title=title, summary=summary, figures=figures, sections=sections, inline=inline_image, version=__version__
    )
    return write_atomically(path, html.encode("utf-8", "replace"))  # file names need not be UTF-8


def inline_image(image: Image.Image | str | os.PathLike) -> str:
    """A `data:` address that holds the picture: PNG for small ones, whose pixels matter, JPEG for large."""
    if isinstance(image, Image.Image):
        image, buffer = image.convert("RGB"), io.BytesIO()
        if image.width * image.height <= 160 * 160:
            image.save(buffer, "PNG", optimize=True)
        else:
            image.save(buffer, "JPEG", quality=88)
        data = buffer.getvalue()
    else:
        data = Path(image).read_bytes()
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
