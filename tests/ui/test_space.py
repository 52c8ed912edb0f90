# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""A folder that is a Space of the Hub."""

import importlib.util
import os
import sys
import urllib.request
from pathlib import Path

import pytest
import yaml
from fixtures.pages import Served, free_port
from fixtures.trainer import tiny_detector
from packaging.requirements import Requirement

import diffusers_diffdoctor
from diffdoctor import main


def test_the_folder_has_what_the_hub_reads(tmp_path):
    tiny_detector().save_pretrained(tmp_path / "mine")
    assert main(["ui", "--share-space", str(tmp_path / "space"), "--detector", str(tmp_path / "mine")]) == 0
    files = {
        path.relative_to(tmp_path / "space").as_posix() for path in (tmp_path / "space").rglob("*") if path.is_file()
    }
    assert {"app.py", "requirements.txt", "README.md", "detector/config.json", "detector/model.safetensors"} == files
    _, head, _ = (tmp_path / "space/README.md").read_text(encoding="utf-8").split("---\n", 2)
    card = yaml.safe_load(head)
    assert card["sdk"] == "gradio" and (tmp_path / "space" / card["app_file"]).is_file()
    requirement = Requirement((tmp_path / "space/requirements.txt").read_text().strip())
    assert requirement.extras == {"ui"} and requirement.specifier.contains(diffusers_diffdoctor.__version__)
    written = "".join((tmp_path / "space" / name).read_text(encoding="utf-8") for name in ("app.py", "README.md"))
    assert str(tmp_path) not in written


def test_a_folder_with_something_in_it_is_left_alone(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["ui", "--share-space", str(tmp_path), "--detector", "some/detector"]) == 1
    assert "not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs gradio: make test-ui")
def test_its_app_starts_as_the_hub_starts_it(tmp_path):
    tiny_detector().save_pretrained(tmp_path / "mine")
    space = tmp_path / "space"
    main(["ui", "--share-space", str(space), "--detector", str(tmp_path / "mine")])
    port = free_port()
    path = os.pathsep.join(entry for entry in sys.path if Path(entry).is_dir() and "tests" not in Path(entry).parts)
    environment = os.environ | {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "PYTHONPATH": path}
    server = Served([sys.executable, "app.py"], port, cwd=space, env=environment)
    try:
        with urllib.request.urlopen(f"{server.url}config", timeout=20) as answer:
            assert b"Threshold" in answer.read()
    finally:
        server.kill()
        server.process.stdout.close()
