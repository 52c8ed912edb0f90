# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Where gradient flows: which denoising steps of a rollout carry it, and how it gets there from the image.

One small class for each way, by name in [`PLACEMENTS`]. A way of your own is a [`Placement`] put there under a name.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch


def window_length(fraction: float, steps: int) -> int:
    """How many of `steps` carry gradient: `fraction` of them, rounded up (ours), at least one."""
    return max(1, math.ceil(fraction * steps - 1e-9))  # 1e-9: 0.3 * 10 is a little more than 3


@dataclass(frozen=True)
class Steps:
    """What was chosen for one rollout.

    Args:
        chosen: steps, counted from 0, in which what the denoiser says carries gradient to the weights.
        chained: whether the denoiser's input carries it on to the steps before. If not, a chosen step reaches the image through
            the scheduler's arithmetic alone, its denoiser is run without keeping anything and once more in the backward pass: so
            one step's graph is all that is held, whatever the number of steps.
        image_of: the step whose belief in the clean image is the image; None for the last, as the pipeline draws.
        repeats: how often the last step is taken, each time but the first from fresh noise on its own result.
        leap: two steps of which each leaps over those that follow, to the second and to the image; None for none.
    """

    chosen: frozenset[int]
    chained: bool = True
    image_of: int | None = None
    repeats: int = 1
    leap: "Leap | None" = None


class Placement:
    """Which steps carry gradient. Subclasses are dataclasses: what they take is `gradient_placement_kwargs`."""

    def choose(self, total: int, generator: torch.Generator) -> Steps:
        """The steps of one rollout.

        Args:
            total: number of the scheduler's own steps.
            generator: whatever is drawn is drawn from it.
        """
        raise NotImplementedError

    def graphs(self, total: int) -> int:
        """How many graphs of the denoiser are held at once, at most."""
        raise NotImplementedError

    def describe(self, total: int) -> str:
        """In a few words, after "gradient through"."""
        raise NotImplementedError


def _check(name: str, value: float, condition: bool, expected: str) -> None:
    if not condition:
        raise ValueError(f"`{name}` is {value!r}, but must be {expected}.")


@dataclass(frozen=True)
class Last(Placement):
    """
    The last steps, through the latents from one to the next: DiffDoctor (arXiv 2501.12382), known as DRaFT-K (arXiv 2309.17400).

    Args:
        fraction: share of the steps, in (0, 1]; rounded up (ours).
    """

    fraction: float = 0.25

    def __post_init__(self):
        _check(
            "gradient_fraction", self.fraction, 0 < self.fraction <= 1, "in (0, 1]: a window of 0 steps trains nothing"
        )

    def choose(self, total, generator):
        return Steps(frozenset(range(total - window_length(self.fraction, total), total)))

    def graphs(self, total):
        return window_length(self.fraction, total)

    def describe(self, total):
        return f"the last {self.graphs(total)} of {total} steps"


@dataclass(frozen=True)
class RandomWindow(Last):
    """The last K steps, K drawn anew for each rollout from 1 to `fraction` of all: AlignProp (arXiv 2310.03739), there of all."""

    def choose(self, total, generator):
        most = window_length(self.fraction, total)
        length = int(torch.randint(1, most + 1, (1,), generator=generator))
        return Steps(frozenset(range(total - length, total)))

    def describe(self, total):
        return f"the last 1 to {self.graphs(total)} of {total} steps"


@dataclass(frozen=True)
class OneLateStep(Last):
    """
    One step, drawn from the last `fraction` of all; the image is the clean one that it believes in: ReFL (arXiv 2304.05977).

    The steps after it are not taken.
    """

    def choose(self, total, generator):
        late = window_length(self.fraction, total)
        step = total - 1 - int(torch.randint(late, (1,), generator=generator))
        return Steps(frozenset({step}), image_of=step)

    def graphs(self, total):
        return 1

    def describe(self, total):
        return f"one of the last {window_length(self.fraction, total)} of {total} steps"


