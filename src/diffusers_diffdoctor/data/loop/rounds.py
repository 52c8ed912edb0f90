# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The loop that makes a detector robust (DiffDoctor, section 3.2), round by round, each step a command of `diffdoctor`.

    FOLDER/round-0/detector                 the first detector, where none is given
    FOLDER/round-N/labelled ... detector    what the steps of a round wrote, see [`Loop.steps`]
    FOLDER/round-N/round.json, report.html  what the round taught
    FOLDER/.diffdoctor/N-STEP.json          what a step was asked for, from what it was made, and what came of it

A step runs when its command, its inputs or its outputs are not those of its record; what was stopped goes on where it was. The paper
says which steps a round has. That new images join the pool, that a round's pool is what the one before found simple, and that
pseudo-labels are taught from the second round on, is ours.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...evaluation.report import Picture
from ...files import LOCK, RUNNING, digest, only_run, write_atomically
from ...images import to_image_tensor
from ...pictures import heatmap_overlay, image_grid
from ..schema import decode_image, decode_map
from ..shards import split_name
from .masks import masks_missing, masks_of, rows_of
from .report import write_report
from .settings import LoopSettings, arguments, named


RECORDS = ".diffdoctor"
END = 2**20  # bytes of a file's beginning and end that tell it apart
SHOWN = 8  # hard cases of a report


class Waiting(Exception):
    """People have to paint first.

    Attributes:
        round: number of the round.
        missing, wanted: masks.
        hard: the dataset that is painted on.
        queue: the folder that keeps the masks.
    """

    def __init__(self, round: int, missing: int, wanted: int, hard: str, queue: Path, copies: int):
        self.round, self.missing, self.wanted = round, missing, wanted
        self.hard, self.queue, self.copies = hard, queue, copies
        super().__init__(f"Round {round} waits for people: {missing} of {wanted} masks are missing.")

    def command(self) -> str:
        """What lets people paint."""
        copies = f" --copies {self.copies}" if self.copies > 1 else ""
        return f"diffdoctor ui --annotate {self.hard} --queue {self.queue}{copies} --restart"


@dataclass(frozen=True)
class Step:
    """A command of a round.

    Attributes:
        name: of the step, once in a round.
        command: of `diffdoctor`.
        inputs: paths, and ids of the Hub, that it reads.
        output: what it writes.
        spread: whether a launcher may run it on several GPUs.
        fresh: what is added to the command where it does not go on with what was stopped, and `again` where it does.
    """

    name: str
    command: tuple[str, ...]
    inputs: tuple[str, ...]
    output: Path
    spread: bool = False
    fresh: tuple[str, ...] = ()
    again: tuple[str, ...] = ()


# --- the steps -------------------------------------------------------------------------------------------------------------------


