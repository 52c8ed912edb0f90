# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Whatever the Hub does, a run ends well and its user is told; with the real client against a Hub in this process."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import hub_server
import pytest
from fixtures.runs import TRAINERS
from hub_server import Fault
from huggingface_hub import CommitInfo, HfApi, constants

from diffusers_diffdoctor.training import pushing
from diffusers_diffdoctor.training import trainer as trainer_module
from diffusers_diffdoctor.training.checkpoints import damage
from diffusers_diffdoctor.training.pushing import COPY, MOST_WAITING, NOT_UPLOADED, HubError, Pusher, remove_copies


TESTS = Path(__file__).parents[1]
CREATE, COMMIT, UPLOAD, PREUPLOAD = "POST /api/repos/create", "POST .*/commit/", "PUT /storage/", "POST .*/preupload/"


@pytest.fixture
def hub(monkeypatch):
    with hub_server.serve() as hub:
        HfApi(endpoint=hub.endpoint, token=hub_server.TOKEN).create_repo("user/lora")
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # the Hub here is the test's own
        yield hub


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(pushing.logger, "warning", lines.append)
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


def push(uploads, folder, message="a step", **options):
    return uploads.push(folder, message, ignored=NOT_UPLOADED, changing=True, **options)


def wait_for(condition, what):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def test_pushes_arrive_in_order_without_what_is_private(hub, said, folder):
    uploads = pusher()
    futures = []
    for number in range(3):
        (folder / "step.txt").write_text(str(number))
        futures.append(push(uploads, folder, f"step {number}", every=True))
    uploads.push(folder / "checkpoint-1", "checkpoint", path_in_repo="last-checkpoint")
    assert uploads.folders == [str(folder / "checkpoint-1")]
    assert uploads.finish() == [] and said == [] and not uploads.is_busy and uploads.folders == []
    files = hub.files("user/lora")
    assert sorted(files) == ["README.md", "last-checkpoint/optimizer.pt", "step.txt", "weights.safetensors"]
    # each with the content of its time, though the folder had changed when it was uploaded
    seen = [hub.files("user/lora", future.result().oid)["step.txt"] for future in futures]
    assert seen == [b"0", b"1", b"2"]
    assert isinstance(futures[0].result(), CommitInfo) and futures[0].result().commit_message == "step 0"
    assert not list(folder.glob("*.unfinished")) and not list(folder.glob(".*.unfinished"))


STAYS = [(place, kind) for kind in (401, 403, 429, 500, "reset") for place in (COMMIT, UPLOAD, PREUPLOAD)]
QUICK = [(COMMIT, 401), (UPLOAD, 500), (PREUPLOAD, "reset")]


@pytest.mark.parametrize(
    "place, kind", [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in STAYS]
)
def test_a_fault_that_stays_is_told_with_a_command(hub, said, folder, place, kind):
    hub.faults.append(Fault(place, kind))
    uploads = pusher(attempts=2)
    future = push(uploads, folder)
    (command,) = uploads.finish()
    assert future.result() is None
    assert shlex.split(command)[:4] == ["hf", "upload", "user/lora", str(folder)]
    # the storage may refuse an address that has expired
    tries = 1 if kind in (401, 403) and place != UPLOAD else 2
    assert [line.startswith(f"The push of {folder} to user/lora failed: ") for line in said[:-1]] == [True] * tries
    assert sum(" -> " in request for request in hub.requests) == tries, "the client tries again by itself"
    assert command in said[-1] and "All of it lies here" in said[-1]
    assert isinstance(kind, str) or all(f"{kind}" in line for line in said)


@pytest.mark.parametrize("kind", [503, "reset", "silence"])
@pytest.mark.parametrize("place", [COMMIT, UPLOAD], ids=["commit", "upload"])
def test_a_fault_that_passes_costs_a_line(hub, said, folder, place, kind):
    hub.faults.append(Fault(place, kind, times=1))
    uploads = pusher(silence=2)
    assert push(uploads, folder).result(timeout=60) is not None
    assert uploads.finish() == [] and ["Trying again in 0.01 seconds" in line for line in said] == [True]
    assert kind != "silence" or "no answer in 2 seconds" in said[0]
    assert hub.files("user/lora")["weights.safetensors"] == b"content of weights.safetensors"


def test_the_hub_says_how_long_to_wait(hub, said, folder):
    hub.faults.append(Fault(COMMIT, 429, times=1, retry_after=2))
    start = time.monotonic()
    assert push(pusher(), folder).result(timeout=60) is not None
    assert time.monotonic() - start > 2 and "Trying again in 2 seconds" in said[0]
    hub.faults.append(Fault(COMMIT, 429, retry_after=3600))
    uploads = pusher()
    assert push(uploads, folder).result(timeout=30) is None  # not after the minute that it may take
    assert len(uploads.finish()) == 1 and "to be asked again in 3600 seconds" in said[-1]


