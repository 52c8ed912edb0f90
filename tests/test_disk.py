# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""A disk that is full: said by its name, with nothing lost. RLIMIT_FSIZE makes every file longer than it fail."""

import errno
import json
import os
import resource
from contextlib import contextmanager

import pytest
from fixtures.trainer import tiny_trainer

from diffusers_diffdoctor import disk
from diffusers_diffdoctor.training.checkpoints import checkpoints, damage
from diffusers_diffdoctor.training.journal import Journal


@contextmanager
def room_for(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(disk.logger, "warning", lines.append)
    return lines


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_lines_that_find_no_room_are_written_later(tmp_path, said):
    journal, log = Journal(tmp_path), []
    for step in range(1, 8):
        log.append({"step": step, "loss": 0.5})
        with room_for(60 if 3 <= step <= 5 else 10**6):
            journal.write(log)
        if step == 5:
            assert lines_of(tmp_path) == log[:2]  # and no half line behind them
    assert lines_of(tmp_path) == log
    assert (
        len(said) == 3 and "metrics.jsonl cannot be written (File too large; " in said[0] and "MB are free" in said[0]
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_device_is_named(tmp_path, said):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    Journal(tmp_path).write([{"step": 1}])
    assert len(said) == 1 and "No space left on device" in said[0]


def test_a_run_that_resumes_replaces_a_damaged_file(tmp_path):
    for damaged in (b'{"step": 1}\n{"st', b"\0" * 50, b"\n\n", b"\xff\xfe"):
        (tmp_path / "metrics.jsonl").write_bytes(damaged)
        journal, log = Journal(tmp_path), [{"step": 1}, {"step": 2}]
        journal.replace()
        journal.write(log)
        journal.write([*log, {"step": 3}])
        assert lines_of(tmp_path) == [*log, {"step": 3}]


def test_a_checkpoint_that_finds_no_room_leaves_the_earlier_ones(tmp_path):
    """Whichever library meets the limit: safetensors, torch's zip writer or Python."""
    saved = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 100}
    tiny_trainer(tmp_path, max_steps=1, **saved).train()
    sizes = sorted(path.stat().st_size for path in (tmp_path / "checkpoint-1").iterdir())
    for limit in (10, sizes[len(sizes) // 2], sizes[-1] - 1):
        trainer = tiny_trainer(tmp_path, max_steps=2, **saved)
        with pytest.raises(
            OSError, match=r"checkpoint-2 cannot be written \(.*MB are free on its disk\)\. Make room and"
        ):
            with room_for(limit):
                trainer.train(resume_from_checkpoint=True)
        assert list(checkpoints(tmp_path)) == [1] and damage(tmp_path / "checkpoint-1") is None
    finished = tiny_trainer(tmp_path, max_steps=2, **saved)
    finished.train(resume_from_checkpoint=True)
    assert damage(tmp_path / "checkpoint-2") is None
    with pytest.raises(OSError, match=r"cannot be written .* Make room, then save again"), room_for(10):
        finished.save_model()


@pytest.mark.parametrize(
    "error, of_the_disk",
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EROFS, "Read-only file system"), True),
        (OSError(errno.ENOENT, "No such file or directory"), False),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), True),
        (ValueError("a bad value"), False),
    ],
)
def test_other_errors_are_left_alone(tmp_path, error, of_the_disk):
    with pytest.raises(OSError if of_the_disk else type(error)) as caught:
        with disk.disk_errors_named(tmp_path / "checkpoint-1", "Make room."):
            raise error
    assert (caught.value is error) is not of_the_disk
    assert not of_the_disk or str(tmp_path / "checkpoint-1") in str(caught.value)
