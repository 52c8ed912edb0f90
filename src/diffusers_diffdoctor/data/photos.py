# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Real photographs as negatives: zero everywhere (DiffDoctor, section 3.2, "balance"), so that a detector stops crying wolf."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from .schema import Row, decode_image, no_artifact
from .shards import Quarantined, Shard
from .stage import Result, Stage, row_name


@dataclass(frozen=True)
class Photos(Stage):
    """Images become rows of the source "photo" with a map of zeros. What cannot be read is quarantined.

    Args:
        category: names of what is in all of them, for the metrics by category; those of the rows stay without it.
        least_side: images with a shorter side, in pixels, are quarantined.
    """

    category: tuple[str, ...] = ()
    least_side: int = 32

    name: ClassVar[str] = "photos"

    def process(self, rows: Iterator[Row], shard: Shard) -> Iterator[Result]:
        for row in rows:
            try:
                size = decode_image(row).size
            except Exception as error:  # decoders raise many types; one bad file must not stop the rest
                yield Quarantined(row_name(row), str(error) or type(error).__name__)
                continue
            if min(size) < self.least_side:
                yield Quarantined(row_name(row), f"a side shorter than {self.least_side} pixels")
                continue
            labels = {"artifact_map": no_artifact(size), "source": "photo"}
            yield {**row, **labels, "category": list(self.category) or row["category"]}
