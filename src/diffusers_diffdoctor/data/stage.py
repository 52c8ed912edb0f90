# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""A stage: a dataset in, a dataset out, shard by shard, so that it can be killed at any moment and started again.

    FOLDER/stage.json                 the plan (stage, settings, inputs); with `counts` once all shards are whole
    FOLDER/data/SPLIT-n-of-N.parquet  the rows
    FOLDER/quarantine/n.jsonl         the rows that go no further, each with its reason
    FOLDER/.diffdoctor/n.json         the marker of a whole shard, written last: its counts, and the sizes of its files
    FOLDER/README.md                  the dataset card

A shard of the input becomes a shard of the output by a pure function, [`run_shard`]: whoever calls it, a process pool here, one
process of many under `accelerate launch`, or a task of datatrove. Nothing is scheduled by this module.
"""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any, ClassVar

from datasets import Features
from filelock import FileLock
from tqdm.auto import tqdm

from ..disk import disk_errors_named
from ..files import LOCK, RUNNING, only_run, write_atomically
from ..names import shortened
from .card import write_card
from .schema import Row
from .shards import DEFAULT_SPLIT, PATTERN, Quarantined, Shard, write_shard


PLAN, MARKERS, QUARANTINE, DATA = "stage.json", ".diffdoctor", "quarantine", "data"
REMEDY = "What is done is kept: make room and run the same command again."


class LeftOut:
    """The result for a row that the stage leaves out on purpose, which is counted."""


LEFT_OUT = LeftOut()
# A row, where it goes if not into the first split, or why it goes nowhere.
Result = Row | tuple[str, Row] | Quarantined | LeftOut


@dataclasses.dataclass(frozen=True)
class Stage:
    """What happens to the rows of a dataset. The fields of a subclass are its settings, which JSON can hold; fields with
    `compare=False` say how fast it is done and not what.

    `process` is a pure function of settings and rows: it is called once for each shard, in any process and any order.
    """

    name: ClassVar[str] = ""
    splits: ClassVar[tuple[str, ...]] = (DEFAULT_SPLIT,)
    columns: ClassVar[dict[str, Any]] = {}  # features of columns that are added to those of the input

    def process(self, rows: Iterator[Row], shard: Shard) -> Iterator[Result]:
        """One result for each row, in order.

        Args:
            rows: that conform to the schema, images undecoded.
            shard: where they are from.
        """
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """What makes two runs of the stage give the same rows."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.compare}
        return json.loads(json.dumps(fields))

    def features(self, shard: Shard) -> Features:
        """Of the rows that come out: those of the input, and `columns`."""
        return Features(shard.features | dict(self.columns))


def row_name(row: Row) -> str | None:
    """What the quarantine calls a row: the path that its image came with."""
    return row["image"]["path"]


# --- one shard -----------------------------------------------------------------------------------------------------------------


def run_shard(
    stage: Stage, shard: Shard, number: int, count: int, output_dir: str | os.PathLike, progress=lambda rows: None
) -> dict[str, Any]:
    """Shard `number` of `count`: rows in, files and their marker out. What the marker says is returned.

    Pure: the same stage and shard write the same bytes, however often and wherever it is called.
    """
    output_dir = Path(output_dir)
    features = stage.features(shard)
    quarantine, tally, given = [], Counter(), Counter()

    def rows() -> Iterator[Row]:
        for row in shard.read():
            given["in"] += 1
            if isinstance(row, Quarantined):
                quarantine.append(row)
            else:
                given["passed"] += 1
                yield row
            progress(1)

    results: dict[str, list[Row]] = {split: [] for split in stage.splits}
    files = {split: output_dir / DATA / PATTERN.format(split=split, number=number, count=count) for split in results}

    def sorted_in(split: str, stream: Iterator[Result]) -> Iterator[Row]:
        """The rows of `split` as they come; those of other splits wait in `results`."""
        for result in stream:
            given["answered"] += 1
            if isinstance(result, Quarantined):
                quarantine.append(result)
            elif isinstance(result, LeftOut):
                given["left out"] += 1
            else:
                target, row = result if isinstance(result, tuple) else (stage.splits[0], result)
                tally.update(_facts(target, row))
                if target == split:
                    yield row
                else:
                    results[target].append(row)

    first, *others = stage.splits
    with disk_errors_named(output_dir, REMEDY):
        for folder in (DATA, QUARANTINE, MARKERS):
            (output_dir / folder).mkdir(parents=True, exist_ok=True)
        written = {first: write_shard(files[first], sorted_in(first, stage.process(rows(), shard)), features)}
        if given["answered"] != given["passed"]:
            raise RuntimeError(f"Stage {stage.name!r} got {given['passed']} rows and answered {given['answered']}.")
        written |= {split: write_shard(files[split], results[split], features) for split in others}
        lines = [json.dumps({"shard": number, "path": row.path, "reason": row.reason}) for row in quarantine]
        write_atomically(output_dir / QUARANTINE / f"{number:05d}.jsonl", "".join(f"{line}\n" for line in lines))
        marker = {
            "rows_in": given["in"],
            "rows_out": written,
            "left_out": given["left out"],
            "quarantined": dict(Counter(row.reason for row in quarantine).most_common()),
            "again": sum(row.again for row in quarantine),
            "facts": dict(sorted(tally.items())),
            "bytes": {file.name: file.stat().st_size for file in files.values()},
        }
        write_atomically(marker_path(output_dir, number), json.dumps(marker, indent=1))
    return marker


