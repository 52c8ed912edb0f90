# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Artifacts without annotators: sound images, a share of which is spoiled where it is known."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from datasets import List, Value

from .injection import COUNTS, KINDS, WEIGHTS, inject, load_repainter, retouch
from .schema import Row, decode_image, decode_map, encode_png, no_artifact, row_seed
from .shards import Quarantined, Shard
from .stage import Result, Stage, row_name


LEAST_SIDE = 16  # pixels
REPAINT = "repaint"
PRECISIONS = ("float32", "bfloat16", "float16")
MOST_INJECTIONS = 20  # in an image


@dataclass(frozen=True)
class Inject(Stage):
    """Rows of sound images; a share of them gets artifacts, a map that says where, and the source "injected".

    Sound is a row whose map is zero, and a photograph without one. Others are quarantined: what is wrong, or may be, must not be
    taught as sound. The column `injected` holds the kinds of a row's artifacts; it is empty for rows that stay sound, which keep
    their source. Images in which nothing could be spoiled, flat ones, are among them.

    Args:
        share: of the rows that get artifacts, in [0, 1].
        kinds: names of `KINDS`, and "repaint" with a `pipeline`, with their weights. Without any all of `KINDS`, mostly parts too many,
            missing or in the wrong place; with a `pipeline` "repaint" alone.
        counts: how many injections an image gets, with their weights; of JSON, hence names of numbers.
        boxes: name of a column with boxes, [[x1, y1, x2, y2], ...] in pixels of the upright image, corners in any order: where to inject,
            hands or faces. Rows without any are injected where something stands out.
        least_size, most_size: diameters of the regions, in shares of the image's shorter side (of a box's longer side).
        decoys: chance in [0, 1] that some regions of an image, spoiled or not, are retouched with the same tools and stay sound.
        seed: with the image it decides all that is random about a row.
        pipeline: Hub id or folder of a pipeline of a class of `AutoPipelineForInpainting`, which draws regions anew and retouches
            decoys.
        prompts, steps, strength, size: of the pipeline's calls, see [`Repainter`].
        precision, device: of the pipeline.
    """

    share: float = 0.6
    kinds: dict[str, float] | None = None
    counts: dict[str, float] = field(default_factory=lambda: {str(n): share for n, share in COUNTS.items()})
    boxes: str | None = None
    least_size: float = 0.08
    most_size: float = 1 / 3
    decoys: float = 0.5
    seed: int = 0
    pipeline: str | None = None
    prompts: tuple[str, ...] = ("",)
    steps: int = 8
    strength: float = 0.9
    size: int = 512
    precision: str = "float32"
    device: str = field(default="cpu", compare=False)

    name: ClassVar[str] = "inject"
    columns: ClassVar[dict[str, Any]] = {"injected": List(Value("string"))}

    def __post_init__(self):
        if self.kinds is None:
            object.__setattr__(self, "kinds", dict(WEIGHTS) if self.pipeline is None else {REPAINT: 1.0})
        known = [*KINDS, *([REPAINT] if self.pipeline is not None else [])]
        if not set(self.kinds) <= set(known) or not _are_weights(self.kinds):
            raise ValueError(
                f"`kinds` must give some of {', '.join(known)} weights of at least 0, not all 0, found {self.kinds}."
            )
        if not all(n.isdecimal() and 1 <= int(n) <= MOST_INJECTIONS for n in self.counts) or not _are_weights(
            self.counts
        ):
            raise ValueError(
                f"`counts` must give numbers from 1 to {MOST_INJECTIONS} weights of at least 0, not all 0, found {self.counts}."
            )
        for name in ("share", "decoys"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie in [0, 1], found {getattr(self, name)}.")
        if not 0 < self.least_size <= self.most_size <= 1:
            raise ValueError(
                "`least_size` and `most_size` must be in order and lie in (0, 1], found "
                f"{self.least_size} and {self.most_size}."
            )
        if self.precision not in PRECISIONS:
            raise ValueError(f"`precision` must be one of {', '.join(PRECISIONS)}, found {self.precision!r}.")
        if not (self.prompts and self.steps >= 1 and 0 < self.strength <= 1 and self.size >= 64):
            raise ValueError(
                "`prompts` must hold at least one text, `steps` be at least 1, `strength` lie in (0, 1] and `size` be at least 64, "
                f"found {self.prompts}, {self.steps}, {self.strength} and {self.size}."
            )

    def process(self, rows: Iterator[Row], shard: Shard) -> Iterator[Result]:
        functions, retouches = dict(KINDS), [retouch]
        if self.pipeline is not None:
            repainter = load_repainter(
                self.pipeline, self.prompts, self.steps, self.strength, self.size, self.device, self.precision
            )
            functions[REPAINT], retouches = repainter.repaint, [retouch, repainter.retouch]
        counts = {int(count): weight for count, weight in self.counts.items()}
        for row in rows:
            try:
                image = decode_image(row)
                artifact_map = decode_map(row, image.size)
                boxes = boxes_of(row, self.boxes, image.size)
            except Exception as error:  # decoders raise many types; one bad file must not stop the rest
                yield Quarantined(row_name(row), str(error) or type(error).__name__)
                continue
            sound = row["source"] == "photo" if artifact_map is None else artifact_map.getextrema()[1] == 0
            if not sound:
                why = "its map is not zero" if artifact_map else "it has no map and is no photograph"
                yield Quarantined(row_name(row), f"not known to be sound: {why}")
                continue
            if min(image.size) < LEAST_SIDE:
                yield Quarantined(row_name(row), f"a side shorter than {LEAST_SIDE} pixels")
                continue
            rng = np.random.default_rng(row_seed(self.seed, row))
            kinds = self.kinds if rng.random() < self.share else {}
            pixels = np.array(image)
            sizes = self.least_size, self.most_size
            done = inject(pixels, rng, kinds, boxes, *sizes, counts, self.decoys, functions, retouches)
            result = {**row, "injected": list(done.kinds)}
            if done.kinds:
                result |= {"artifact_map": encode_png(done.artifact_map), "source": "injected"}
            elif artifact_map is None:
                result["artifact_map"] = no_artifact(image.size)
            if (done.image != pixels).any():  # files of images that nothing was done to are kept
                result["image"] = encode_png(done.image, row_name(row))
            yield result


def _are_weights(weights: dict[str, float]) -> bool:
    return bool(weights) and min(weights.values()) >= 0 and 0 < sum(weights.values()) < float("inf")


def boxes_of(row: Row, column: str | None, size: tuple[int, int]) -> list[list[float]] | None:
    """The boxes of a row, each cut at the border of its image of `size` (width, height); None without any.

    Raises:
        ValueError: there is no such column, or it holds something else than lists of four finite numbers.
    """
    if column is None:
        return None
    if column not in row:
        raise ValueError(f"there is no column {column!r} with boxes; the columns are {', '.join(row)}")
    boxes = []
    for box in row[column] or []:
        values = np.asarray(box, float) if isinstance(box, (list, tuple)) else np.empty(0)
        if values.shape != (4,) or not np.isfinite(values).all():
            raise ValueError(f"`{column}` must hold boxes of four numbers, x1, y1, x2, y2, found {box!r:.100}")
        x1, y1, x2, y2 = np.clip(values, 0, [*size, *size])
        if x1 != x2 and y1 != y2:
            boxes.append([float(x) for x in (x1, y1, x2, y2)])
    return boxes or None
