# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Kills both trainers and damages their checkpoints: does every run end as one that nothing happened to, bit for bit?

A killed run is started again with `resume_from_checkpoint="auto"`, killed again, and so on; at last it may end. Compared are the
files of the last checkpoint, bit for bit (weights, their average, optimizer, schedule, random numbers), and the log. Every second kill is aimed at a save, by
SIGKILL at a random moment after it began; the others come at random moments of the run. A damaged checkpoint is resumed from by
its path, which must be refused by its name with a remedy, and by `True`, which must say what is wrong, fall back and end the same.

Each cell (a trainer with a seed, a trainer with one damage) is a file of results; a stopped benchmark goes on where it was.

    python benchmarks/faults.py                          # what docs/source/reliability.md reports
    python benchmarks/faults.py --kills 6 --damages 3    # a few of each

The processes are forks of this one, which has imported everything: a kill costs a run of seconds, not an import.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # the trainers at their smallest

from fixtures.runs import TRAINERS  # noqa: E402

from diffusers_diffdoctor.files import write_atomically  # noqa: E402
from diffusers_diffdoctor.training import checkpoints as checkpoints_module  # noqa: E402


KILLS_PER_RUN = 5
SETTINGS = {"max_steps": 6, "save_steps": 1, "save_total_limit": 2}
LAST = "checkpoint-6"
# they hold times, or the digests of the others
NOT_COMPARED = ("trainer_state.json", "manifest.json")

