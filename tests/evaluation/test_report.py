# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
import base64
import io
from html.parser import HTMLParser

import pytest
from PIL import Image

from diffusers_diffdoctor.evaluation.report import Figure, Picture, Section, Table, html_report, inline_image


VOID = {"meta", "img", "link", "br", "hr", "input"}


class Page(HTMLParser):
    """Collects the tags, attributes and text of a page, and checks that tags are closed in order."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.links, self.words, self.open = [], [], "", []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


@pytest.fixture
def page(tmp_path):
    evil = '<script>alert("x")</script>'
    picture = tmp_path / "file.jpg"
    Image.new("RGB", (300, 300), (200, 30, 30)).save(picture)
    path = html_report(
        tmp_path / "report.html",
        f"A title {evil}",
        [Figure(f"Frequency {evil}", f"80 % {evil}", "note", "good")],
        [
            Section(
                "Pictures",
                evil,
                pictures=[Picture(Image.new("RGB", (8, 8)), f'"quoted" {evil}', evil), Picture(picture)],
            ),
            Section(f"Table {evil}", table=Table(("a", evil), [("1", evil)]), code=evil),
        ],
        f"A summary {evil}",
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file.jpg", "report.html"]
    return Page(path.read_text(encoding="utf-8"))


def test_text_is_escaped(page):
    assert "script" not in page.tags
    assert page.words.count('<script>alert("x")</script>') >= 9


def test_the_file_needs_nothing_else(page):
    assert len(page.links) == 2
    for link in page.links:
        kind, data = link.split(";base64,")
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        assert kind == f"data:image/{image.format.lower()}"
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "http:" not in page.words and "https:" not in page.words and "@import" not in page.words


def test_small_pictures_are_kept_exactly():
    image = Image.effect_noise((64, 64), 80).convert("RGB")
    data = base64.b64decode(inline_image(image).split(",")[1])
    assert Image.open(io.BytesIO(data)).tobytes() == image.tobytes()
