# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor data import` offers what the readers have."""

import argparse
import dataclasses
import json

import pytest
from fixtures.annotations import mask, picture, square
from fixtures.tfrecords import example, record

from diffdoctor import main
from diffusers_diffdoctor.cli import data_import
from diffusers_diffdoctor.data import Stage
from diffusers_diffdoctor.data.readers import READERS
from diffusers_diffdoctor.data.readers.richhf import SCORES
from diffusers_diffdoctor.data.schema import encode_png


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


def prepare(top, name):
    """A source of one image beside three files that are none, and the arguments for it."""
    for folder in ("images/train", "labels/train", "annotations/train_ALL", "images/train_ALL"):
        (top / folder).mkdir(parents=True)
    images = top / "images" / ("train_ALL" if name == "had" else "train")
    picture(images / "a.png")
    for other in ("notes.txt", "archive.zip", "a.gif"):
        (images / other).write_bytes(b"x")
    if name in ("pal4vst", "folders"):
        mask(top / "labels/train/a.png", square(0, 0, 9, 9))
    if name == "had":
        (top / "annotations/train_ALL/a.json").write_text(
            '{"image": {"file_name": "a.png"}, "annotation": [], "human": []}'
        )
    content = {
        "coco": {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [], "categories": []},
        "label-studio": [{"id": 1, "data": {"image": "a.png"}, "annotations": [{"result": []}]}],
        "synthscars": {"a": {"refs": [], "caption": "", "img_file_name": "a.png"}},
    }
    (top / "a.json").write_text(json.dumps(content.get(name)))
    if name == "richhf":
        values = {"filename": [b"a.png"], "artifact_map": [encode_png(square(0, 0, 9, 9))["bytes"]]} | {
            name: [0.5] for name in SCORES
        }
        (top / "a.tfrecord").write_bytes(record(example(values)))
    source = {"richhf": top / "a.tfrecord", "pal4vst": top, "had": top, "folders": images}.get(name, top / "a.json")
    options = {"pal4vst": [], "had": [], "folders": ["--masks", str(top / "labels/train")]}
    return [str(source), *options.get(name, ["--images", str(images)])]


@pytest.mark.parametrize("name", READERS)
def test_files_that_are_no_images_are_counted(tmp_path, name, capsys):
    arguments = prepare(tmp_path / "source", name)
    main(["data", "import", name, *arguments, "-o", str(tmp_path / "out")])
    images = 2 if name in ("pal4vst", "folders") else 1  # with the mask
    said = capsys.readouterr().out
    assert f"{images + 3} found = {images} images + 3 skipped: name that is no image's: 2" in said
    plan = json.loads((tmp_path / "out/stage.json").read_text())
    assert plan["found"] == images + 3
    assert plan["skipped"] == {"name that is no image's": 2, "format that is not read (.gif)": 1}
    assert plan["counts"]["rows_out"] == {"train": 1}


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
