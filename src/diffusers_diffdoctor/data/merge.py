# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Several datasets as one, in given proportions."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from datasets import Features

from .schema import FEATURES, OPTIONAL, Row, decode_ignore_map, decode_image, decode_map
from .shards import Quarantined, Shard
from .stage import LEFT_OUT, Result, Stage, row_name


@dataclass(frozen=True)
class Merge(Stage):
    """Rows of several datasets, each checked: its image and its map can be read and fit.

    Args:
        shares: of each dataset's rows that are taken, in (0, 1], evenly spread over it; see [`shares_of`].
        columns_kept: beyond the schema; see [`common_columns`].
    """

    shares: tuple[float, ...]
    columns_kept: tuple[str, ...] = ()

    name: ClassVar[str] = "merge"

    def features(self, shard: Shard) -> Features:
        own = shard.features
        return Features(FEATURES | {name: OPTIONAL.get(name) or own[name] for name in self.columns_kept})

    def process(self, rows: Iterator[Row], shard: Shard) -> Iterator[Result]:
        share = self.shares[shard.dataset]
        for number, row in enumerate(rows, start=shard.first):
            if math.floor((number + 1) * share) == math.floor(number * share):
                yield LEFT_OUT
                continue
            try:
                size = decode_image(row).size
                decode_map(row, size)
                decode_ignore_map(row, size)
            except Exception as error:  # decoders raise many types
                yield Quarantined(row_name(row), str(error) or type(error).__name__)
                continue
            yield row


def common_columns(shards: Sequence[Shard]) -> tuple[str, ...]:
    """The columns beyond the schema that all shards have, and of one type: a dataset must have one schema. Those of `OPTIONAL` too
    that only some have, because without them pixels would count that must not.
    """
    first, *others = [shard.features for shard in shards]
    common = [
        name
        for name, feature in first.items()
        if name not in FEATURES and all(other.get(name) == feature for other in others)
    ]
    some = [name for name in OPTIONAL if name not in common and any(name in other for other in others + [first])]
    return (*common, *some)


def shares_of(rows: Sequence[int], weights: Sequence[float] | None) -> tuple[float, ...]:
    """Shares of datasets such that the rows taken are in the proportions of `weights`, as many as there can be, none twice.

    Args:
        rows: of each dataset.
        weights: positive numbers, one for each dataset; without them all rows are taken.

    Raises:
        ValueError: there are not as many weights as datasets, or one is not positive.
    """
    if weights is None:
        return (1.0,) * len(rows)
    if len(weights) != len(rows):
        raise ValueError(f"`weights` has {len(weights)} numbers for {len(rows)} datasets; give one for each.")
    if not all(weight > 0 and math.isfinite(weight) for weight in weights):
        raise ValueError(f"`weights` must be positive, found {list(weights)}. Leave out what is not wanted.")
    scale = min(count / weight for count, weight in zip(rows, weights))
    return tuple(scale * weight / count for count, weight in zip(rows, weights))
