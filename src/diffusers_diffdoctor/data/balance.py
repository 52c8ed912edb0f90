# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Balance: in which categories of images a detector sees more, or fewer, artifacts than in the others (DiffDoctor, section 3.2).

The paper aggregates the detector's confidence for each category and flags those that stand out; it gives neither the aggregate nor
the rule. Both are ours. The aggregate is the share of a category's images whose highest confidence reaches a threshold. The rule is
in [`stand_out`]. A category that is flagged is where the detector cries wolf, or is blind, or where the generators are bad or good:
people have to look.
"""

import io
import json
import math
import os
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet as pq
from datasets import Features, Value

from ..evaluation.metrics import wilson_interval
from ..evaluation.report import Figure, Picture, Section, Table, html_report
from ..files import write_atomically
from ..images import read_artifact_map
from ..pictures import forest_plot
from ..tables import write_csv
from .schema import SOURCES, Row
from .shards import Quarantined, Shard
from .stage import DATA, LEFT_OUT, MARKERS, Result, Stage, row_name, run_stage


CONFIDENCES = "confidences"
KINDS = {"category": "categories", "generator": "generators"}  # column -> what its values are called
MOST_ROWS = 40  # of a picture that a person can read
LEAST_SPREAD = 0.1  # between groups, in log-odds: what they differ by anyway


@dataclass(frozen=True)
class Confidences(Stage):
    """The numbers that `balance` adds up, a row for each labelled image: `max_confidence` and `area_ratio`, both in [0, 1].

    Args:
        sources: rows of these only; the others are left out. Maps of people are no opinion of the detector.
        threshold: confidence in (0, 1] from which a pixel counts in `area_ratio`.
    """

    sources: tuple[str, ...] = ("pseudo",)
    threshold: float = 0.5

    name: ClassVar[str] = "confidences"

    def __post_init__(self):
        if not self.sources or not set(self.sources) <= set(SOURCES):
            raise ValueError(
                f"`sources` must be some of {', '.join(SOURCES)}, found {', '.join(self.sources) or None}."
            )
        if not 0 < self.threshold <= 1:
            raise ValueError(f"`threshold` must be in (0, 1], found {self.threshold}.")

    def features(self, shard: Shard) -> Features:
        own = {"max_confidence": Value("float32"), "area_ratio": Value("float32")}
        return Features(own | {column: shard.features[column] for column in KINDS})

    def process(self, rows: Iterator[Row], shard: Shard) -> Iterator[Result]:
        for row in rows:
            if row["artifact_map"] is None or row["source"] not in self.sources:
                yield LEFT_OUT
                continue
            try:
                confidence = np.asarray(read_artifact_map(io.BytesIO(row["artifact_map"]["bytes"]), 255)) / 255
            except Exception as error:  # decoders raise many types; one bad map must not stop the rest
                yield Quarantined(row_name(row), f"artifact_map: {str(error) or type(error).__name__}")
                continue
            area = (confidence >= self.threshold).mean()
            yield {**row, "max_confidence": float(confidence.max()), "area_ratio": float(area)}


@dataclass(frozen=True)
class Group:
    """A category, or a generator, beside the others.

    Attributes:
        name: of the group.
        images: how many it has, and `artifacts` in how many of them the highest confidence reaches the threshold.
        share: the latter divided by the former, with its 95 % Wilson `interval`.
        max_confidence, area_ratio: means over the images.
        deviation: from the middle of all groups, in standard deviations; None with too few images to say.
        flag: "high", "low" or "".
    """

    name: str
    images: int
    artifacts: int
    share: float
    interval: tuple[float, float]
    max_confidence: float
    area_ratio: float
    deviation: float | None
    flag: str


def stand_out(
    counts: Mapping[str, tuple[int, int]], min_images: int = 20, cutoff: float = 3.5
) -> dict[str, float | None]:
    """How far each group's share of images with artifacts is from that of the others, in robust standard deviations.

    With `k` of `n` images, a group's log-odds are `t = log((k + 1/2) / (n - k + 1/2))`, whose variance by chance is
    `v = 1 / (k + 1/2) + 1 / (n - k + 1/2)`. The middle is the median of all groups. How much groups differ apart from
    chance is `s^2 = max(0.1^2, (1.4826 MAD)^2 - median v)`, with MAD the median distance from the middle, so that the groups that
    stand out do not widen the scale by which they are judged. A group deviates by `(t - median) / sqrt(s^2 + v)`: a small
    one has to differ by more, and a difference of less than 0.35 in log-odds (8 points at a share of a half) never counts,
    however many images there are.

    Args:
        counts: group -> images, and how many of them have an artifact.
        min_images: smaller groups are neither judged nor part of the median.
        cutoff: deviation from which a group stands out; 3.5 is that of Iglewicz and Hoaglin (1993).

    Returns:
        Group -> deviation, None for small ones.
    """
    judged = {name: pair for name, pair in counts.items() if pair[0] >= min_images}
    if not judged:
        return dict.fromkeys(counts)
    odds = {name: math.log((k + 0.5) / (n - k + 0.5)) for name, (n, k) in judged.items()}
    chance = {name: 1 / (k + 0.5) + 1 / (n - k + 0.5) for name, (n, k) in judged.items()}
    middle = statistics.median(odds.values())
    spread = 1.4826 * statistics.median(abs(value - middle) for value in odds.values())
    variance = max(LEAST_SPREAD**2, spread**2 - statistics.median(chance.values()))
    deviations = {name: (odds[name] - middle) / math.sqrt(variance + chance[name]) for name in judged}
    return {name: deviations.get(name) for name in counts}


def balance(
    shards: Sequence[Shard],
    output_dir: str | os.PathLike,
    *,
    threshold: float = 0.5,
    sources: Sequence[str] = ("pseudo",),
    min_images: int = 20,
    cutoff: float = 3.5,
    **options: Any,
) -> dict[str, Any]:
    """Compare the categories and the generators of a labelled dataset, and write tables, pictures and a report.

    The maps are read shard by shard; stopped, it goes on where it was when it is called again. Other thresholds of the rule need
    no second reading.

    Args:
        shards: of a dataset whose images a detector has labelled.
        output_dir: folder for balance.json, categories.csv, generators.csv, report.html and a picture for each of the two.
        threshold: highest confidence in (0, 1] from which an image counts as having an artifact.
        sources: rows of these only.
        min_images, cutoff: of [`stand_out`].
        **options: `workers`, `restart` and `show_progress` of [`run_stage`].

    Returns:
        What balance.json holds: `flagged` (names of categories), `flagged_generators`, `categories` and `generators` (a list of
        [`Group`] as dictionaries, the highest deviation first), `images`, `without_category`, `left_out`, `quarantined`, and the
        settings.

    Raises:
        ValueError: no image of these sources is labelled, an argument is out of range; and what [`run_stage`] raises.
    """
    if min_images < 1 or not cutoff > 0:
        raise ValueError(f"`min_images` must be at least 1 and `cutoff` above 0, found {min_images} and {cutoff}.")
    stage = Confidences(tuple(sources), threshold)
    output_dir = Path(output_dir)
    folder = output_dir / MARKERS / CONFIDENCES
    counts = run_stage(stage, shards, folder, **options)
    images = sum(counts["rows_out"].values())
    if not images:
        raise ValueError(
            f"No image has a map of the source {' or '.join(sources)}: {counts['left_out']} of {counts['rows_in']} rows are of "
            "others or not labelled. Label them (`diffdoctor data label`), or name their source."
        )
    totals, without = _totals(sorted((folder / DATA).glob("*.parquet")), threshold)
    result = {
        "flagged": [],
        "flagged_generators": [],
        "images": images,
        "without_category": without,
        "left_out": counts["left_out"],
        "quarantined": counts["quarantined"],
        "threshold": threshold,
        "sources": list(sources),
        "min_images": min_images,
        "cutoff": cutoff,
    }
    for column, kind in KINDS.items():
        groups = _groups(totals[column], min_images, cutoff)
        result["flagged" if kind == "categories" else "flagged_generators"] = [g.name for g in groups if g.flag]
        result[kind] = [asdict(group) for group in groups]
        _write_csv(output_dir / f"{kind}.csv", groups)
    _write_report(output_dir, result)
    write_atomically(output_dir / "balance.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def _totals(files: Iterable[Path], threshold: float) -> tuple[dict[str, dict[str, list[float]]], int]:
    """Column -> group -> [images, artifacts, sum of confidences, sum of areas]; and how many images have no category."""
    totals = {column: defaultdict(lambda: [0, 0, 0.0, 0.0]) for column in KINDS}
    without = 0
    for file in files:
        for row in pq.read_table(file).to_pylist():
            reached = row["max_confidence"] >= np.float32(threshold)  # as it was stored
            numbers = (1, int(reached), row["max_confidence"], row["area_ratio"])
            without += not row["category"]
            names = {"category": dict.fromkeys(row["category"]), "generator": filter(None, [row["generator"]])}
            for column, members in names.items():
                for name in members:
                    totals[column][name] = [a + b for a, b in zip(totals[column][name], numbers)]
    return totals, without


def _groups(totals: Mapping[str, Sequence[float]], min_images: int, cutoff: float) -> list[Group]:
    """The one that deviates upward the most first, those that are not judged last."""
    deviations = stand_out({name: (total[0], total[1]) for name, total in totals.items()}, min_images, cutoff)
    groups = []
    for name, (images, artifacts, confidence, area) in totals.items():
        deviation = deviations[name]
        flag = "" if deviation is None or abs(deviation) < cutoff else "high" if deviation > 0 else "low"
        share, interval = artifacts / images, wilson_interval(artifacts, images)
        groups.append(
            Group(name, images, artifacts, share, interval, confidence / images, area / images, deviation, flag)
        )
    judged = sorted((g for g in groups if g.deviation is not None), key=lambda g: (-g.deviation, g.name))
    return judged + sorted((g for g in groups if g.deviation is None), key=lambda g: (-g.images, g.name))


def _write_csv(path: Path, groups: Sequence[Group]) -> None:
    numbers = ("share", "low", "high", "max_confidence", "area_ratio")
    rows = []
    for group in groups:
        row = asdict(group) | dict(zip(("low", "high"), group.interval))
        rows.append(row | {name: round(row[name], 6) for name in numbers})
    write_csv(path, ("name", "images", "artifacts", *numbers, "deviation", "flag"), rows)


def _write_report(output_dir: Path, result: Mapping[str, Any]) -> None:
    figures = [
        Figure(
            "Images",
            f"{result['images']}",
            f"{result['left_out']} left out, {sum(result['quarantined'].values())} bad",
        )
    ]
    sections = []
    for kind, flagged in (("categories", "flagged"), ("generators", "flagged_generators")):
        groups = result[kind]
        judged = sum(group["deviation"] is not None for group in groups)
        figures.append(
            Figure(
                f"{kind.capitalize()} that stand out",
                f"{len(result[flagged])} of {judged}",
                f"{len(groups) - judged} more have fewer than {result['min_images']} images",
                "bad" if result[flagged] else "plain",
            )
        )
        if not groups:
            continue
        shown = sorted(groups, key=lambda group: -abs(group["deviation"] or 0))[:MOST_ROWS]
        picture = forest_plot(
            [group["name"] for group in shown],
            [group["share"] for group in shown],
            [group["interval"] for group in shown],
            [group["flag"] for group in shown],
            output_dir / f"{kind}.png",
            axis=f"share of images with a confidence of at least {result['threshold']:g}",
        )
        sections.append(
            Section(
                kind.capitalize(),
                f"The {len(shown)} of {len(groups)} that differ the most from the others, the highest share first; lines are "
                f"95 % intervals. All are in {kind}.csv.",
                Table(
                    ("", "images", "with artifacts", "deviation", "mean confidence", "mean area", ""),
                    [_line(group) for group in groups if group["flag"]],
                ),
                [Picture(picture)],
                wide=True,
            )
        )
    html_report(
        output_dir / "report.html",
        "Balance",
        figures,
        sections,
        "Where a detector sees more artifacts, or fewer, than elsewhere. High: it may cry wolf, or the generators may fail there. "
        "Low: it may be blind, or they may be good. Look at the images before you believe either.",
    )


def _line(group: Mapping[str, Any]) -> list[str]:
    return [
        group["name"],
        str(group["images"]),
        f"{100 * group['share']:.1f} %",
        f"{group['deviation']:+.1f}",
        f"{group['max_confidence']:.2f}",
        f"{100 * group['area_ratio']:.2f} %",
        group["flag"],
    ]
