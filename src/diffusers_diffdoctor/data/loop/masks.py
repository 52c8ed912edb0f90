# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What people have painted for a round, and what they have yet to."""

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

from ..annotate import DONE, SKIPPED, annotations_of, key_of
from ..schema import Row
from ..shards import Quarantined, find_shards, split_name


def rows_of(dataset: str) -> Iterator[Row]:
    """The rows of a dataset; those that cannot be read are passed over."""
    for shard in find_shards(*split_name(dataset)):
        yield from (row for row in shard.read() if not isinstance(row, Quarantined))


def masks_missing(dataset: str, queue: str | os.PathLike, copies: int = 1) -> tuple[int, int]:
    """How many masks of a dataset's images have yet to be painted, and how many are wanted in all. Somebody who has skipped an image
    is not waited for.

    Args:
        dataset: that is painted on.
        queue: folder of the masks, which need not exist yet.
        copies: annotators that are to look at each image.
    """
    keys = {key_of(row) for row in rows_of(dataset)}
    settled = [
        sum(annotation.state in (DONE, SKIPPED) for annotation in annotations_of(queue, key).values()) for key in keys
    ]
    return sum(max(0, copies - count) for count in settled), copies * len(keys)


def masks_of(dataset: str, queue: str | os.PathLike) -> dict[str, Any]:
    """What people painted: `images`, `with_artifacts`, `people`, `minutes` and `kinds` (of artifact -> images)."""
    images, wrong, people, seconds, kinds = 0, 0, set(), 0.0, Counter()
    for key in {key_of(row) for row in rows_of(dataset)}:
        done = {name: one for name, one in annotations_of(queue, key).items() if one.state == DONE}
        images += bool(done)
        wrong += any(one.mask.max() == 255 for one in done.values())
        people |= set(done)
        seconds += sum(one.seconds for one in done.values())
        kinds.update({kind for one in done.values() for kind in one.kinds})
    return {
        "images": images,
        "with_artifacts": wrong,
        "people": len(people),
        "minutes": round(seconds / 60, 1),
        "kinds": dict(kinds.most_common()),
    }