@pytest.mark.parametrize("place", [COMMIT, UPLOAD], ids=["commit", "upload"])
def test_silence_is_waited_for_so_long_and_then_told(hub, said, folder, place):
    hub.faults.append(Fault(place, "silence"))
    uploads = pusher(patience=60)
    first = push(uploads, folder)
    wait_for(lambda: any("silence" in request for request in hub.requests), "the upload has not begun")
    start = time.monotonic()
    second = push(uploads, folder)
    checkpoint = uploads.push(folder / "checkpoint-1", "checkpoint", path_in_repo="last-checkpoint")
    assert len(uploads.finish(patience=0.5)) == 2 and time.monotonic() - start < 10
    assert "given up after 0.5 seconds; the Hub had not answered" in said[-1] and "behind others" in said[-1]
    assert first.result(0) is None and second.result(0) is None and checkpoint.result(0) is None
    assert not uploads.is_busy and not list(folder.glob(".*.unfinished"))
    hub.faults.clear()
    assert push(uploads, folder).result(timeout=60) is not None  # nothing is in the way


def test_a_push_may_take_so_long(hub, said, folder):
    hub.faults.append(Fault(COMMIT, "silence"))
    uploads = pusher(patience=3)
    assert push(uploads, folder).result(timeout=30) is None
    assert said == [f"The push of {folder} to user/lora failed: no answer in 3 seconds."]
    assert len(uploads.finish()) == 1


def test_what_waits_makes_way_for_a_later_state_of_the_same(hub, said, folder):
    hub.faults.append(Fault(COMMIT, 503, times=1))
    uploads = pusher(pause=2)
    first = push(uploads, folder)
    wait_for(lambda: said, "the first attempt has not failed")
    futures = [push(uploads, folder), push(uploads, folder, path_in_repo="elsewhere"), push(uploads, folder)]
    assert uploads.finish() == []
    assert [future.result() is not None for future in [first, *futures]] == [True, False, True, True]


def test_not_more_than_so_many_wait(hub, said, folder):
    hub.faults.append(Fault(COMMIT, "silence"))
    uploads = pusher()
    futures = [push(uploads, folder)]
    wait_for(lambda: any("silence" in request for request in hub.requests), "the upload has not begun")
    futures += [push(uploads, folder, path_in_repo=f"step-{i}", every=True) for i in range(MOST_WAITING + 1)]
    assert [future.done() for future in futures] == [False, True] + [False] * MOST_WAITING
    assert len(uploads.finish(patience=0)) == MOST_WAITING + 2
    assert f"{MOST_WAITING} later pushes waited as well" in said[-1]


def test_what_arrives_later_is_not_told(hub, said, folder):
    hub.faults.append(Fault(COMMIT, 401))
    uploads = pusher()
    assert push(uploads, folder).result(timeout=60) is None
    hub.faults.clear()
    assert push(uploads, folder).result(timeout=60) is not None
    assert uploads.finish() == [] and len(said) == 1


def test_a_branch_that_does_not_exist_is_told_and_made_by_the_command(hub, said, folder):
    uploads = pusher()
    assert push(uploads, folder, revision="next").result(timeout=60) is None
    (command,) = uploads.finish()
    assert "HTTP status 404, Invalid rev id: next" in said[0]
    repeat(hub, folder.parent, command)
    assert "weights.safetensors" in hub.files("user/lora", "next") and not hub.files("user/lora")
    assert push(uploads, folder, revision="next").result(timeout=60) is not None


def test_what_cannot_be_read_is_told_at_once(hub, said, tmp_path):
    uploads = pusher()
    assert uploads.push(tmp_path / "nowhere", "a step").result(timeout=60) is None
    assert len(uploads.finish()) == 1 and "nowhere" in said[0] and "not a directory" in said[0]


def test_a_full_disk_takes_no_copy_and_the_folder_itself_is_uploaded(hub, said, folder, monkeypatch):
    def full(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pushing.shutil, "copyfile", full)
    assert push(pusher(), folder).result(timeout=60) is not None
    assert "without being copied first ([Errno 28] No space left on device)" in said[0]
    assert sorted(hub.files("user/lora")) == ["README.md", "weights.safetensors"]


def test_copies_of_a_process_that_was_killed_are_removed(folder):
    left = folder / f"{COPY[0]}abc{COPY[1]}"
    left.mkdir()
    (left / "weights.safetensors").write_bytes(b"")
    remove_copies(folder)
    assert not left.exists() and (folder / "weights.safetensors").exists()


