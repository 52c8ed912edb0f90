# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""One output folder, one run; an orderly stop; the state in files. With both trainers where they could differ."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from fixtures.runs import TRAINERS, state_of
from fixtures.trainer import assert_same, tiny_trainer
from transformers import TrainerCallback

from diffusers_diffdoctor.files import only_run
from diffusers_diffdoctor.training.checkpoints import checkpoints, damage


TESTS = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "OMP_NUM_THREADS": "1"}
both = pytest.mark.parametrize("kind", list(TRAINERS))


class At(TrainerCallback):
    """Calls `act` when step `step` begins."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.act()


def trainer_of(kind, folder, act=None, step=3, **changes):
    trainer = TRAINERS[kind](folder, overwrite_output_dir=False, **{"max_steps": 5, "save_steps": 2} | changes)
    if act is not None:
        trainer.add_callback(At(step, act))
    return trainer


def lines_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.fixture(autouse=True)
def sigint_is_heard():
    """A shell lets its background jobs ignore it, and tests may be one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# --- stopping --------------------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("number, raised", [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_saves_a_checkpoint_and_the_run_goes_on_from_there(tmp_path, kind, number, raised):
    before = signal.getsignal(number)
    whole = trainer_of(kind, tmp_path / "whole")
    whole.train()
    stopped = trainer_of(kind, tmp_path / "run", lambda: signal.raise_signal(number))
    with pytest.raises(raised):
        stopped.train()
    assert signal.getsignal(number) == before
    assert list(checkpoints(tmp_path / "run")) == [2, 3] and damage(tmp_path / "run/checkpoint-3") is None
    resumed = trainer_of(kind, tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)
    assert_same(state_of(whole), state_of(resumed))
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "whole")


def test_a_second_signal_ends_at_once(tmp_path):
    reached = []

    def twice():
        signal.raise_signal(signal.SIGINT)
        reached.append("the first is kept")
        signal.raise_signal(signal.SIGINT)
        reached.append("never")

    with pytest.raises(KeyboardInterrupt):
        trainer_of("detector", tmp_path, twice).train()
    assert reached == ["the first is kept"] and list(checkpoints(tmp_path)) == [2]


def test_the_grace_ends_a_step_that_takes_longer(tmp_path):
    def slow():
        signal.raise_signal(signal.SIGINT)
        time.sleep(60)

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        trainer_of("detector", tmp_path, slow, stop_grace=0.2).train()
    assert time.monotonic() - start < 30 and list(checkpoints(tmp_path)) == [2]
    with pytest.raises(ValueError, match="`stop_grace` is -1"):
        trainer_of("detector", tmp_path, stop_grace=-1)


def test_a_signal_that_is_ignored_stays_so(tmp_path):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trainer = trainer_of("detector", tmp_path, lambda: signal.raise_signal(signal.SIGINT))
    trainer.train()
    assert trainer.state.global_step == 5 and signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_training_in_a_thread_leaves_signals_alone(tmp_path):
    before, trainer = signal.getsignal(signal.SIGTERM), trainer_of("detector", tmp_path, max_steps=1)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 1 and signal.getsignal(signal.SIGTERM) == before


def test_a_process_that_gets_sigterm_ends_with_its_status(tmp_path):
    code = (
        "import os, signal, sys; from fixtures.runs import TRAINERS; from transformers import TrainerCallback\n"
        "class Kill(TrainerCallback):\n"
        "    def on_step_begin(self, args, state, control, **kwargs):\n"
        "        if state.global_step == 2: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"trainer = TRAINERS['detector']({str(tmp_path)!r}, max_steps=9)\n"
        "trainer.add_callback(Kill()); trainer.train(); print('never')"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr[-2000:]
    assert "never" not in done.stdout and "Stopped at step 3. Resume from there" in done.stderr
    assert "Traceback" not in done.stderr and damage(tmp_path / "checkpoint-3") is None


# --- one folder, one run ---------------------------------------------------------------------------------------------------------


@both
def test_a_new_run_into_a_used_folder_is_refused_and_changes_nothing(tmp_path, kind):
    trainer_of(kind, tmp_path, save_steps=1, max_steps=3).train()
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "notes").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(
        ValueError, match=r"`output_dir` is .* holds an earlier run \(checkpoint-1.*overwrite_output_dir"
    ):
        trainer_of(kind, tmp_path, max_steps=1).train()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    TRAINERS[kind](tmp_path, max_steps=1, save_steps=1, overwrite_output_dir=True).train()
    assert list(checkpoints(tmp_path)) == [1] and (tmp_path / "README.md").read_text() == "mine"
    assert [line["step"] for line in lines_of(tmp_path)] == [1] and (tmp_path / "notes").is_dir()


