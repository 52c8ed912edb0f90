# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What a reward is: a callable from images and prompts to a loss and a score per sample."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass
class RewardOutput:
    """Verdict on B images.

    Attributes:
        loss: (B,), what training minimises; differentiable with respect to the images.
        score: (B,), higher is better; for logging and evaluation.
        map: (B, 1, H, W) in [0, 1], 1 = artifact, or `None` for scorers of whole images.
    """

    loss: torch.Tensor
    score: torch.Tensor
    map: torch.Tensor | None = None

    def __post_init__(self):
        if self.loss.ndim != 1 or self.score.shape != self.loss.shape:
            raise ValueError(
                "A RewardOutput needs one loss and one score per sample, both of shape (B,); got loss "
                f"{tuple(self.loss.shape)} and score {tuple(self.score.shape)}."
            )


class _CallableReward(nn.Module):
    """A user's callable, its answer brought to a `RewardOutput` and checked."""

    def __init__(self, function: Callable):
        super().__init__()
        self.function = function
        self.__name__ = getattr(function, "__name__", type(function).__name__)

    def forward(self, images: torch.Tensor, prompts: Sequence[str]) -> RewardOutput:
        output = self.function(images, prompts)
        if isinstance(output, torch.Tensor):
            if output.shape != (len(images),):
                raise ValueError(
                    f"The reward `{self.__name__}` must return one score per image, shape ({len(images)},), got "
                    f"{tuple(output.shape)}."
                )
            return RewardOutput(loss=-output, score=output.detach())
        if not isinstance(output, RewardOutput):
            raise TypeError(
                f"The reward `{self.__name__}` must return a RewardOutput or a tensor of scores (B,), got "
                f"{type(output).__name__}."
            )
        if len(output.loss) != len(images):
            raise ValueError(
                f"The reward `{self.__name__}` returned {len(output.loss)} losses for {len(images)} images."
            )
        return output


def as_reward(obj: Any, **kwargs) -> nn.Module:
    """Make a reward of what users pass: a module from images (B, 3, H, W) and B prompts to a [`RewardOutput`].

    Args:
        obj: a detector (anything with a `confidence` method) becomes an [`ArtifactReward`]; a callable `(images,
            prompts)` may return a [`RewardOutput`], or a tensor (B,) of scores whose negative is then the loss. Rewards
            of this package are returned as they are.
        **kwargs: `selection` and `threshold` of the [`ArtifactReward`]; unused for everything else.

    Raises:
        TypeError: for anything else.
    """
    from .artifact import ArtifactReward

    if isinstance(obj, (ArtifactReward, CombinedReward, _CallableReward)):
        return obj
    if callable(getattr(obj, "confidence", None)):
        return ArtifactReward(obj, **kwargs)
    if callable(obj) and not isinstance(obj, type):
        return _CallableReward(obj)
    raise TypeError(
        "A reward must be a detector (an object with a `confidence(images)` method) or a callable `(images, prompts)` "
        f"that returns a RewardOutput or a tensor of scores (B,); got {obj!r}."
    )


class CombinedReward(nn.Module):
    """Weighted sum of several rewards; the map is the first that any of them gives.

    Args:
        rewards: what [`as_reward`] accepts.
        weights: one finite number per reward; 1 for each by default. Loss and score are the weighted sums.
    """

    def __init__(self, rewards: Sequence[Any], weights: Sequence[float] | None = None):
        super().__init__()
        self.rewards = nn.ModuleList([as_reward(reward) for reward in rewards])
        self.weights = [1.0] * len(self.rewards) if weights is None else [float(weight) for weight in weights]
        if not len(self.rewards):
            raise ValueError("rewards is empty; pass at least one reward.")
        if len(self.weights) != len(self.rewards):
            raise ValueError(f"Got {len(self.weights)} weights for {len(self.rewards)} rewards; pass one for each.")
        if not all(math.isfinite(weight) for weight in self.weights):
            raise ValueError(f"weights must be finite, got {self.weights}.")

    def forward(self, images: torch.Tensor, prompts: Sequence[str]) -> RewardOutput:
        outputs = [reward(images, prompts) for reward in self.rewards]
        return RewardOutput(
            loss=sum(weight * output.loss for weight, output in zip(self.weights, outputs)),
            score=sum(weight * output.score for weight, output in zip(self.weights, outputs)),
            map=next((output.map for output in outputs if output.map is not None), None),
        )
