# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor data import` offers what the readers have."""

import argparse
import dataclasses

import pytest

from diffdoctor import main
from diffusers_diffdoctor.cli import data_import
from diffusers_diffdoctor.data import Stage
from diffusers_diffdoctor.data.readers import READERS


def options(name: str) -> dict[str, argparse.Action]:
    parser = argparse.ArgumentParser()
    data_import.add_arguments(parser)
    (formats,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return {action.dest: action for action in formats.choices[name]._actions}


def test_each_format_is_a_command():
    assert list(data_import.FORMATS) == list(READERS) and set(data_import.OPTIONS) == set(READERS)


@pytest.mark.parametrize("name", READERS)
def test_each_setting_of_a_reader_is_an_option_with_its_default(name):
    reader, found = READERS[name](), options(name)
    assert isinstance(reader, Stage) and reader.name == f"import {name}"
    for field in dataclasses.fields(reader):
        default = found[field.name].default
        assert (
            found[field.name].required or (tuple(default) if isinstance(default, list) else default) == field.default
        )
        assert found[field.name].help


@pytest.mark.parametrize("name", READERS)
def test_each_format_has_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        main(["data", "import", name, "--help"])
    assert end.value.code == 0 and "SOURCE" in capsys.readouterr().out


def test_wrong_use_names_the_argument(tmp_path, capsys):
    for arguments, words in (
        (["coco", "x.json", "--shard-size", "0"], "`--shard-size` must be positive"),
        (["coco", "x.json", "--label", "a"], "no file 'x.json'"),  # argparse takes what is short for --labels
        (["had", str(tmp_path), "--mild", "2"], "`mild` must lie in [0, 1]"),
    ):
        assert main(["data", "import", *arguments, "-o", str(tmp_path / "out")]) == 1
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["data", "import", "coco", "x.json", "--ingore-labels", "a", "-o", str(tmp_path / "out")])
    assert "did you mean --ignore-labels" in capsys.readouterr().err