# what can happen to a file of a checkpoint: its content, and that of the same file of the checkpoint before -> its content, or
# None where it is gone
DAMAGES: dict[str, Callable[[bytes, bytes], bytes | None]] = {
    "missing": lambda content, before: None,
    "empty": lambda content, before: b"",
    "half": lambda content, before: content[: len(content) // 2],
    "without its end": lambda content, before: content[:-2],
    "with a byte more": lambda content, before: content + b"x",
    "zeros": lambda content, before: bytes(len(content)),
    "garbage": lambda content, before: random.Random(0).randbytes(len(content)),
    "a bit turned": lambda content, before: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    "of an earlier step": lambda content, before: before,
    "of another program": lambda content, before: b"<html><body>404 Not Found</body></html>\n",
}


def in_a_fork(work: Callable[..., object], *args) -> tuple[int, object]:
    """Runs `work(*args)` in a process of its own; (exit status, what it returned, as JSON)."""

    def answer_with(tell: Callable[[bytes], object]) -> None:
        try:
            tell(json.dumps(work(*args)).encode())
        except BaseException as error:
            tell(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
            raise

    child, pipe = forked(answer_with)
    with pipe:
        answer = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), json.loads(answer or b"null")


def forked(work: Callable[[Callable[[bytes], object]], object]) -> tuple[int, BinaryIO]:
    """Begins `work(tell)` in a process of its own, without output; its number, and the pipe in which arrives what it tells."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            work(lambda said: os.write(writing, said))
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    return child, os.fdopen(reading, "rb", buffering=0)


def finish(kind: str, folder: Path, resume: str | bool | None = None) -> str:
    """Train to the end."""
    TRAINERS[kind](folder, **SETTINGS).train(resume_from_checkpoint=resume)
    return "ended"


def has_ended(folder: Path) -> bool:
    return checkpoints_module.damage(folder / LAST) is None


def log_of(folder: Path) -> list[dict]:
    """The lines of training; those with times differ from run to run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def content_of(path: Path) -> bytes | dict:
    """The bytes; of safetensors those of each tensor, and the metadata, which come in any order."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        return {"metadata": file.metadata()} | {name: value.numpy().tobytes() for name, value in tensors.items()}


def difference(folder: Path, reference: Path) -> str | None:
    """The first thing in which two runs that ended differ."""
    files = sorted(path.name for path in (reference / LAST).iterdir())
    for name in files:
        one, two = (path / LAST / name for path in (folder, reference))
        if not one.is_file():
            return f"{name} is missing"
        if name not in NOT_COMPARED and content_of(one) != content_of(two):
            return name
    return None if log_of(folder) == log_of(reference) else "the log"


# --- kills -----------------------------------------------------------------------------------------------------------------------


def killed(kind: str, folder: Path, in_save: bool, wait: float) -> dict:
    """Start the run, and kill it `wait` seconds after it, or one of its saves, began: whether it was in a save, or had ended."""

    def run(tell: Callable[[bytes], object]) -> None:
        trainer = TRAINERS[kind](folder, **SETTINGS)
        save = trainer._save_checkpoint

        def announced(*args):
            tell(b"(")
            save(*args)
            tell(b")")

        trainer._save_checkpoint = announced
        trainer.train(resume_from_checkpoint="auto")

    start = time.monotonic()
    child, pipe = forked(run)
    with pipe:
        if in_save:
            for _ in range(random.randrange(1, 4)):  # not always the first save of a start
                while (mark := pipe.read(1)) == b")":
                    pass
                if not mark:
                    break
        time.sleep(max(0.0, wait if in_save else start + wait - time.monotonic()))
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        marks = pipe.read()
    # what was read before is an opening bracket, if it was aimed at a save
    marks = (b"(" if in_save else b"") + (marks or b"")
    return {"killed": status == -signal.SIGKILL, "in_save": marks.endswith(b"("), "failed": status == 1}


def kill_cell(kind: str, seed: int, reference: Path, seconds: dict[str, float]) -> dict:
    random.seed(f"{kind} {seed}")
    kills = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "run")
        for number in range(KILLS_PER_RUN):
            in_save = number % 2 == seed % 2
            wait = random.uniform(0, seconds["save" if in_save else "run"])
            kills.append(killed(kind, folder, in_save, wait))
            if has_ended(folder):
                break
        status, answer = in_a_fork(finish, kind, folder, "auto")
        differs = difference(folder, reference) if status == 0 else f"it did not end: {answer}"
    return {
        "kind": kind,
        "seed": seed,
        "kills": sum(kill["killed"] for kill in kills),
        "in_a_save": sum(kill["killed"] and kill["in_save"] for kill in kills),
        "failed_starts": sum(kill["failed"] for kill in kills),
        "differs": differs,
    }


# --- damages ---------------------------------------------------------------------------------------------------------------------


def damages(checkpoint: Path) -> list[tuple[str, str]]:
    """(file, what happens to it), in an order that has all files and all ways early."""
    files = sorted(path.name for path in checkpoint.iterdir())
    ways = list(DAMAGES)
    return [(files[i % len(files)], ways[(i + i // len(files)) % len(ways)]) for i in range(len(files) * len(ways))]


def damage_cell(kind: str, file: str, way: str, stopped: Path, reference: Path) -> dict:
    """`stopped` holds a run that was stopped at checkpoint 3."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "run")
        shutil.copytree(stopped, folder)
        last, before = folder / "checkpoint-3" / file, folder / "checkpoint-2" / file
        content = DAMAGES[way](last.read_bytes(), before.read_bytes())
        if content == last.read_bytes():
            return {"kind": kind, "file": file, "way": way, "named": True, "differs": None, "same_content": True}
        last.unlink()
        if content is not None:
            last.write_bytes(content)

        def refused() -> str:
            try:
                TRAINERS[kind](folder, **SETTINGS).train(resume_from_checkpoint=str(folder / "checkpoint-3"))
            except ValueError as error:
                return str(error)
            return "it was not refused"

        def falls_back() -> list[str]:
            said: list[str] = []
            checkpoints_module.logger.warning = said.append
            finish(kind, folder, True)
            return said

        _, message = in_a_fork(refused)
        status, said = in_a_fork(falls_back)
        texts = str(message), " ".join(said or [])
        # a whole manifest of another checkpoint blames the files, and nothing could know better
        name = "its " if (file, way) == ("manifest.json", "of an earlier step") else file
        named = all("checkpoint-3" in text and name in text for text in texts)
        remedy = "Resume from the one before" in str(message)
        differs = difference(folder, reference) if status == 0 else f"it did not end: {said}"
    return {
        "kind": kind,
        "file": file,
        "way": way,
        "named": named and remedy,
        "differs": differs,
        "message": str(message).replace(f"{scratch}/", ""),
    }


# --- the table -------------------------------------------------------------------------------------------------------------------


def cached(path: Path, work: Callable[..., dict], *args) -> dict:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(work(*args), indent=2) + "\n")
    return json.loads(path.read_text(encoding="utf-8"))


