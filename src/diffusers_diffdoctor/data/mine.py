# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Hard cases: the images of which a person's mask would teach a detector most (DiffDoctor, section 3.2). The rest is simple.

The paper gives no rule. Ours: an image is hard where the detector disagrees with itself (mirrored, looking from nearer and
farther, or as it was at other checkpoints) and where it is unsure; half of the hard cases are taken from categories that `balance`
has flagged, where there are so many.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import Features, Value

from ..detector.configuration_artifact_detector import SIZE_MULTIPLE
from ..files import FolderInUse, digest
from ..seeds import derive_seed
from .by_detector import DetectorStage, confidence_maps
from .schema import Row, decode_image, row_seed
from .shards import DEFAULT_SPLIT, PATTERN, Quarantined, Shard
from .stage import DATA, MARKERS, Result, Stage, row_name, run_stage


WORST_SHARE = 0.01  # of an image's pixels: a hand is small, and a mean over all would not see it
SCORES = "scores"


@dataclass(frozen=True)
class Score(DetectorStage):
    """The numbers that `mine` chooses by, a row for each image: `position` in its shard, `disagreement`, `uncertainty` and
    `hardness` in [0, 1], `chance` in [0, 1) that follows from the image, and its `category`.

    Each detector sees the image as it is, mirrored, and at each of the `scales`. Over the pixels of a map, `disagreement` is
    twice the standard deviation of these opinions, `uncertainty` is `1 - |2c - 1|` of their mean c; of both the mean over
    the highest hundredth of the pixels counts. `hardness` is the mean of the two.

    Args:
        scales: factors of the short side at which the detectors look, besides 1.
    """

    scales: tuple[float, ...] = (0.75, 1.5)

    name: ClassVar[str] = "score"

    def features(self, shard: Shard) -> Features:
        numbers = ("hardness", "disagreement", "uncertainty", "chance")
        own = {"position": Value("int64")} | dict.fromkeys(numbers, Value("float64"))
        return Features(own | {"category": shard.features["category"]})

    def look(self, models: list[torch.nn.Module], images: torch.Tensor) -> np.ndarray:
        views = []
        for model in models:
            size = model.config.image_size
            views += [confidence_maps(model, images), confidence_maps(model, images.flip(-1)).flip(-1)]
            for scale in self.scales:
                side = max(1, round(size * scale / SIZE_MULTIPLE)) * SIZE_MULTIPLE
                views.append(confidence_maps(model, images, image_size=side))
        opinions = torch.stack(views).flatten(2)
        disagreement = 2 * opinions.std(dim=0, correction=0)
        uncertainty = 1 - (2 * opinions.mean(dim=0) - 1).abs()
        worst = max(1, round(WORST_SHARE * opinions.shape[-1]))
        scores = [values.topk(worst, dim=1).values.mean(dim=1) for values in (disagreement, uncertainty)]
        return torch.stack(scores, dim=1).double().cpu().numpy()

    def answer(self, row: Row, seen: np.ndarray, position: int) -> Result:
        disagreement, uncertainty = seen.tolist()
        scores = {
            "disagreement": disagreement,
            "uncertainty": uncertainty,
            "hardness": (disagreement + uncertainty) / 2,
        }
        return {**row, **scores, "position": position, "chance": row_seed(0, row) / 2**31}


@dataclass(frozen=True)
class Divide(Stage):
    """Rows into the splits "hard" and "simple".

    Args:
        hard_sha256: digest of `hard`.
        hard: number of a shard's first row -> positions of its hard rows, and of all that were scored.
    """

    hard_sha256: str
    hard: dict[int, tuple[frozenset[int], frozenset[int]]] = field(compare=False)

    name: ClassVar[str] = "mine"
    splits: ClassVar[tuple[str, ...]] = ("simple", "hard")

    def process(self, rows, shard: Shard):
        hard, scored = self.hard[shard.first]
        for position, row in enumerate(rows):
            if position in scored:
                yield ("hard" if position in hard else "simple"), row
            else:
                yield Quarantined(row_name(row), _why_not(row))


