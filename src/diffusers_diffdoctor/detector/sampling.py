# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""In which order the detector's trainer sees the rows of a dataset."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ..seeds import derive_seed


DRAW = "draw"  # key of a row under which it carries its `Draw`


class Draw(NamedTuple):
    """One row that a sampler drew.

    It says all that is random about it later, in whatever process that happens: `epoch` and `place`, from 0, in the order of that
    epoch over all processes, are never the same for two draws, even of one row.
    """

    epoch: int
    place: int
    number: int  # of the row in its dataset


class EpochSampler(torch.utils.data.Sampler[Draw]):
    """Every row once an epoch, in an order that the seed and `epoch` alone decide.

    Args:
        count: rows of the dataset.
        seed: decides the order.
        shuffle: else in the order of the dataset.
    """

    def __init__(self, count: int, seed: int = 0, shuffle: bool = True):
        self.count, self.seed, self.shuffle, self.epoch = count, seed, shuffle, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Draw]:
        epoch, order = self.epoch, range(self.count)
        if self.shuffle:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
            order = torch.randperm(self.count, generator=generator).tolist()
        return (Draw(epoch, place, number) for place, number in enumerate(order))


class DrawnRows(torch.utils.data.Dataset):
    """The rows of a dataset, taken by their `Draw`, which each of them carries."""

    def __init__(self, rows: Any):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        return {**self.rows[draw.number], DRAW: draw}