class Loop:
    """The rounds of some settings.

    Args:
        settings: see [`LoopSettings`].
        run: runs a command of `diffdoctor`, given its words and whether it may be spread over GPUs; returns the exit status.
        say: tells what is going on.
    """

    def __init__(
        self,
        settings: LoopSettings,
        run: Callable[[Sequence[str], bool], int],
        say: Callable[[str], None] = print,
    ):
        self.settings, self._run, self._say = settings, run, say
        self.folder = Path(settings.output_dir)

    def work(self) -> list[dict[str, Any]]:
        """All rounds, each step that is not done.

        Returns:
            What each round.json holds, that of round 0 first, see [`summary`].

        Raises:
            Waiting: people have to paint first.
            RuntimeError: a command failed; it is named.
            FolderInUse: another process works on the loop.
        """
        with only_run(self.folder):
            self._refuse_another()
            return self._rounds()

    def _refuse_another(self) -> None:
        """A folder with something else in it is not written into."""
        found = [path.name for path in self.folder.iterdir() if path.name not in (LOCK, RUNNING)]
        if found and not (self.folder / RECORDS).is_dir():
            raise ValueError(
                f"{str(self.folder)!r} holds {found[0]!r}, which no loop has written. Choose an empty folder."
            )
        (self.folder / RECORDS).mkdir(exist_ok=True)

    def _rounds(self) -> list[dict[str, Any]]:
        settings, summaries = self.settings, []
        detector, pool = settings.detector, settings.pool
        for number in range(settings.rounds + 1):
            for step in self.steps(number, pool, detector):
                self._do(number, step)
            if number or detector is None:
                detector = str(self.of(number, "detector"))
            summaries.append(self._conclude(number, summaries))
            pool = f"{self.of(number, 'mined')}:simple" if number else pool
        return summaries

    def of(self, number: int, name: str) -> Path:
        """Where a round keeps something."""
        return self.folder / f"round-{number}" / name

    def steps(self, number: int, pool: str, detector: str | None) -> Iterator[Step]:
        """The steps of a round, each when those before it are done: what comes next depends on what they found.

        Args:
            number: of the round; round 0 trains the first detector where there is none, and measures it.
            pool: the dataset of images that nobody has labelled.
            detector: of the round before; None in round 0 where it has yet to be trained.

        Raises:
            Waiting: people have to paint first.
        """
        if number == 0:
            if detector is None:
                yield self._training(0, self.settings.train["model"])
            yield from self._evaluations(0, detector or str(self.of(0, "detector")))
            return
        if self.settings.categorize is not None and number == 1:
            yield self._language(number, "categorize", (pool,), "categorized")
            pool = str(self.of(number, "categorized"))
        labelled, balance = self.of(number, "labelled"), self.of(number, "balance")
        yield self._stage(number, "label", (pool,), labelled, ("--detector", detector), (detector,), spread=True)
        yield self._stage(number, "balance", (str(labelled),), balance)
        flagged = read_json(balance / "balance.json")["flagged"]
        if self.settings.prompts is not None and flagged:
            yield from self._new_images(number, balance, detector)
            new, merged = self.of(number, "labelled-new"), self.of(number, "merged")
            yield self._stage(number, "merge", (str(labelled), str(new)), merged)
            labelled = merged
        mined, table = self.of(number, "mined"), str(balance / "balance.json")
        given, reads = ["--detector", detector], [detector]
        if flagged:
            given, reads = [*given, "--flagged", table], [*reads, table]
        yield self._stage(number, "mine", (str(labelled),), mined, given, reads, spread=True)
        queue, annotated = self.of(number, "masks"), self.of(number, "annotated")
        self._wait(number, mined, queue)
        yield self._stage(
            number, "annotate", (f"{mined}:hard",), annotated, ("--queue", str(queue)), (str(queue / "annotations"),)
        )
        painted = [str(self.of(earlier, "annotated")) for earlier in range(1, number + 1)]
        if number > 1:
            yield self._stage(number, "merge-masks", painted, self.of(number, "all-masks"))
        yield self._training(number, self.settings.train.get("model", detector))
        yield from self._evaluations(number, str(self.of(number, "detector")))

    def _stage(
        self,
        number: int,
        name: str,
        datasets: Sequence[str],
        output: Path,
        given: Sequence[str | None] = (),
        reads: Sequence[str | None] = (),
        spread: bool = False,
    ) -> Step:
        """A command of `diffdoctor data`. With `--restart` it goes on with its own work and replaces that of other inputs."""
        section = getattr(self.settings, name, {}) if name != "annotate" else {}
        words = ["data", name.split("-")[0], *datasets, *given, *arguments(section), "--output", str(output)]
        return Step(name, (*words, "--restart"), (*datasets, *reads), output, spread)

    def _language(self, number: int, name: str, inputs: Sequence[str], output: str) -> Step:
        section = {"cache": str(self.folder / "answers.sqlite")} | getattr(self.settings, name)
        path = self.of(number, output)
        if name == "prompts":
            words = ["--balance", *inputs, *arguments({"seed": number} | section), "--output", str(path)]
        else:
            words = [*inputs, *arguments(section), "--output", str(path), "--restart"]
        return Step(
            name,
            ("data", name, *words),
            tuple(inputs),
            path,
            spread=name == "categorize" and bool(section.get("local")),
        )

    def _new_images(self, number: int, balance: Path, detector: str) -> Iterator[Step]:
        table, made = str(balance / "balance.json"), self.of(number, "synthesized")
        yield self._language(number, "prompts", (table,), "prompts")
        yield self._stage(
            number, "synthesize", (str(self.of(number, "prompts") / "prompts.jsonl"),), made, spread=True
        )
        step = self._stage(
            number,
            "label",
            (str(made),),
            self.of(number, "labelled-new"),
            ("--detector", detector),
            (detector,),
            spread=True,
        )
        yield dataclasses.replace(step, name="label-new")

    def _training(self, number: int, model: str) -> Step:
        datasets = dict(named(text) for text in self.settings.train_dataset)
        if number:
            datasets["masks"] = str(self.of(number, "annotated" if number == 1 else "all-masks"))
        if number and 0 < self.settings.pseudo_from_round <= number:
            datasets["pseudo"] = f"{self.of(number, 'mined')}:simple"
        section = {name: value for name, value in self.settings.train.items() if name != "model"}
        weights = section.get("source_weights")
        if isinstance(weights, dict):
            section["source_weights"] = weights_of_round(weights, list(datasets))
        output = self.of(number, "detector")
        words = ["train-detector", "--train_dataset", *(f"{name}={path}" for name, path in datasets.items())]
        words += ["--model", model, *arguments(section, "_"), "--output_dir", str(output)]
        inputs = (*datasets.values(), model)
        fresh, again = ("--overwrite_output_dir", "true"), ("--resume_from_checkpoint", "auto")
        return Step("train", tuple(words), inputs, output, True, fresh, again)

    def _evaluations(self, number: int, detector: str) -> Iterator[Step]:
        for name, dataset in map(named, self.settings.eval_dataset):
            output = self.of(number, "evaluation") / name
            words = ("evaluate-detector", dataset, "--detector", detector, "--output", str(output), "--restart")
            yield Step(f"evaluate-{name}", words, (dataset, detector), output, True)

    def _wait(self, number: int, mined: Path, queue: Path) -> None:
        missing, wanted = masks_missing(f"{mined}:hard", queue, self.settings.copies)
        if self._enough(missing, wanted):
            return
        raise Waiting(number, missing, wanted, f"{mined}:hard", queue, self.settings.copies)

    def missing(self, waiting: Waiting) -> int:
        """How many masks are missing by now; 0 where they are enough to go on."""
        missing, wanted = masks_missing(waiting.hard, waiting.queue, waiting.copies)
        return 0 if self._enough(missing, wanted) else missing

    def _enough(self, missing: int, wanted: int) -> bool:
        return wanted - missing >= self.settings.share * wanted

    # --- one step ------------------------------------------------------------------------------------------------------------------

    def _do(self, number: int, step: Step) -> None:
        record = self.folder / RECORDS / f"{number}-{step.name}.json"
        asked = {"command": list(step.command), "inputs": {name: fingerprint(name) for name in step.inputs}}
        known = read_json(record)
        begun = known is not None and all(known.get(key) == asked[key] for key in asked)
        if begun and known["output"] is not None and known["output"] == fingerprint(str(step.output)):
            self._say(f"[round {number}] {step.name}: done before")
            return
        self._say(f"[round {number}] {step.name}: diffdoctor {' '.join(step.command)}")
        write_atomically(record, json.dumps(asked | {"output": None}, indent=1) + "\n")
        # what has been finished is begun anew: somebody has changed what it wrote
        again = begun and known["output"] is None
        status = self._run([*step.command, *(step.again if again else step.fresh)], step.spread)
        if status:
            raise RuntimeError(
                f"Round {number}, {step.name}: `diffdoctor {step.command[0]}` ended with status {status}. What is done is kept: "
                "mend the cause and run the loop again."
            )
        write_atomically(record, json.dumps(asked | {"output": fingerprint(str(step.output))}, indent=1) + "\n")

    def _conclude(self, number: int, before: Sequence[dict[str, Any]]) -> dict[str, Any]:
        found = self.summary(number)
        folder = self.of(number, "")
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "round.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        write_report(folder / "report.html", [*before, found], self.of(number, "balance"), self._hard_cases(number))
        return found

    def summary(self, number: int) -> dict[str, Any]:
        """What a round that is done taught: `round`, `figures` (evaluation set -> what [`DetectorFigures.compute`] gives); and, but in
        round 0, `images` of the pool, `flagged` (category -> "high" or "low"), `prompts`, `synthesized`, `hard`, `simple`, and of the
        `masks`: `images`, `with_artifacts`, `people`, `minutes`, `kinds`."""
        sets = [named(text)[0] for text in self.settings.eval_dataset]
        evaluations = {name: read_json(self.of(number, "evaluation") / name / "figures.json") for name in sets}
        found: dict[str, Any] = {"round": number, "figures": {n: e["figures"] for n, e in evaluations.items() if e}}
        if not number:
            return found
        balance = read_json(self.of(number, "balance") / "balance.json")
        mined = read_json(self.of(number, "mined") / "stage.json")["counts"]["rows_out"]
        asked = balance["flagged"] and self.settings.prompts is not None  # else what lies there is of earlier settings
        prompts = read_json(self.of(number, "prompts") / "prompts.json") if asked else None
        made = read_json(self.of(number, "synthesized") / "stage.json") if asked else None
        return found | {
            "images": balance["images"],
            "flagged": {group["name"]: group["flag"] for group in balance["categories"] if group["flag"]},
            "prompts": prompts["taken"] if prompts else 0,
            "synthesized": sum(made["counts"]["rows_out"].values()) if made else 0,
            "hard": mined["hard"],
            "simple": mined["simple"],
            "masks": masks_of(f"{self.of(number, 'mined')}:hard", self.of(number, "masks")),
        }

    def _hard_cases(self, number: int) -> list[Picture]:
        """Some hard cases with the masks that people painted."""
        pictures = []
        for row in rows_of(str(self.of(number, "annotated"))) if number else ():
            image = decode_image(row)
            painted = to_image_tensor(decode_map(row, image.size).resize(image.size).convert("L"))[:1]
            tensor = to_image_tensor(image)[None]
            tiles = [tensor[0], heatmap_overlay(tensor, painted[None])[0]]
            pictures.append(Picture(image_grid([tiles], margin=0), ", ".join(row["category"]), row["prompt"] or ""))
            if len(pictures) == SHOWN:
                break
        return pictures


