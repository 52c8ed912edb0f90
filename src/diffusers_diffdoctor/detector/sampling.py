# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""In which order the detector's trainer sees the rows of its datasets, and how often.

A sampler lists the draws of a whole epoch, which follow from the seed and the number of the epoch alone. Every process makes the
same list, and accelerate gives batch i of it to process i modulo their number (`BatchSamplerShard`). So the rows of an update do
not depend on the number of processes, and a run that resumes in the middle of an epoch skips what it has seen.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ..seeds import derive_seed


__all__ = ["DRAW", "Draw", "DrawnRows", "EpochSampler", "Group", "GroupSampler", "groups_of"]

DRAW = "draw"  # key of a row under which it carries its `Draw`


class Draw(NamedTuple):
    """One row that a sampler drew.

    It says all that is random about it later, in whatever process that happens: `epoch` and `place`, from 0, in the order of that
    epoch over all processes, are never the same for two draws, even of one row.
    """

    epoch: int
    place: int
    number: int  # of the row in its dataset


@dataclass(frozen=True)
class Group:
    """Rows that are drawn in turn: each of them once before any of them again.

    Args:
        name: says what they are; decides their order together with the seed.
        rows: their numbers, at least one.
        share: of all draws, in (0, 1].
    """

    name: str
    rows: np.ndarray
    share: float


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
        order = _permutation(self.count, self.seed, "order", self.epoch) if self.shuffle else np.arange(self.count)
        return _draws(self.epoch, order)


class GroupSampler(torch.utils.data.Sampler[Draw]):
    """Rows of several groups by their shares, in an order that the seed and `epoch` alone decide.

    The number of a group's draws is the same in every epoch: its share of `count`, rounded. A group goes on with its turn where the
    epoch before left off, so that over epochs, too, no row is drawn twice before all others of its group were drawn once.

    Args:
        groups: whose shares add up to 1.
        count: draws of an epoch.
        seed: decides the order.

    Raises:
        ValueError: the share of a group is less than one draw.
    """

    def __init__(self, groups: Sequence[Group], count: int, seed: int = 0):
        self.groups, self.count, self.seed, self.epoch = groups, count, seed, 0
        self.draws = _apportioned([group.share for group in groups], count)
        missing = [group.name for group, draws in zip(groups, self.draws) if draws == 0]
        if missing:
            raise ValueError(
                f"{missing[0]!r} gets a share of {groups[self.draws.index(0)].share:.2g} of the {count} draws of an epoch, which is "
                "less than one. Give it a higher weight, or leave it out with the weight 0."
            )

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Draw]:
        groups = np.repeat(np.arange(len(self.groups)), self.draws)
        groups = groups[_permutation(self.count, self.seed, "order", self.epoch)]
        order = np.empty(self.count, np.int64)
        for index, (group, draws) in enumerate(zip(self.groups, self.draws)):
            order[groups == index] = self._turns(group, self.epoch * draws, draws)
        return _draws(self.epoch, order)

    def _turns(self, group: Group, first: int, count: int) -> np.ndarray:
        """Draws `first` to `first + count` of a group, counted from the beginning of the run."""
        size = len(group.rows)
        rounds = range(first // size, (first + count - 1) // size + 1)
        rows = [group.rows[_permutation(size, self.seed, "group", group.name, number)] for number in rounds]
        start = first - rounds[0] * size
        return np.concatenate(rows)[start : start + count]

    def plan(self) -> str:
        """A line for each group: how many rows it has and how often they are drawn."""
        return "\n".join(
            f"{group.name}: {len(group.rows)} rows, {draws} draws an epoch ({100 * draws / self.count:.1f} %), each row "
            f"{draws / len(group.rows):.3g} times"
            for group, draws in zip(self.groups, self.draws)
        )


def groups_of(
    sources: Sequence[str | None] | None,
    classes: Sequence[Iterable[str]] | None = None,
    weights: Mapping[str, float] | None = None,
) -> list[Group]:
    """Rows by their source, and within a source by their class; sources by their weights, the classes of one source equally.

    Args:
        sources: for each row the name of its source; used with `weights` only.
        classes: for each row the names of its classes; it is drawn as one of each. Rows without a class are a class of their own.
        weights: for each source a number of at least 0; without them all rows are one source.

    Raises:
        ValueError: a source has no weight, or a weight no source.
    """
    count = len(sources if classes is None else classes)
    names = np.full(count, "", object) if weights is None else np.array([str(name) for name in sources], object)
    weights = {"": 1.0} if weights is None else weights
    found = sorted(set(names))
    if set(found) != set(weights):
        raise ValueError(
            f"`source_weights` has weights of {sorted(weights)}, but the sources are {found}. Give each source one weight; 0 "
            "leaves it out."
        )
    total, groups = sum(weights.values()), []
    for source in found:
        if weights[source] == 0:
            continue
        rows = np.flatnonzero(names == source)
        members = {"": rows}
        if classes is not None:
            by_class = defaultdict(list)
            for row in rows.tolist():
                for name in dict.fromkeys(classes[row]) or ("",):
                    by_class[name].append(row)
            members = {name: np.array(by_class[name]) for name in sorted(by_class)}
        for name, its_rows in members.items():
            whole = " / ".join(part for part in (source, name or ("no class" if classes is not None else "")) if part)
            groups.append(Group(whole, its_rows, weights[source] / total / len(members)))
    return groups


class DrawnRows(torch.utils.data.Dataset):
    """The rows of a dataset, taken by their `Draw`.

    Args:
        rows: a dataset.
        tell: whether a row carries its draw.
    """

    def __init__(self, rows: Any, tell: bool = True):
        self.rows, self.tell = rows, tell

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        row = self.rows[draw.number]
        return {**row, DRAW: draw} if self.tell else row


def _permutation(count: int, *seed: int | str) -> np.ndarray:
    return torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed(*seed))).numpy()


def _draws(epoch: int, order: np.ndarray) -> Iterator[Draw]:
    return (Draw(epoch, place, number) for place, number in enumerate(order.tolist()))


def _apportioned(shares: Sequence[float], count: int) -> list[int]:
    """Whole numbers in the proportion of `shares` that add up to `count`: largest remainders are rounded up."""
    exact = [share * count for share in shares]
    whole = [math.floor(value + 1e-9) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda index: whole[index] - exact[index])
    for index in by_remainder[: count - sum(whole)]:
        whole[index] += 1
    return whole