def marker_path(output_dir: str | os.PathLike, number: int) -> Path:
    return Path(output_dir, MARKERS, f"{number:05d}.json")


def read_marker(output_dir: str | os.PathLike, number: int) -> dict[str, Any] | None:
    """The marker of a shard that is whole, or None: nothing is believed of one whose files have another size."""
    try:
        marker = json.loads(marker_path(output_dir, number).read_text(encoding="utf-8"))
        sizes = {name: Path(output_dir, DATA, name).stat().st_size for name in marker["bytes"]}
        return marker if sizes == marker["bytes"] and marker["rows_in"] >= 0 else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _facts(split: str, row: Row) -> list[str]:
    """What the card counts about a row."""
    facts = [
        f"split/{split}",
        f"source/{row['source'] or 'not labelled'}",
        f"generator/{row['generator'] or 'unknown'}",
    ]
    return facts + [f"category/{name}" for name in dict.fromkeys(row["category"])]


# --- all shards ----------------------------------------------------------------------------------------------------------------


def run_stage(
    stage: Stage,
    shards: Sequence[Shard],
    output_dir: str | os.PathLike,
    *,
    workers: int = 1,
    rank: int = 0,
    world_size: int = 1,
    restart: bool = False,
    show_progress: bool = True,
    extra: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Run a stage over all shards that are not done yet, and finish the dataset when the last one is. Shards with rows that are
    quarantined but might succeed (`Quarantined.again`) are done, and a later run does them once more.

    Args:
        stage: what to do.
        shards: of the input, in order.
        output_dir: folder of the dataset that is made; one that holds the same stage of the same input is continued.
        workers: processes; 1 is this one.
        rank, world_size: this process works on shards `rank`, `rank + world_size`, ... For many processes, or machines that share
            a disk, each with its rank, and `workers` of its own.
        restart: replace a dataset that another stage, or one with other settings, has left in the folder.
        show_progress: rows of this process, as a bar.
        extra: facts for the plan that do not make another run of it, such as how many files were skipped.

    Returns:
        The counts: `rows_in` = sum of `rows_out` (by split) + `left_out` + sum of `quarantined` (by reason, `again` of which are
        worth another run), and the `facts` of the card; None while shards of other ranks are missing.

    Raises:
        ValueError: the folder holds another stage, other settings or other inputs; they are named.
        FolderInUse: another process works in the folder with the same rank.
        OSError: the disk is full; what is done is kept.
    """
    if not shards:
        raise ValueError("The stage has no input.")
    if workers < 1:
        raise ValueError(f"`workers` must be at least 1, found {workers}.")
    if not 0 <= rank < world_size:
        raise ValueError(f"`rank` must lie in [0, {world_size}), found {rank}.")
    output_dir = Path(output_dir)
    plan = {"stage": stage.name, "settings": stage.settings(), "inputs": [shard.identity for shard in shards]}
    with disk_errors_named(output_dir, REMEDY):
        (output_dir / MARKERS).mkdir(parents=True, exist_ok=True)
    # each rank locks a folder of its own; all agree on the plan under one lock
    with only_run(output_dir if world_size == 1 else output_dir / MARKERS / f"rank-{rank}-of-{world_size}"):
        with _agreement(output_dir), disk_errors_named(output_dir, REMEDY):
            _settle(output_dir, plan, extra or {}, restart, len(shards))
        markers = {number: read_marker(output_dir, number) for number in range(len(shards))}
        mine = [number for number in range(len(shards)) if number % world_size == rank]
        todo = [number for number in mine if markers[number] is None or markers[number].get("again")]
        done = sum(shards[number].rows for number in mine if number not in todo)
        total = sum(shards[number].rows for number in mine)
        job = partial(run_shard, stage, count=len(shards), output_dir=output_dir)
        with tqdm(
            total=total, initial=done, desc=stage.name, unit="row", disable=not show_progress, mininterval=1
        ) as bar:
            if workers == 1 or len(todo) < 2:
                for number in todo:
                    job(shard=shards[number], number=number, progress=bar.update)
            else:
                _in_processes(job, shards, todo, workers, bar.update)
        with _agreement(output_dir), disk_errors_named(output_dir, REMEDY):
            return _finish(output_dir, len(shards))


def _in_processes(
    job: Callable, shards: Sequence[Shard], todo: Sequence[int], workers: int, progress: Callable[[int], Any]
) -> None:
    """`job` for each of `todo`, in processes that import the package once."""
    methods = get_all_start_methods()
    context = get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["diffusers_diffdoctor.data"])
    with ProcessPoolExecutor(min(workers, len(todo)), mp_context=context) as pool:
        futures = {pool.submit(job, shard=shards[number], number=number): number for number in todo}
        try:
            for future in as_completed(futures):
                future.result()
                progress(shards[futures[future]].rows)
        except BaseException:
            for future in futures:
                future.cancel()
            raise


def _agreement(output_dir: Path) -> FileLock:
    return FileLock(output_dir / MARKERS / "agreement.lock")


def _settle(output_dir: Path, plan: dict[str, Any], extra: dict[str, Any], restart: bool, count: int) -> None:
    """Make sure that what lies in the folder is of this plan, and write the plan."""
    before = _read_plan(output_dir)
    same = before is not None and all(before.get(key) == plan[key] for key in plan)
    if same:
        return
    found = [path for path in output_dir.iterdir() if path.name not in (MARKERS, LOCK, RUNNING)]
    if found and not restart:
        if before is None:
            raise ValueError(
                f"{str(output_dir)!r} holds {found[0].name!r}, which no stage has written. Choose an empty folder."
            )
        raise ValueError(
            f"{str(output_dir)!r} holds the stage {before.get('stage')!r} with {_difference(before, plan)}; the two must not be "
            "mixed. Use the same settings, another output folder, or restart (--restart) to replace it."
        )
    if found and before is None:
        raise ValueError(
            f"{str(output_dir)!r} holds {found[0].name!r}, which no stage has written: it is not replaced. Choose another folder."
        )
    for pattern in (f"{MARKERS}/*.json", PLAN, f"{DATA}/*.parquet", f"{QUARANTINE}/*.jsonl", "README.md"):
        for path in output_dir.glob(pattern):  # markers first: what a kill leaves must not look done
            path.unlink()
    write_atomically(output_dir / PLAN, json.dumps(plan | extra | {"counts": None}, indent=1) + "\n")


def _read_plan(output_dir: Path) -> dict[str, Any] | None:
    try:
        plan = json.loads((output_dir / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return plan if isinstance(plan, dict) else None


def _difference(before: dict[str, Any], plan: dict[str, Any]) -> str:
    if before.get("stage") != plan["stage"]:
        return f"other rows than {plan['stage']!r} gives"
    then, now = before.get("settings") or {}, plan["settings"]
    changed = [
        f"{key} {then.get(key)!r}, here {now.get(key)!r}" for key in {**then, **now} if then.get(key) != now.get(key)
    ]
    if changed:
        return "; ".join(changed)
    then, now = before.get("inputs") or [], plan["inputs"]
    return f"another input ({_extent(then)}, here {_extent(now)})"


def _extent(inputs: list[dict[str, Any]]) -> str:
    rows, size = sum(shard["rows"] for shard in inputs), sum(shard["bytes"] for shard in inputs)
    return f"{rows} rows in {len(inputs)} shards of {size} bytes"


def _finish(output_dir: Path, count: int) -> dict[str, Any] | None:
    """Once all shards are whole: sum up their counts, and write them and the card."""
    markers = [read_marker(output_dir, number) for number in range(count)]
    if any(marker is None for marker in markers):
        return None
    rows_out, quarantined, facts = Counter(), Counter(), Counter()
    for marker in markers:
        rows_out.update(marker["rows_out"])
        quarantined.update(marker["quarantined"])
        facts.update(marker["facts"])
    counts = {
        "rows_in": sum(marker["rows_in"] for marker in markers),
        "rows_out": dict(rows_out),
        "left_out": sum(marker["left_out"] for marker in markers),
        "quarantined": dict(quarantined.most_common()),
        "again": sum(marker.get("again", 0) for marker in markers),
        "facts": dict(facts),
    }
    out = sum(rows_out.values()) + counts["left_out"] + sum(quarantined.values())
    if counts["rows_in"] != out:
        raise RuntimeError(f"{counts['rows_in']} rows went in, but {out} came out, were left out or quarantined.")
    plan = _read_plan(output_dir)
    if plan.get("counts") != counts:
        write_card(output_dir, shortened(plan), counts)
        write_atomically(output_dir / PLAN, json.dumps(plan | {"counts": counts}, indent=1) + "\n")
    return counts


def line_of(counts: dict[str, Any]) -> str:
    """ "100 in = 97 out + 3 quarantined", with splits where there are several."""
    out = counts["rows_out"]
    parts = [f"{sum(out.values())} out" if len(out) == 1 else " + ".join(f"{n} {split}" for split, n in out.items())]
    if counts["left_out"]:
        parts.append(f"{counts['left_out']} left out")
    return f"{counts['rows_in']} in = {' + '.join(parts)} + {sum(counts['quarantined'].values())} quarantined"
