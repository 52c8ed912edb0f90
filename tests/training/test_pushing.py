# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Whatever the Hub does, a run ends well and its user is told; with the real client against a Hub in this process."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import hub_server
import pytest
from hub_server import Fault
from huggingface_hub import HfApi, constants

from diffusers_diffdoctor.training import pushing
from diffusers_diffdoctor.training.checkpoints import damage
from diffusers_diffdoctor.training.pushing import NOT_UPLOADED, Pusher


TESTS = Path(__file__).parents[1]
COMMIT, UPLOAD, PREUPLOAD = "POST .*/commit/", "PUT /storage/", "POST .*/preupload/"


@pytest.fixture
def hub(monkeypatch):
    with hub_server.serve() as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub_server.TOKEN)
        api.create_repo("user/lora")
        monkeypatch.setattr(pushing, "upload_folder", api.upload_folder)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(
            time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01))
        )  # of the client
        yield hub


@pytest.fixture
def said(monkeypatch, folder):
    lines = []
    # not what abandoned attempts of other tests say
    monkeypatch.setattr(pushing.logger, "warning", lambda line: lines.append(line) if str(folder) in line else None)
    return lines


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "out/checkpoint-1").mkdir(parents=True)
    for name in (
        "weights.safetensors",
        "README.md",
        ".diffdoctor.lock",
        "training_args.bin",
        "checkpoint-1/optimizer.pt",
    ):
        (tmp_path / "out" / name).write_bytes(b"content of " + name.encode())
    return tmp_path / "out"


def pusher(**changes):
    return Pusher("user/lora", hub_server.TOKEN, **{"pause": 0.01, "attempts": 3, "patience": 60} | changes)


def test_pushes_arrive_in_order_without_what_is_private(hub, said, folder):
    uploads = pusher()
    futures = []
    for number in range(3):
        (folder / "step.txt").write_text(str(number))
        futures.append(uploads.push(folder, f"step {number}", ignored=NOT_UPLOADED))
        futures[-1].result(timeout=60)
    uploads.push(folder / "checkpoint-1", "checkpoint", path_in_repo="last-checkpoint")
    assert uploads.finish() == [] and said == [] and not uploads.is_busy
    files = hub.files("user/lora")
    assert sorted(files) == ["README.md", "last-checkpoint/optimizer.pt", "step.txt", "weights.safetensors"]
    assert files["step.txt"] == b"2" and all(future.result().oid for future in futures)


# the client tries some of these again by itself
STAYS = [(place, kind) for kind in (401, 403, 429, 500, "reset") for place in (COMMIT, UPLOAD, PREUPLOAD)]


@pytest.mark.parametrize("place, kind", STAYS)
def test_a_fault_that_stays_is_told_with_a_command(hub, said, folder, place, kind):
    hub.faults.append(Fault(place, kind))
    uploads = pusher(attempts=2)
    future = uploads.push(folder, "step 1", ignored=NOT_UPLOADED)
    (command,) = uploads.finish()
    assert future.result() is None
    assert shlex.split(command)[:4] == ["hf", "upload", "user/lora", str(folder)]
    assert (
        command in said[-1]
        and "All of it lies here" in said[-1]
        and len(said) == (2 if kind in (401, 403) and place != UPLOAD else 3)
    )
    assert isinstance(kind, str) or f"{kind}" in said[-1]


@pytest.mark.parametrize("kind", [503, "reset"])
def test_a_fault_that_passes_costs_a_line(hub, said, folder, kind):
    hub.faults.append(Fault(COMMIT, kind, times=1))
    uploads = pusher()
    assert uploads.push(folder, "step 1", ignored=NOT_UPLOADED).result(timeout=60) is not None
    assert uploads.finish() == [] and all("Trying again in" in line for line in said)
    assert "weights.safetensors" in hub.files("user/lora")


@pytest.mark.parametrize("place", [COMMIT, UPLOAD], ids=["commit", "upload"])
def test_silence_is_waited_for_so_long_and_then_told(hub, said, folder, place):
    hub.faults.append(Fault(place, "silence"))
    uploads = pusher(patience=0.5)
    start = time.monotonic()
    uploads.push(folder, "step 1", ignored=NOT_UPLOADED)
    uploads.push(folder, "step 2", ignored=NOT_UPLOADED)
    assert len(uploads.finish()) == 1 and time.monotonic() - start < 10
    assert "0.5 seconds" in said[-1]


def test_what_arrives_later_is_not_told(hub, said, folder):
    hub.faults.append(Fault(COMMIT, 401))
    uploads = pusher()
    assert uploads.push(folder, "step 1", ignored=NOT_UPLOADED).result(timeout=60) is None
    hub.faults.clear()
    assert uploads.push(folder, "step 2", ignored=NOT_UPLOADED).result(timeout=60) is not None
    assert uploads.finish() == [] and len(said) == 1


# --- both trainers, in processes of their own ----------------------------------------------------------------------------------------

