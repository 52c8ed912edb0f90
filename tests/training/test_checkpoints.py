# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Whole or damaged: a manifest tells, whatever happened to the files."""

import json
import os

import pytest

from diffusers_diffdoctor.training import checkpoints as module
from diffusers_diffdoctor.training.checkpoints import (
    MANIFEST,
    check_whole,
    checkpoints,
    damage,
    last_checkpoint,
    rotate,
    seal,
)


FILES = {
    "weights.safetensors": b"w" * 5000,
    "optimizer.pt": b"o" * 300,
    "sub/rng_state_0.pth": b"r" * 10,
    "empty.txt": b"",
}


def write(folder):
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    seal(folder)
    return folder


def test_a_sealed_checkpoint_is_whole_and_may_move(tmp_path):
    folder = write(tmp_path / "checkpoint-3")
    assert damage(folder) is None
    folder.rename(tmp_path / "elsewhere")
    assert damage(tmp_path / "elsewhere") is None
    (tmp_path / "elsewhere" / "notes.txt").write_text("a file that was not there says nothing about those that were")
    assert damage(tmp_path / "elsewhere") is None


def spoil(name, change):
    def act(folder):
        path = folder / name
        content = path.read_bytes()
        path.unlink()
        if change is not None:
            path.write_bytes(change(content))

    return act


DAMAGES = {
    "missing": ("optimizer.pt", None, "is missing"),
    "cut": ("weights.safetensors", lambda old: old[:-1], "has 4999 bytes, but was written with 5000"),
    "empty": ("optimizer.pt", lambda old: b"", "has 0 bytes"),
    "longer": ("sub/rng_state_0.pth", lambda old: old + b"r", "has 11 bytes"),
    "zeros": ("weights.safetensors", lambda old: bytes(len(old)), "has another content than was written"),
    "one-bit": ("weights.safetensors", lambda old: old[:100] + b"v" + old[101:], "has another content"),
    "filled": ("empty.txt", lambda old: b"x", "has 1 bytes"),
}


@pytest.mark.parametrize("name, change, said", DAMAGES.values(), ids=DAMAGES.keys())
def test_every_damage_is_named_with_its_file(tmp_path, name, change, said):
    folder = write(tmp_path / "checkpoint-3")
    spoil(name, change)(folder)
    assert name in damage(folder) and said in damage(folder)
    with pytest.raises(
        ValueError, match=r"checkpoint-3', which is damaged: its .*`resume_from_checkpoint=True` finds it"
    ):
        check_whole(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": 3}', '{"files": {"optimizer.pt": {}}}', "\0" * 100])
def test_a_manifest_that_is_none_is_damage(tmp_path, content):
    folder = write(tmp_path / "checkpoint-3")
    (folder / MANIFEST).write_text(content)
    assert damage(folder) == f"its {MANIFEST} cannot be read"


def test_a_file_exchanged_for_a_folder_or_a_pipe_is_damage(tmp_path):
    folder = write(tmp_path / "checkpoint-3")
    (folder / "empty.txt").unlink()
    (folder / "empty.txt").mkdir()
    assert damage(folder) == "its empty.txt is missing"
    (folder / "empty.txt").rmdir()
    os.mkfifo(folder / "empty.txt")
    assert damage(folder) == "its empty.txt is missing"


def test_the_last_whole_checkpoint_is_found_and_later_ones_are_named(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(module.logger, "warning", said.append)
    for step in (2, 10, 30, 200):
        write(tmp_path / f"checkpoint-{step}")
    for name in ("checkpoint-x", "checkpoint-40.old", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-500").write_text("a file")
    assert list(checkpoints(tmp_path)) == [2, 10, 30, 200]
    assert last_checkpoint(tmp_path).name == "checkpoint-200" and not said
    spoil("optimizer.pt", None)(tmp_path / "checkpoint-200")
    (tmp_path / "checkpoint-30" / MANIFEST).unlink()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert len(said) == 1 and "checkpoint-200 is damaged: its optimizer.pt is missing" in said[0]
    assert "checkpoint-30 is damaged: it was not written to its end" in said[0]


def test_without_a_whole_checkpoint_each_damage_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"has no whole checkpoint\. Start without it"):
        last_checkpoint(tmp_path / "nowhere")
    spoil("optimizer.pt", None)(write(tmp_path / "checkpoint-2"))
    with pytest.raises(
        ValueError, match=r"no whole checkpoint \(checkpoint-2 is damaged: its optimizer\.pt is missing\)"
    ):
        last_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="there is no such folder"):
        check_whole(tmp_path / "checkpoint-9")


@pytest.mark.parametrize(
    "limit, best, left",
    [
        (None, None, [1, 2, 3, 4, 10]),
        (2, None, [4, 10]),
        (1, None, [10]),
        (1, 2, [2, 10]),  # the best and the newest, which a resumed run needs
        (2, 2, [2, 10]),
        (3, 2, [2, 4, 10]),
        (3, 10, [3, 4, 10]),
        (9, 1, [1, 2, 3, 4, 10]),
    ],
)
def test_rotation_keeps_the_newest_and_the_best(tmp_path, limit, best, left):
    for step in (1, 2, 3, 4, 10):
        write(tmp_path / f"checkpoint-{step}")
    rotate(tmp_path, limit, keep=[None if best is None else str(tmp_path / f"checkpoint-{best}")])
    assert list(checkpoints(tmp_path)) == left


def test_the_manifest_holds_no_path_but_names(tmp_path):
    folder = write(tmp_path / "checkpoint-3")
    manifest = json.loads((folder / MANIFEST).read_text())
    assert sorted(manifest["files"]) == sorted(FILES) and str(tmp_path) not in (folder / MANIFEST).read_text()