def stop_at_three(kind: str, folder: Path) -> str:
    trainer = TRAINERS[kind](folder, **SETTINGS)
    save = trainer._save_checkpoint

    def stopped(*args):
        save(*args)
        if trainer.state.global_step == 3:
            raise KeyboardInterrupt

    trainer._save_checkpoint = stopped
    try:
        trainer.train()
    except KeyboardInterrupt:
        return "stopped"
    return "not stopped"


def durations(kind: str, folder: Path) -> dict[str, float]:
    """Seconds of a run with its start, and of one save in it."""
    start, saves = time.monotonic(), []
    trainer = TRAINERS[kind](folder, **SETTINGS)
    save = trainer._save_checkpoint

    def timed(*args):
        begin = time.monotonic()
        save(*args)
        saves.append(time.monotonic() - begin)

    trainer._save_checkpoint = timed
    trainer.train()
    return {"run": time.monotonic() - start, "save": max(saves)}


def main(argv: list[str] | None = None) -> dict[str, list[dict]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=160, help="of each trainer (default: %(default)s)")
    parser.add_argument("--damages", type=int, default=90, help="of each trainer (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/faults", help="for the cells")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # a process with threads cannot fork
    cells: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for kind in TRAINERS:
            # records hold the name of the folder
            reference, stopped = Path(scratch, kind, "run"), Path(scratch, f"{kind}-stopped", "run")
            for work, folder in ((finish, reference), (stop_at_three, stopped)):
                status, answer = in_a_fork(work, kind, folder)
                if status:
                    raise SystemExit(f"The reference run of {kind} failed: {answer}")
            _, seconds = in_a_fork(durations, kind, Path(scratch, f"{kind}-timed"))
            kills, hurt = [], []
            while sum(cell["kills"] for cell in kills) < args.kills:
                path = args.results / f"{kind}-kills-{len(kills):03}.json"
                kills.append(cached(path, kill_cell, kind, len(kills), reference, seconds))
                _show(kills[-1])
            for file, way in damages(stopped / "checkpoint-3")[: args.damages]:
                path = args.results / f"{kind}-{file}-{way.replace(' ', '-')}.json"
                hurt.append(cached(path, damage_cell, kind, file, way, stopped, reference))
                _show(hurt[-1])
            cells[kind] = [*kills, *hurt]
    print("| trainer | runs | kills | in a save | runs that differ | damages | not named | ends that differ |")
    print("|---|---|---|---|---|---|---|---|")
    for kind, found in cells.items():
        kills, hurt = [cell for cell in found if "kills" in cell], [cell for cell in found if "way" in cell]
        figures = [len(kills), sum(cell["kills"] for cell in kills), sum(cell["in_a_save"] for cell in kills)]
        figures += [sum(cell["differs"] is not None for cell in kills), len(hurt)]
        figures += [sum(not cell["named"] for cell in hurt), sum(cell["differs"] is not None for cell in hurt)]
        print(f"| {kind} | {' | '.join(map(str, figures))} |")
    return cells


def _show(cell: dict) -> None:
    bad = cell["differs"] or (not cell.get("named", True) and cell.get("message"))
    if bad or cell.get("failed_starts"):
        print(f"{cell}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