def _why_not(row: Row) -> str:
    try:
        decode_image(row)
    except Exception as error:
        return str(error) or type(error).__name__
    return "the detector refused it"


def mine(
    score: Score,
    shards: Sequence[Shard],
    output_dir: str | os.PathLike,
    count: int = 2000,
    *,
    flagged: Sequence[str] = (),
    flagged_share: float = 0.5,
    at_random: bool = False,
    seed: int = 0,
    workers: int = 1,
    **options: Any,
) -> dict[str, Any] | None:
    """Divide a dataset into the splits "hard" and "simple". Stopped, it goes on where it was when it is called again.

    Args:
        score: the detectors and how they look.
        shards: of the dataset.
        output_dir: folder of the new dataset.
        count: of hard cases; the paper has 2000.
        flagged: categories that `balance` has flagged.
        flagged_share: of the hard cases that are taken from these categories, where there are so many.
        at_random: choose the hard cases by chance instead: the control of the experiment.
        seed: of chance.
        workers: processes that write the dataset once all is scored.
        **options: `rank`, `world_size`, `restart` and `show_progress` of [`run_stage`].

    Returns:
        The counts; None while other ranks have not scored all.

    Raises:
        ValueError: an argument out of range; and what [`run_stage`] raises.
    """
    if count < 1:
        raise ValueError(f"`count` must be at least 1, found {count}.")
    if not 0 <= flagged_share <= 1:
        raise ValueError(f"`flagged_share` must lie in [0, 1], found {flagged_share}.")
    folder = Path(output_dir, MARKERS, SCORES)
    if run_stage(score, shards, folder, **options) is None:
        return None
    scores = [_read_scores(folder, number, len(shards)) for number in range(len(shards))]
    chosen = choose(scores, count, flagged, flagged_share, at_random, seed)
    hard = {
        shard.first: (frozenset(positions), frozenset(row["position"] for row in rows))
        for shard, positions, rows in zip(shards, chosen, scores)
    }
    shared = options.get("world_size", 1) > 1
    options = {key: options[key] for key in ("restart", "show_progress") if key in options}
    stage = Divide(digest(json.dumps([sorted(positions) for positions in chosen])), hard)
    try:
        return run_stage(stage, shards, output_dir, workers=workers, **options)
    except FolderInUse:  # another rank has seen at the same moment that all is scored
        if shared:
            return None
        raise


def choose(
    scores: Sequence[Sequence[dict[str, Any]]],
    count: int,
    flagged: Sequence[str] = (),
    flagged_share: float = 0.5,
    at_random: bool = False,
    seed: int = 0,
) -> list[list[int]]:
    """Positions of the hard rows of each shard, from the rows of [`Score`]: the hardest of the flagged categories first, then the
    hardest of all."""
    ranked = []
    for shard, rows in enumerate(scores):
        for row in rows:
            rank = derive_seed(seed, repr(row["chance"])) if at_random else -row["hardness"]
            # images that are equally hard go by chance, not by their place in the dataset
            ranked.append((rank, row["chance"], shard, row["position"], not set(flagged).isdisjoint(row["category"])))
    ranked.sort()
    first = [row for row in ranked if row[-1]][: round(count * flagged_share)] if not at_random else []
    taken = set(first)
    rest = [row for row in ranked if row not in taken]
    result: list[list[int]] = [[] for _ in scores]
    for _, _, shard, position, _ in [*first, *rest][:count]:
        result[shard].append(position)
    return [sorted(positions) for positions in result]


def _read_scores(folder: Path, number: int, count: int) -> list[dict[str, Any]]:
    return pq.read_table(folder / DATA / PATTERN.format(split=DEFAULT_SPLIT, number=number, count=count)).to_pylist()