@both
def test_resuming_before_the_end_of_a_longer_run_is_refused_or_cuts_it(tmp_path, kind):
    trainer_of(kind, tmp_path, save_steps=1, max_steps=4).train()
    early = str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=r"holds a run that went on after step 2 \(checkpoint-3, checkpoint-4\)"):
        trainer_of(kind, tmp_path, save_steps=1, max_steps=3).train(resume_from_checkpoint=early)
    assert list(checkpoints(tmp_path)) == [1, 2, 3, 4]
    TRAINERS[kind](tmp_path, save_steps=1, max_steps=3, overwrite_output_dir=True).train(resume_from_checkpoint=early)
    assert list(checkpoints(tmp_path)) == [1, 2, 3] and [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3]


@both
def test_auto_begins_resumes_and_clears_what_a_kill_left(tmp_path, kind):
    trainer_of(kind, tmp_path, max_steps=2).train(resume_from_checkpoint="auto")
    (tmp_path / "checkpoint-2/optimizer.pt").unlink()  # killed before the first whole checkpoint
    trainer_of(kind, tmp_path, max_steps=2).train(resume_from_checkpoint="auto")
    assert damage(tmp_path / "checkpoint-2") is None and [line["step"] for line in lines_of(tmp_path)] == [1, 2]
    trainer = trainer_of(kind, tmp_path, max_steps=3)
    trainer.train(resume_from_checkpoint="auto")
    assert trainer._resumed["step"] == 2
    trainer.save_model()
    for folder in checkpoints(tmp_path).values():
        (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="holds an earlier run"):  # the weights of a run that ended well
        trainer_of(kind, tmp_path).train(resume_from_checkpoint="auto")


def test_the_other_process_is_named(tmp_path):
    code = f"import sys; from diffusers_diffdoctor.files import only_run\nwith only_run({str(tmp_path)!r}): print('has it', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", code], env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "has it\n"
        with pytest.raises(RuntimeError, match=rf"in use by process {other.pid} on .*Wait until it has ended"):
            tiny_trainer(tmp_path).train()
    finally:
        other.kill()
        other.wait()
    with only_run(tmp_path), only_run(f"{tmp_path}/../{tmp_path.name}"):  # freed by the kill; one process may nest
        pass
    with only_run(tmp_path):
        pass


def test_evaluating_first_does_not_count_as_another_run(tmp_path):
    trainer = trainer_of("detector", tmp_path, max_steps=1)
    trainer.evaluate()
    trainer.train()
    keys = [set(json.loads(line)) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert "eval_loss" in keys[0] and "loss" in keys[1]


# --- what lies in files ----------------------------------------------------------------------------------------------------------


@both
def test_nothing_pickled_holds_the_arguments_and_no_path_lies_in_a_checkpoint(tmp_path, kind):
    folder = tmp_path / "a-private-folder"
    trainer = trainer_of(kind, folder, hub_token="hf_secret", save_steps=1, max_steps=2, load_best_model_at_end=True,
                         metric_for_best_model="eval_loss" if kind == "detector" else "max_confidence",
                         eval_strategy="steps", eval_steps=1)  # fmt: skip
    trainer.train()
    trainer.save_model()
    assert trainer.state.best_model_checkpoint is not None
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        assert path.name != "training_args.bin"
        assert b"hf_secret" not in path.read_bytes() and str(tmp_path).encode() not in path.read_bytes(), path


@both
def test_the_best_checkpoint_is_known_after_the_folder_moved(tmp_path, kind):
    metric = "eval_loss" if kind == "detector" else "max_confidence"
    settings = {"save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    settings |= {"metric_for_best_model": metric, "greater_is_better": False}
    trainer_of(kind, tmp_path / "run", max_steps=2, **settings).train()
    (tmp_path / "run").rename(tmp_path / "moved")
    resumed = trainer_of(kind, tmp_path / "moved", max_steps=3, **settings)
    resumed.train(resume_from_checkpoint=True)
    best = resumed.state.best_global_step
    assert resumed.state.best_model_checkpoint == str(tmp_path / f"moved/checkpoint-{best}")


def test_augmentation_goes_on_where_it_stopped(tmp_path):
    """In the middle of an epoch, whatever the loader has fetched ahead."""
    settings = {"augmentation": "strong", "max_steps": 5, "save_steps": 3}
    whole = TRAINERS["detector"](tmp_path / "run", **settings)
    whole.train()
    resumed = TRAINERS["detector"](tmp_path / "run", overwrite_output_dir=True, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-3"))
    assert_same(state_of(whole), state_of(resumed))
    plain = TRAINERS["detector"](tmp_path / "plain", **settings | {"augmentation": "none"})
    plain.train()
    assert any(not torch.equal(a, b) for a, b in zip(state_of(plain).values(), state_of(whole).values()))