CODE = """
import os, sys, time
from fixtures.runs import TRAINERS
from diffusers_diffdoctor.training import pushing
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.01))  # the client tries again by itself, with pauses of up to 8 seconds
from diffusers_diffdoctor.training.checkpoints import damage
pushing.Pusher.__init__.__defaults__ = (None, 1800, 2, 0.01)
trainer = TRAINERS[sys.argv[1]]("run", push_to_hub=True, hub_model_id="user/run", hub_strategy="checkpoint", max_steps=2,
    save_steps=1, hub_token=os.environ["HF_TOKEN"], push_timeout=float(sys.argv[2]))
trainer.train()
trainer.save_model()
print("RESULT", trainer.push_to_hub())
"""


def run_process(hub, folder, command):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
        "OMP_NUM_THREADS": "1",
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": hub_server.TOKEN,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",  # the Hub here is the test's own
    }
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


GRID = [(place, kind) for place in (COMMIT, UPLOAD) for kind in (500, 401, 429, "reset", "silence")]


@pytest.mark.parametrize("kind", ["treatment", "detector"])
@pytest.mark.parametrize(
    "place, fault",
    [pytest.param(*case, marks=[] if case in GRID[3:5] else pytest.mark.slow) for case in GRID],
    ids=[f"{'commit' if place == COMMIT else 'upload'}-{fault}" for place, fault in GRID],
)
def test_training_ends_well_and_its_user_is_told(tmp_path, kind, place, fault):
    with hub_server.serve() as hub:
        hub.faults.append(Fault(place, fault))
        command = [sys.executable, "-c", CODE, kind, "3" if fault == "silence" else "100"]
        done = run_process(hub, tmp_path, command)
        assert done.returncode == 0, done.stderr[-4000:]
        assert "RESULT None" in done.stdout and "Traceback" not in done.stderr
        assert "Not everything arrived on the Hub" in done.stderr and "hf upload user/run run ." in done.stderr
        weights = "pytorch_lora_weights.safetensors" if kind == "treatment" else "model.safetensors"
        assert (tmp_path / "run" / weights).is_file() and (tmp_path / "run/checkpoint-2/manifest.json").is_file()
        assert weights not in hub.files("user/run")

        hub.faults.clear()  # and the command that was told, as it stands, repeats the push
        (line,) = {
            line.strip() for line in done.stderr.splitlines() if line.strip().startswith("hf upload user/run run .")
        }
        assert shutil.which("hf", path=os.path.dirname(sys.executable)), "the client's command is installed with it"
        again = run_process(hub, tmp_path, [str(Path(sys.executable).with_name("hf")), *shlex.split(line)[1:]])
        assert again.returncode == 0, again.stderr[-2000:]
        files = hub.files("user/run")
    assert files[weights] == (tmp_path / "run" / weights).read_bytes() and "README.md" in files
    assert not [name for name in files if name.startswith(("checkpoint-", ".diffdoctor")) or name.endswith(".bin")]
    assert not [name for name in files if hub_server.TOKEN.encode() in files[name]]


def test_a_repository_that_cannot_be_had_is_said_before_training(tmp_path):
    with hub_server.serve() as hub:
        hub.faults.append(Fault("POST /api/repos/create", 401))
        done = run_process(hub, tmp_path, [sys.executable, "-c", CODE, "detector", "100"])
    assert done.returncode == 1
    assert (
        "`push_to_hub`: 'user/run' cannot be created or found on the Hub: HTTP status 401"
        in done.stderr.replace("Client error ", "HTTP status ")
        or "401" in done.stderr
    )
    assert "`hf auth login`, pass a `hub_token`" in done.stderr and "RESULT" not in done.stdout


EVERY = """
import os
from fixtures.runs import TRAINERS

TRAINERS["treatment"]("run", push_to_hub=True, hub_model_id="user/run", hub_strategy="checkpoint", hub_always_push=True,
    hub_token=os.environ["HF_TOKEN"], save_steps=1, save_total_limit=1, max_steps=2).train()
"""


def test_every_save_is_pushed_whole(tmp_path):
    with hub_server.serve() as hub:
        done = run_process(hub, tmp_path, [sys.executable, "-c", EVERY])
        assert done.returncode == 0, done.stderr[-4000:]
        files = hub.files("user/run")
    lora = (tmp_path / "run/checkpoint-2/pytorch_lora_weights.safetensors").read_bytes()
    assert files["pytorch_lora_weights.safetensors"] == lora
    last = {name.partition("/")[2]: content for name, content in files.items() if name.startswith("last-checkpoint/")}
    assert {"README.md", "metrics.jsonl"} <= set(files) and "live_lora_weights.safetensors" not in files
    for name, content in last.items():
        (tmp_path / "back" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "back" / name).write_bytes(content)
    assert damage(tmp_path / "back") is None  # as one that was never on the way
    assert not [name for name in files if hub_server.TOKEN.encode() in files[name]]
    assert not [name for name in files if name.startswith(("checkpoint-", "_")) or name.endswith("training_args.bin")]
