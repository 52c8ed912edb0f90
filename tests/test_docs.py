# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The documentation says what is: pages, links, names, arguments and defaults are compared with the code."""

import argparse
import ast
import dataclasses
import importlib
import inspect
import re
import shlex
import textwrap
from pathlib import Path

import pytest
import yaml

import diffusers_diffdoctor
from diffdoctor import command_module


ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs/source"
PAGES = sorted(DOCS.glob("*.md"))
PUBLIC = set(diffusers_diffdoctor.__all__)


def python_blocks(page: Path, marked: str = "") -> list[str]:
    return [
        textwrap.dedent(code) for code in re.findall(marked + r"```python\n(.*?)```", page.read_text("utf-8"), re.S)
    ]


def test_the_table_of_contents_lists_every_page():
    toctree = yaml.safe_load((DOCS / "_toctree.yml").read_text("utf-8"))
    listed = [entry["local"] for part in toctree for entry in part["sections"]]
    assert sorted(listed) == [page.stem for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_names_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    pictures = {link for link in links if link.startswith("assets/")}
    assert all((DOCS / picture).is_file() for picture in pictures)
    assert {link for link in links if link} - pictures <= {page.stem for page in PAGES}
    names = re.findall(r"\[`~?(?:diffusers_diffdoctor\.)?(\w+)(?:\.\w+)*`\]", text)
    assert set(names) <= PUBLIC
    files = re.findall(r"`((?:src|tests|docs|examples)/[\w./]+)`", text)
    assert [path for path in files if not (ROOT / path).exists()] == []


def documented() -> list[tuple[str, str]]:
    """(name, its listed methods) of every entry that doc-builder turns into API documentation."""
    pattern = r"\[\[autodoc\]\] ([\w.]+)\n((?:    - \w+\n)*)"
    return [entry for page in PAGES for entry in re.findall(pattern, page.read_text("utf-8"))]


def test_every_public_name_is_documented_once():
    names = [name for name, _ in documented()]
    assert sorted(name for name in names if "." not in name) == sorted(PUBLIC - {"__version__"})
    assert len(set(names)) == len(names)


def test_what_is_documented_exists_and_explains_itself():
    for name in (name for name, _ in documented() if "." in name):
        module, _, attribute = name.rpartition(".")
        module = importlib.import_module(f"diffusers_diffdoctor.{module}")
        assert attribute in module.__all__ and getattr(module, attribute).__doc__, name


def test_documented_methods_exist_and_explain_themselves():
    for name, methods in documented():
        module, _, attribute = f"diffusers_diffdoctor.{name}".rpartition(".")
        for method in re.findall(r"- (\w+)", methods):
            assert getattr(getattr(importlib.import_module(module), attribute), method).__doc__, f"{name}.{method}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.stem)
def test_snippets_call_our_code_with_arguments_that_exist(page):
    for code in python_blocks(page):
        ours = {name: getattr(diffusers_diffdoctor, name) for name in PUBLIC}
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("diffusers_diffdoctor"):
                module = importlib.import_module(node.module)
                ours |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
        for call in ast.walk(ast.parse(code)):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in ours:
                accepted = inspect.signature(ours[call.func.id]).parameters
                assert {keyword.arg for keyword in call.keywords} <= set(accepted), call.func.id


WITH_COMMANDS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples/README.md"]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_commands_exist_and_take_these_arguments(page):
    """Lines of shell blocks that call `diffdoctor` are parsed by the command's own parser; make targets are looked up."""
    text = page.read_text("utf-8")
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S) + re.findall(r"^    \s*\S.*$", text, re.M)
    lines = [line.split("#")[0].strip() for line in "\n".join(blocks).replace("\\\n", " ").splitlines()]
    for line in lines:
        # the same arguments, whatever starts the processes
        line = re.sub(
            r"^(accelerate launch|python) .*?(-m diffusers_diffdoctor\.cli\.treat|examples/(?:dreambooth_treat|treat_\w+)\.py)",
            "diffdoctor treat",
            line,
        )
        line = re.sub(r"^(accelerate launch|python) .*?examples/train_detector\.py", "diffdoctor train-detector", line)
        line = re.sub(r"^accelerate launch .*?-m diffdoctor ", "diffdoctor ", line)
        if line.startswith("diffdoctor ") and "--help" not in line:
            _, command, *arguments = shlex.split(re.sub(r"\$\w+", "1", line))
            module = command_module(command)
            if not hasattr(module, "add_arguments"):
                module.parse(arguments)
                continue
            parser = argparse.ArgumentParser(exit_on_error=False)
            module.add_arguments(parser)
            parser.parse_args(arguments)
        elif line.startswith("make "):
            assert re.search(rf"^{line.split()[1]}:", (ROOT / "Makefile").read_text(), re.M), line


def test_the_paper_index_states_the_defaults():
    text = (DOCS / "paper_index.md").read_text("utf-8")
    rows = [row for row in text.split("## Detector")[0].splitlines() if row.startswith("|")]
    column = " ".join(row.split("|")[3] for row in rows if not row.startswith("| alternatives"))
    stated = {name: ast.literal_eval(value) for name, value in re.findall(r"`(\w+)=([^`]+)`", column)}
    fields = {field.name: field.default for field in dataclasses.fields(diffusers_diffdoctor.PixelRewardConfig)}
    assert stated == {name: fields[name] for name in stated}
    assert len(stated) >= 8
    assert set(re.findall(r"`(\w+)`", column)) - {"peft_config", "PixelRewardConfig"} <= set(fields)
