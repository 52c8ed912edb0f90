# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Local paths, file names and text on a page: what is changed, and what must stay to the letter."""

import getpass
import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from diffusers_diffdoctor.names import LONGEST_NAME, file_name, markdown, shortened


@pytest.fixture
def ann(monkeypatch, tmp_path):
    """A user `ann` whose home folder exists: its path."""
    home = tmp_path / "homes/ann"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    for name in ("LOGNAME", "USER"):
        monkeypatch.setenv(name, "ann")
    assert getpass.getuser() == "ann"
    return home


class TestShortened:
    @pytest.mark.parametrize(
        "text",
        [
            "a cat, a dog",
            "/imagine a cat",
            "/home decor, a living room",
            "/",
            "~ a cat",
            "~3 cats/dogs",
            "models/flux",
            "./models/flux",
            "../models/flux",
            "black-forest-labs/FLUX.1-schnell",
            "org/ann",
            "https://example.com/ann/model",
            "https://huggingface.co/ann",
            "see https://example.com/home/ann/x for more",
            "and/or",
            "C: a note",
            "",
            "a\n/b",
        ],
    )
    def test_what_is_no_local_path_stays(self, ann, text):
        assert shortened(text) == text

    @pytest.mark.parametrize(
        "text, expected",
        [
            ("{home}/models/flux", "flux"),
            ("{home}/models/flux/", "flux"),
            ("{home}/my models/flux dev", "flux dev"),
            ("{home}", "~"),
            ("{home}/", "~"),
            ("~", "~"),
            ("~/models/flux", "flux"),
            ("/no-such-folder/flux", "flux"),
            ("/data/ann", "~"),
            ("/tmp", "tmp"),
            ("C:\\Users\\ann\\flux", "flux"),
            ("d:/models/flux", "flux"),
            ("\\\\server\\share\\flux", "flux"),
            ("file://{home}/my%20flux", "my flux"),
            ("../ann/out", "../~/out"),
            ("cannot read {home}/models/flux.", "cannot read ~/models/flux."),
            ("--output_dir={home}/out --x", "--output_dir=~/out --x"),
            ('load("{home}/x")', 'load("~/x")'),
            ("cannot read /data/ann/x", "cannot read /data/~/x"),
            ("from file:///data/ann/x", "from file:///data/~/x"),
            ("in D:\\ann\\x and '/ann'", "in D:\\~\\x and '/~'"),
            ("{home}ette/x and {home}", "{home}ette/x and ~"),
        ],
    )
    def test_paths_lose_what_only_this_machine_knows(self, ann, text, expected):
        text, expected = text.format(home=ann), expected.format(home=ann)
        if text.startswith(f"{ann}ette"):  # another folder, whose own name begins like the home's
            text, expected = f"in {text}", f"in {expected}"
        assert shortened(text) == expected

    def test_values_of_any_depth(self, ann):
        value = {"a": [f"{ann}/x", 1, None], "b": {"c": (ann / "y", "z")}, f"{ann}/key": 2.5}
        assert shortened(value) == {"a": ["x", 1, None], "b": {"c": ("y", "z")}, f"{ann}/key": 2.5}
        assert value["a"][0] == f"{ann}/x"  # what was given is not changed

    def test_a_home_that_is_the_root_hides_nothing_else(self, monkeypatch):
        monkeypatch.setenv("HOME", "/")
        assert shortened("a/b and /c") == "a/b and /c"

    def test_a_linked_home_is_found_by_both_names(self, ann, tmp_path, monkeypatch):
        (tmp_path / "linked").symlink_to(ann)
        monkeypatch.setenv("HOME", str(tmp_path / "linked"))
        assert shortened(f"in {ann}/x and {tmp_path}/linked/y") == "in ~/x and ~/y"


class TestFileName:
    NAMES = ["", "a b", "a_b", "a/b", "../../x", "..", ".", "/etc", "C:\\x", "con", "nul", "a\0b", "x" * 60, "x" * 61]
    NAMES += ["y" * 5000, "手", "脚", "é", "e\u0301", "\ud800", "\udcff", "a.b", " a", "a ", "a\n", "-rf", "hands-1"]

    @pytest.mark.parametrize("text", NAMES)
    def test_it_is_one_harmless_component(self, text, tmp_path):
        name = file_name(text)
        assert re.fullmatch(rf"[A-Za-z0-9_-]{{1,{LONGEST_NAME}}}", name)
        (tmp_path / name).mkdir()
        assert [path.name for path in tmp_path.iterdir()] == [name]

    @pytest.mark.parametrize("text", ["hands", "a_b", "FLUX-1", "-rf", "x" * 60])
    def test_harmless_names_stay(self, text):
        assert file_name(text) == text

    def test_two_texts_never_get_one_name(self):
        names = [*self.NAMES, *map(file_name, self.NAMES)]  # a name made here may come back as a key
        assert len(set(map(file_name, names))) == len(set(names))