def test_repositories_are_created_or_refused(hub, said):
    uploads = Pusher("fresh", hub_server.TOKEN, private=True)
    assert uploads.create() == "user/fresh" and "user/fresh" in hub.branches
    assert uploads.command("out").endswith("user/fresh out . --private")
    assert uploads.create() == "user/fresh"  # which is there
    for name, token, why in [
        ("user/other", "hf_wrong", "HTTP status 401, Invalid credentials in Authorization header"),
        ("somebody/other", hub_server.TOKEN, "HTTP status 403"),
        ("a//b", hub_server.TOKEN, "Repo id must"),
    ]:
        with pytest.raises(HubError, match=why) as refused:
            Pusher(name, token).create()
        assert not refused.value.may_pass
    hub.faults.append(Fault(CREATE, "silence"))
    with pytest.raises(HubError, match="no answer in 2 seconds") as refused:
        pusher().create(patience=2)
    assert refused.value.may_pass


# several files travel in threads of the client's, which Python joins at the end of a process
HANGING = """
import json, os, sys
from pathlib import Path
from diffusers_diffdoctor.training.pushing import Pusher

Path("out").mkdir()
for i in range(3):
    Path(f"out/{i}.safetensors").write_bytes(bytes([i] * 1000))
pusher = Pusher("user/lora", os.environ["HF_TOKEN"])
pusher.push("out", "a step")
sys.stdin.readline()
print(json.dumps(pusher._process.pid), flush=True)
if sys.argv[1] == "waits":
    pusher.finish(patience=0.1)
else:
    os._exit(3)
"""


@pytest.mark.parametrize("end", ["waits", "dies"])
def test_an_upload_that_hangs_ends_with_its_process(hub, tmp_path, end):
    hub.faults.append(Fault(UPLOAD, "silence"))
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING, end],
        cwd=tmp_path,
        env=environment(hub, tmp_path),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: sum("silence" in request for request in hub.requests) == 3, "the uploads have not begun")
    out, err = process.communicate("go\n", timeout=60)
    assert process.returncode == (0 if end == "waits" else 3), err
    assert ("hf upload user/lora out ." in err) == (end == "waits")
    status = Path(f"/proc/{json.loads(out)}/stat")
    if Path("/proc/self/stat").exists():
        wait_for(lambda: not status.exists() or ") Z " in status.read_text(), "the upload's process goes on")


# --- both trainers, in processes of their own ----------------------------------------------------------------------------------------

CODE = """
import os, sys
from fixtures.runs import TRAINERS
trainer = TRAINERS[sys.argv[1]]("run", push_to_hub=True, hub_model_id="user/run", hub_strategy="checkpoint", max_steps=2,
    save_steps=1, hub_token=os.environ["HF_TOKEN"], push_timeout=float(sys.argv[2]))
trainer.pusher.attempts, trainer.pusher.pause = 2, 0.01
trainer.train()
trainer.save_model()
print("RESULT", trainer.push_to_hub())
"""


def environment(hub, folder):
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
        "OMP_NUM_THREADS": "1",
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": hub_server.TOKEN,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }


def run_process(hub, folder, command):
    return subprocess.run(
        command, cwd=folder, env=environment(hub, folder), capture_output=True, text=True, timeout=300
    )


def commands(text):
    return {line.strip() for line in text.splitlines() if line.strip().startswith("hf upload ")}


def repeat(hub, folder, command):
    """What a user does: the line that was told, as it stands."""
    hf = Path(sys.executable).with_name("hf")
    assert hf.exists(), "the client's command is installed with it"
    done = run_process(hub, folder, [str(hf), *shlex.split(command)[1:]])
    assert done.returncode == 0, done.stderr[-2000:]


WEIGHTS = {"treatment": "pytorch_lora_weights.safetensors", "detector": "model.safetensors"}
# each fault at each place, by the two trainers in turn: what pushes is one for both
PLACES = [(place, fault) for place in (COMMIT, UPLOAD) for fault in (500, 401, 429, "reset", "silence")]
GRID = [(list(WEIGHTS)[number % 2], *where) for number, where in enumerate(PLACES)]


def in_short(cases, quick):
    return [
        pytest.param(
            *case, marks=[] if case in quick else pytest.mark.slow, id="-".join(_named(part) for part in case)
        )
        for case in cases
    ]


def _named(part):
    return {COMMIT: "commit", UPLOAD: "upload"}.get(part, str(part))


def assert_all_arrived(files, folder, kind):
    weights = WEIGHTS[kind]
    assert files[weights] == (folder / "run" / weights).read_bytes() and "README.md" in files
    last = folder / "run/checkpoint-2"
    names = {path.name for path in last.iterdir()}
    assert {name.partition("/")[2] for name in files if name.startswith("last-checkpoint/")} == names
    assert all(files[f"last-checkpoint/{name}"] == (last / name).read_bytes() for name in names)
    private = ("checkpoint-", ".diffdoctor", ".push")
    assert not [name for name in files if name.startswith(private) or name.endswith("training_args.bin")]
    assert not [name for name in files if hub_server.TOKEN.encode() in files[name]]
    assert not list((folder / "run").glob(".push*"))


