# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Rewards of what users pass, one or several with weights."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .artifact import ArtifactReward
from .base import CallableReward, RewardOutput


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
    if isinstance(obj, (ArtifactReward, CombinedReward, CallableReward)):
        return obj
    if callable(getattr(obj, "confidence", None)):
        return ArtifactReward(obj, **kwargs)
    if callable(obj) and not isinstance(obj, type):
        return CallableReward(obj)
    raise TypeError(
        "A reward must be a detector (an object with a `confidence(images)` method) or a callable `(images, prompts)` "
        f"that returns a RewardOutput or a tensor of scores (B,); got {obj!r}."
    )


class CombinedReward(nn.Module):
    """Weighted sum of one or several rewards, `sum_k w_k * reward_k`.

    Args:
        rewards: what [`as_reward`] accepts. Each is known by its `__name__`; a name that comes again gets a number.
        weights: one finite number per reward; 1 for each by default.
        **kwargs: for [`as_reward`].

    Calling it with images and prompts returns a [`RewardOutput`]: loss and score are the weighted sums (the score
    detached), the map is the first that any of them gives, and `parts` has the scores of several rewards.

    Raises:
        ValueError: no reward, another number of weights than of rewards, or a weight that is not finite.
    """

    def __init__(self, rewards: Sequence[Any], weights: Sequence[float] | None = None, **kwargs):
        super().__init__()
        self.rewards = nn.ModuleList([as_reward(reward, **kwargs) for reward in rewards])
        self.weights = [1.0] * len(self.rewards) if weights is None else [float(weight) for weight in weights]
        if not len(self.rewards):
            raise ValueError("No reward was given; pass at least one.")
        if len(self.weights) != len(self.rewards):
            raise ValueError(
                f"`reward_weights` has {len(self.weights)} entries for {len(self.rewards)} rewards; give one for each."
            )
        if not all(math.isfinite(weight) for weight in self.weights):
            raise ValueError(f"`reward_weights` must be finite, found {self.weights}.")
        self.names: list[str] = []
        for reward in self.rewards:
            name = first = getattr(reward, "__name__", type(reward).__name__)
            again = 1
            while name in self.names:
                name, again = f"{first}_{again}", again + 1
            self.names.append(name)

    def forward(self, images: torch.Tensor, prompts: Sequence[str]) -> RewardOutput:
        outputs = [reward(images, prompts) for reward in self.rewards]
        return RewardOutput(
            loss=sum(weight * output.loss for weight, output in zip(self.weights, outputs)),
            score=sum(weight * output.score.detach() for weight, output in zip(self.weights, outputs)),
            map=next((output.map for output in outputs if output.map is not None), None),
            parts={name: output.score.detach() for name, output in zip(self.names, outputs)} if outputs[1:] else {},
        )
