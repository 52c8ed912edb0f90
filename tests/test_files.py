# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Files appear whole or not at all; contents are told apart; seeds are the same everywhere."""

import hashlib
import os
import stat

import pytest
import torch
from fixtures.pipelines import tiny_flux
from fixtures.trainer import tiny_detector
from peft import LoraConfig
from safetensors.torch import save_file

from diffusers_diffdoctor.files import digest, write_atomically, written_atomically
from diffusers_diffdoctor.seeds import derive_seed
from diffusers_diffdoctor.treatment.adapter import save_lora


def test_writing_replaces_at_the_end_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "report.txt"
    assert write_atomically(path, "first") == path
    with written_atomically(path) as unfinished:
        assert unfinished.name == path.name  # libraries choose a format by the suffix
        unfinished.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second"
    write_atomically(str(path), "ü".encode())
    assert path.read_text(encoding="utf-8") == "ü"
    assert os.listdir(tmp_path) == ["report.txt"]


def test_a_failed_or_killed_writer_changes_nothing(tmp_path):
    path = write_atomically(tmp_path / "a", b"whole")
    with pytest.raises(RuntimeError, match="full"), written_atomically(path) as unfinished:
        unfinished.write_bytes(b"ha")
        raise RuntimeError("the disk is full")
    assert path.read_bytes() == b"whole" and os.listdir(tmp_path) == ["a"]
    (tmp_path / ".a.unfinished").mkdir()  # of a writer that was killed
    (tmp_path / ".a.unfinished/a").write_bytes(b"ha")
    write_atomically(path, b"whole again")
    assert path.read_bytes() == b"whole again" and os.listdir(tmp_path) == ["a"]


def test_folders_are_written_whole_too(tmp_path):
    def write(text):
        with written_atomically(tmp_path / "model") as unfinished:
            unfinished.mkdir()
            (unfinished / "weights").write_text(text)

    (tmp_path / "model").mkdir()
    write("1")
    with pytest.raises(OSError):  # only an empty folder gives way
        write("2")
    assert (tmp_path / "model/weights").read_text() == "1" and os.listdir(tmp_path) == ["model"]


def test_digests(tmp_path):
    expected = hashlib.sha256(b"hands and faces").hexdigest()
    (tmp_path / "file").write_bytes(b"hands and faces")
    parts = [b"hands ", "and ", memoryview(b"faces")]
    assert {digest(one) for one in ("hands and faces", b"hands and faces", tmp_path / "file", parts)} == {expected}
    assert digest(os.fsdecode(b"caf\xe9")) == hashlib.sha256(b"caf\xe9").hexdigest()  # a name that is not UTF-8


def test_seeds_are_frozen_and_spread():
    """Written down, because a resumed run on another machine must find them again."""
    assert derive_seed(42, "rollout", 0) == 695341268
    assert derive_seed(42, "rollout", 1) != derive_seed(42, 1, "rollout") != derive_seed(421, "rollout")
    seeds = {derive_seed(42, "rollout", position) for position in range(10_000)}
    assert len(seeds) > 9_990 and max(seeds) < 2**31


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_weights_are_as_readable_as_any_other_new_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        tiny_detector().save_pretrained(tmp_path / "detector")
        pipeline = tiny_flux()
        pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
        save_lora(pipeline, "transformer", tmp_path / "lora")
        save_lora(pipeline, "transformer", tmp_path / "lora", "live.safetensors")
        with written_atomically(tmp_path / "lora/else.safetensors") as unfinished:
            save_file({"x": torch.zeros(1)}, unfinished)
    finally:
        os.umask(before)
    files = [path for name in ("detector", "lora") for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".safetensors", ".json", ".md"} and len(files) >= 6
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}