def weights_of_round(weights: Mapping[str, float], sources: Sequence[str]) -> dict[str, float]:
    """The weights of what there is in a round. What `masks` and `pseudo` do not take yet goes to the first source, so that every other
    source, such as photographs, has the same share of the draws in each round.

    Args:
        weights: of a source each, those of later rounds too.
        sources: of the round, the first of `train_dataset` first.
    """
    later = set(weights) - set(sources)
    found = {name: weight for name, weight in weights.items() if name not in later}
    if sources[0] in found:
        found[sources[0]] += sum(weights[name] for name in later)
    return found


# --- what lies on the disk ---------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """What a file holds; None where there is none, or one that is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def fingerprint(name: str) -> str:
    """What tells the content of a dataset, a detector or a file from another: the names and sizes of its files, and the first and last
    MB of each. Not of when they were written, so that a folder may be copied. Hidden files do not count. The name itself where
    nothing is here: it may be of the Hub.
    """
    path = Path(name if os.path.exists(name) else split_name(name)[0])
    if path.is_file():
        return digest(_ends(path))
    if not path.is_dir():
        return name
    lines = []
    for folder, folders, files in os.walk(path):
        folders[:] = sorted(one for one in folders if not one.startswith("."))
        for file in sorted(one for one in files if not one.startswith(".")):
            full = Path(folder, file)
            lines.append(f"{full.relative_to(path).as_posix()}\0{_ends(full)}\n")
    return digest(lines)


def _ends(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        begin = file.read(END)
        file.seek(max(0, size - END))
        return f"{size} {digest(begin)} {digest(file.read())}"