@pytest.mark.parametrize("kind, place, fault", in_short(GRID, {GRID[3], GRID[4]}))
def test_training_ends_well_and_its_user_is_told(tmp_path, kind, place, fault):
    with hub_server.serve() as hub:
        hub.faults.append(Fault(place, fault))
        done = run_process(hub, tmp_path, [sys.executable, "-c", CODE, kind, "3" if fault == "silence" else "100"])
        assert done.returncode == 0, done.stderr[-4000:]
        assert "RESULT None" in done.stdout and "Traceback" not in done.stderr
        assert "Not everything arrived on the Hub" in done.stderr
        assert (tmp_path / "run" / WEIGHTS[kind]).is_file() and damage(tmp_path / "run/checkpoint-2") is None
        assert WEIGHTS[kind] not in hub.files("user/run")
        hub.faults.clear()
        told = commands(done.stderr)
        assert [command.split()[3] for command in sorted(told, key=len)] == ["run/checkpoint-2", "run"]
        for command in told:
            repeat(hub, tmp_path, command)
        assert_all_arrived(hub.files("user/run"), tmp_path, kind)


@pytest.mark.parametrize("kind, place, fault", in_short([case for case in GRID if case[2] != 401], {GRID[5]}))
def test_a_fault_that_passes_is_all_the_same_in_the_end(tmp_path, kind, place, fault):
    with hub_server.serve() as hub:
        hub.faults.append(Fault(place, fault, times=1))
        code = CODE.replace("trainer.train()", "trainer.pusher.silence = 2\ntrainer.train()")
        done = run_process(hub, tmp_path, [sys.executable, "-c", code, kind, "100"])
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stderr.count("Trying again in 0.01 seconds") == 1 and not commands(done.stderr)
        (commit,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        assert hub.branches["user/run"]["main"] in commit
        assert_all_arrived(hub.files("user/run"), tmp_path, kind)


def test_a_repository_that_cannot_be_had_is_said_before_training(tmp_path):
    with hub_server.serve() as hub:
        hub.faults.append(Fault(CREATE, 401))
        done = run_process(hub, tmp_path, [sys.executable, "-c", CODE, "detector", "100"])
    assert done.returncode == 1 and "RESULT" not in done.stdout
    assert done.stderr.splitlines()[-1] == (
        "ValueError: `push_to_hub`: 'user/run' cannot be created or found on the Hub: HTTP status 401, A fault of the test, "
        "401. Log in with `hf auth login`, pass a `hub_token` that may write there, or another `hub_model_id`."
    )


def test_a_push_that_nobody_prepared_does_not_fail_either(hub, said, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module.logger, "warning", said.append)
    settings = {"hub_model_id": "user/fresh", "hub_token": hub_server.TOKEN, "hub_private_repo": True}
    trainer = TRAINERS["detector"](tmp_path / "run", **settings)
    hub.faults.append(Fault(CREATE, 401))
    assert trainer.push_to_hub() is None
    (line,) = said
    assert "`hf auth login`" in line and "--private" in line
    assert {"README.md", "model.safetensors"} <= {path.name for path in (tmp_path / "run").iterdir()}
    hub.faults.clear()
    repeat(hub, tmp_path, line[line.index("hf upload ") :])
    assert hub.files("user/fresh")["model.safetensors"] == (tmp_path / "run/model.safetensors").read_bytes()
    assert isinstance(trainer.push_to_hub(), CommitInfo)
    assert trainer.push_to_hub(blocking=False).result(timeout=60).oid


STOPPED = """
import os, signal
from transformers import TrainerCallback
from fixtures.runs import TRAINERS
from diffusers_diffdoctor.training import trainer as module

class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)

module.EARLY_END = 0.5
trainer = TRAINERS["detector"]("run", push_to_hub=True, hub_model_id="user/run", hub_strategy="all_checkpoints",
    hub_token=os.environ["HF_TOKEN"])
trainer.add_callback(Stop())
trainer.train()
"""


def test_a_run_that_is_stopped_tells_what_did_not_arrive(tmp_path):
    with hub_server.serve() as hub:
        hub.faults.append(Fault(COMMIT, "silence"))
        done = run_process(hub, tmp_path, [sys.executable, "-c", STOPPED])
        assert done.returncode == 128 + 15, done.stderr[-4000:]
        assert damage(tmp_path / "run/checkpoint-1") is None and "given up after 0.5 seconds" in done.stderr
        hub.faults.clear()
        for command in commands(done.stderr):
            repeat(hub, tmp_path, command)
        assert {"model.safetensors", "checkpoint-1/model.safetensors"} <= set(hub.files("user/run"))


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
