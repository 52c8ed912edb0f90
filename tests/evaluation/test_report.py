# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
import base64
import hashlib
import io
import json
import os
import re
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from PIL import Image

from diffusers_diffdoctor.evaluation.report import (
    Card,
    Figure,
    Gallery,
    Picture,
    Section,
    Table,
    View,
    address,
    encode,
    html_report,
    inline_image,
)


VOID = {"meta", "img", "link", "br", "hr", "input"}
EVIL = '</script><script>alert("x")</script><img src=x onerror=alert(1)>'


class Page(HTMLParser):
    """Collects the tags, attributes and text of a page, and checks that tags are closed in order."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.words, self.code, self.open = [], [], "", {}, []
        self.feed(html)
        assert not self.open
        addresses = ("src", "href", "srcset", "data", "action")
        self.links = [value for name, value in self.attributes if name in addresses and not value.startswith("#")]

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style"):
            self.code.setdefault(self.open[-1], []).append(data)
        else:
            self.words += data


@pytest.fixture
def page(tmp_path):
    picture = tmp_path / "file.jpg"
    Image.new("RGB", (300, 300), (200, 30, 30)).save(picture)
    card = Card(
        EVIL, [View(EVIL, "a%20b.webp", (8, 8)), View("x", "c.webp", (9, 9), "d.jpg")], (0.5,), EVIL, "bad", EVIL, EVIL
    )
    path = html_report(
        tmp_path / "report.html",
        f"A title {EVIL}",
        [Figure(f"Frequency {EVIL}", f"80 % {EVIL}", "note", "good")],
        [
            Section(
                "Pictures",
                EVIL,
                pictures=[Picture(Image.new("RGB", (8, 8)), f'"quoted" {EVIL}', EVIL), Picture(picture)],
            ),
            Section(f"Table {EVIL}", table=Table(("a", EVIL), [("1", EVIL)]), code=EVIL),
            Section("Gallery", gallery=Gallery([card], [EVIL], EVIL, EVIL), files=["table.csv"]),
        ],
        f"A summary {EVIL}",
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file.jpg", "report.html"]
    return Page(path.read_text(encoding="utf-8"))


def test_text_is_escaped(page):
    assert page.tags.count("script") == page.tags.count("style") == 1
    assert not any("alert" in code for codes in page.code.values() for code in codes)
    assert page.words.count(EVIL) >= 14
    values = [value for name, value in page.attributes if name in ("data-verdict", "data-category")]
    assert values == [EVIL, EVIL] and dict(page.attributes)["data-numbers"] == "0.5"
    assert next(json.loads(value) for name, value in page.attributes if name == "data-numbers") == [EVIL]
    assert not any(name.startswith("on") or name == "style" for name, _ in page.attributes)


def test_only_its_own_script_and_style_may_run_and_nothing_is_fetched(page):
    (policy,) = [value for name, value in page.attributes if name == "content" and "default-src" in value]
    rules = {rule.split()[0]: rule.split()[1:] for rule in policy.split(";")}
    assert rules.pop("default-src") == rules.pop("base-uri") == rules.pop("form-action") == ["'none'"]
    assert rules.pop("img-src") == ["'self'", "file:", "data:"]
    for kind in ("script", "style"):
        (code,) = page.code[kind]
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        assert rules.pop(f"{kind}-src") == [f"'sha256-{digest}'"]
        assert not re.search(r"https?:|@import|url\(|fetch|XMLHttp|innerHTML|eval|document\.write", code)
    assert not rules and "http:" not in page.words and "https:" not in page.words


def test_pictures_of_sections_are_inlined_and_those_of_galleries_are_not(page):
    inlined = [link for link in page.links if link.startswith("data:")]
    assert len(inlined) == 2
    for link in inlined:
        kind, data = link.split(";base64,")
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        assert kind == f"data:image/{image.format.lower()}"
    assert not {"link", "iframe", "object", "form"} & set(page.tags)
    assert page.links[2:] == ["table.csv", "a%20b.webp", "a%20b.webp", "d.jpg", "c.webp"]


def test_small_pictures_are_kept_exactly():
    image = Image.effect_noise((64, 64), 80).convert("RGB")
    data = base64.b64decode(inline_image(image).split(",")[1])
    assert Image.open(io.BytesIO(data)).convert("RGB").tobytes() == image.tobytes()
    shrunk = Image.open(io.BytesIO(encode(Image.effect_noise((900, 300), 80), 320)))
    assert shrunk.size == (320, 107)


@pytest.mark.parametrize(
    "name", ["javascript:alert(1).png", "100% #1?.png", "a b\n<é>.png", os.fsdecode(b"caf\xe9.png")]
)
def test_an_address_is_that_of_the_file_whatever_its_name(tmp_path, name):
    for folder in (tmp_path, tmp_path / "beside" / "deeper"):
        found = address(tmp_path / name, folder)
        assert re.fullmatch(r"[A-Za-z0-9_.~%/-]+", found)
        path = os.fsdecode(
            os.path.join(
                os.fsencode(folder), unquote(found, errors="surrogateescape").encode(errors="surrogateescape")
            )
        )
        assert os.path.normpath(path) == str(tmp_path / name)