@dataclass(frozen=True)
class LowVariance(Placement):
    """
    The last step, n times: the first as it comes, the others from fresh noise on the image that came: DRaFT-LV (arXiv 2309.17400).

    Args:
        repeats: n, at least 1; every one has a graph of the denoiser, and its image one of the decoder.
    """

    repeats: int = 2

    def __post_init__(self):
        _check("repeats", self.repeats, self.repeats >= 1, "at least 1")

    def choose(self, total, generator):
        return Steps(frozenset({total - 1}), repeats=self.repeats)

    def graphs(self, total):
        return self.repeats

    def describe(self, total):
        return f"the last of {total} steps, taken {self.repeats} times"


@dataclass(frozen=True)
class Sparse(Placement):
    """
    Some steps of the whole rollout, each alone: FlowBP-Sparse (arXiv 2606.11075), here with any scheduler.

    The gradient of the true image reaches what the denoiser said in a step by the scheduler's arithmetic, as if the later steps
    would say what they said; for Euler's steps of a flow that is the length of the step. One step's graph is held, whatever
    the number of steps.

    Args:
        steps: how many, at least 1.
        bias: the i-th step is drawn with the weight (i + 1) ** bias: 0 for all alike.
    """

    steps: int = 3
    bias: float = 2.0

    def __post_init__(self):
        _check("steps", self.steps, self.steps >= 1, "at least 1")
        _check("bias", self.bias, math.isfinite(self.bias) and self.bias >= 0, "finite and at least 0")

    def choose(self, total, generator):
        weights = torch.arange(1, total + 1, dtype=torch.float64) ** self.bias
        chosen = torch.multinomial(weights, min(self.steps, total), generator=generator)
        return Steps(frozenset(chosen.tolist()), chained=False)

    def graphs(self, total):
        return 1

    def describe(self, total):
        return f"{min(self.steps, total)} of {total} steps, each alone"


@dataclass(frozen=True)
class Leap(Placement):
    """
    Two steps k < j, drawn from all: one leap from k to j, one from j to the image, and what the rollout really made of them in the
    place of where they land: LeapAlign (arXiv 2604.15311).

    Args:
        discount: of the gradient that reaches the first leap through the denoiser of the second, in [0, 1].
        tolerance: a sample counts 1 / (d_j + d_0), where d are the mean distances of the leaps' ends from the true latents, but
            no less than this each. 0 for equal weights.
    """

    discount: float = 0.3
    tolerance: float = 0.1

    def __post_init__(self):
        _check("discount", self.discount, 0 <= self.discount <= 1, "in [0, 1]")
        _check(
            "tolerance", self.tolerance, math.isfinite(self.tolerance) and self.tolerance >= 0, "finite and at least 0"
        )

    def choose(self, total, generator):
        chosen = torch.randperm(total, generator=generator)[:2].tolist()
        return Steps(frozenset(chosen), chained=False, leap=self)

    def graphs(self, total):
        return 1

    def describe(self, total):
        return f"two leaps over {total} steps"


PLACEMENTS: dict[str, type[Placement]] = {
    "last": Last,
    "refl": OneLateStep,
    "alignprop": RandomWindow,
    "draft_lv": LowVariance,
    "sparse": Sparse,
    "leap": Leap,
}


def placement_of(name: str, fraction: float = 0.25, settings: Mapping[str, Any] | None = None) -> Placement:
    """The placement of a name.

    Args:
        name: one of [`PLACEMENTS`].
        fraction: for those that take one and are not given it in `settings`.
        settings: what else it takes.

    Raises:
        ValueError: an unknown name, a setting that it does not take or that cannot work.
    """
    if name not in PLACEMENTS:
        raise ValueError(f"`gradient_placement` is {name!r}, but must be one of {', '.join(PLACEMENTS)}.")
    taken = {field.name for field in fields(PLACEMENTS[name])}
    settings = dict(settings or {})
    if unknown := sorted(set(settings) - taken):
        raise ValueError(
            f"`gradient_placement_kwargs` has {unknown}, which {name!r} does not take: it takes {sorted(taken) or 'nothing'}."
        )
    if "fraction" in taken:
        settings.setdefault("fraction", fraction)
    try:
        return PLACEMENTS[name](**settings)
    except TypeError as error:
        raise ValueError(f"`gradient_placement_kwargs` is {settings}, which {name!r} cannot take: {error}") from error