HOSTILE = [
    "<script>alert(1)</script>",
    '<img src=x onerror="alert(1)">',
    "![x](http://example.com/x.png)",
    "[x](javascript:alert(1))",
    "<javascript:alert(1)>",
    "<http://example.com>",
    "http://example.com www.example.com ann@example.com",
    "a | b || c",
    "--- a --- b---c",
    "`code` ``more`` ```fence",
    "~~~ fence ~~strike~~",
    "**bold** __bold__ *it* _it_ a_b_c snake_case",
    "# heading",
    "> quote",
    "- item",
    "+ item",
    "1. item 2) item",
    "1) item",
    "=== a",
    "{{ 7 * 7 }} {% for x in y %} {# c #}",
    "&lt;b&gt; &amp; &#60;",
    "a\\*b \\<b> \\",
    "[ref]: http://example.com 'title'",
    "[^1] and [x]",
    "- [ ] task",
    "$$x$$ \\(x\\) $y$",
    "a :smile: b: c:",
    "<!-- comment -->",
    "<![CDATA[x]]> <?php ?> <!DOCTYPE html>",
    "a close-up, 85mm f/1.8, 3.5 m, 4k.",
    "手 | é “quotes” – dash",
    "it's 100% (real); isn't it?",
]


# As the Hub reads pages: raw HTML passes, tables are understood.
PAGE = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


class TestMarkdown:
    def kinds(self, tokens):
        """Types of all elements of a page, whose text is of type "text"."""
        for token in tokens:
            yield from [token.type] if token.type != "inline" else self.kinds(token.children)

    def test_the_renderer_would_act_on_most_examples(self):
        """Otherwise the tests below prove nothing."""
        acted = [
            text
            for text in HOSTILE
            if {*self.kinds(PAGE.parse(text))} != {"paragraph_open", "paragraph_close", "text"}
        ]
        assert len(acted) >= 15

    @pytest.mark.parametrize("before", ["", "Some prose, ", "1. ", "> "])
    @pytest.mark.parametrize("text", HOSTILE)
    def test_a_reader_of_prose_sees_the_text(self, text, before):
        tokens = PAGE.parse(before + markdown(text))
        around = {"1. ": {"ordered_list_open", "ordered_list_close", "list_item_open", "list_item_close"}}
        around |= {"> ": {"blockquote_open", "blockquote_close"}}
        assert {*self.kinds(tokens)} == {"paragraph_open", "paragraph_close", "text"} | around.get(before, set())
        (content,) = (token for token in tokens if token.type == "inline")
        assert "".join(child.content for child in content.children) == ("" if before in around else before) + text

    @pytest.mark.parametrize("text", HOSTILE)
    def test_a_cell_stays_one_cell(self, text):
        cell = markdown(text)
        tokens = PAGE.parse(f"| a | b |\n|---|---|\n| {cell} | last |\n")
        cells = [token for token in tokens if token.type == "inline"][2:]
        assert len(cells) == 2 and cells[1].content == "last"
        assert {child.type for child in cells[0].children} == {"text"}
        assert "".join(child.content for child in cells[0].children) == text

    def test_it_is_one_line(self):
        assert markdown("a\n\n# b\r\n\tc\u2028---\x85d\x0be") == "a &#35; b c &#45;&#45;&#45; d e"
        assert markdown("\n  a  \n") == "a"

    def test_what_no_file_can_hold_is_replaced(self):
        assert markdown("a\ud800b\x00c\x1b[0m") == "a?b\ufffdc\ufffd&#91;0m"

    def test_plain_words_stay_readable_in_the_source(self):
        text = "a close-up of Ann's hand, 85mm f/1.8 (film), snake_case: 100%"
        assert markdown(text) == text


def test_the_home_of_whoever_runs_this_is_hidden():
    assert str(Path.home()) not in shortened(f"in {Path.home()}/x") or str(Path.home()) == "/"
