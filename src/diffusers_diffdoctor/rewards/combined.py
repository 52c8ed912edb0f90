# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Rewards of what users pass, one or several with weights."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..detector import ArtifactScorer
from .artifact import ArtifactReward
from .artifact_scorer import ArtifactScorerReward
from .base import CallableReward, RewardOutput
from .registry import named_reward


def as_reward(obj: Any, **kwargs) -> nn.Module:
    """Make a reward of what users pass: a module from images (B, 3, H, W) and B prompts to a [`RewardOutput`].

    Args:
        obj: a detector (anything with a `confidence` method) becomes an [`ArtifactReward`], an [`ArtifactScorer`] scores whole
            images; a callable `(images,
            prompts)` may return a [`RewardOutput`], or scores, whose negative is then the loss: a tensor (B,), or without a
            gradient a list of B numbers or an array (B,). Rewards of this package are returned as they are.
        **kwargs: `selection` and `threshold` of the [`ArtifactReward`]; unused for everything else.

    Raises:
        TypeError: for anything else.
        ValueError, OSError: a text that names no reward, or weights that are missing or wrong.
    """
    if isinstance(obj, (ArtifactReward, CombinedReward, CallableReward)):
        return obj
    if isinstance(obj, str):
        obj = named_reward(obj)
    if isinstance(obj, ArtifactScorer):  # whose map is of one piece
        obj = ArtifactScorerReward(obj)
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
    detached), the map is the first that any of them gives, and `parts` has the scores of several rewards. A reward of weight
    0 is scored without gradient and has no share in the loss: a metric.

    Raises:
        ValueError: no reward, another number of weights than of rewards, or a weight that is not finite; and of a call, images
            that require a gradient and a reward of another weight than 0 whose loss has none with respect to them.
        FloatingPointError: of a call, a reward of another weight than 0 that returns nan or infinity for finite images.
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
        differentiated = torch.is_grad_enabled() and images.requires_grad
        outputs = []
        for name, weight, reward in zip(self.names, self.weights, self.rewards):
            with torch.set_grad_enabled(differentiated and weight != 0):
                output = reward(images, prompts)
            if differentiated and weight != 0 and not _depends_on(output.loss, images):
                raise ValueError(
                    f"The reward `{name}` gives no gradient: its loss does not depend on the images in a way that can be "
                    "differentiated (detached, constant, or computed under `no_grad` or in another library), so nothing would "
                    "be learnt from it. Compute it from `images` with torch, also where it has nothing to say "
                    "(`0 * images.mean(dim=(1, 2, 3))`), set its entry in `reward_weights` to 0 to log it only, or take policy "
                    "gradients (DDPO), which need none from the reward."
                )
            if weight != 0:
                _check_finite(name, output, images, prompts)
            outputs.append(output)
        # not times 0, which would let a metric's nan through
        weighted = [(weight, output) for weight, output in zip(self.weights, outputs) if weight != 0]
        nothing = images.new_zeros(len(images))
        return RewardOutput(
            loss=sum(weight * output.loss for weight, output in weighted) if weighted else nothing,
            score=sum(weight * output.score.detach() for weight, output in weighted) if weighted else nothing,
            map=next((output.map for output in outputs if output.map is not None), None),
            parts={name: output.score.detach() for name, output in zip(self.names, outputs)} if outputs[1:] else {},
        )


def _check_finite(name: str, output: RewardOutput, images: torch.Tensor, prompts: Sequence[str]) -> None:
    """Images that are not finite are not the reward's fault: they pass, for whoever made them to see."""
    finite = torch.isfinite(output.loss.detach()) & torch.isfinite(output.score.detach())
    bad = (~finite & torch.isfinite(images.detach()).flatten(1).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise FloatingPointError(
            f"The reward `{name}` returned {output.loss[bad[0]].item()} for {len(bad)} of {len(images)} images, whose own values are "
            f"finite; the first has the prompt {prompts[bad[0]]!r}. Return a finite score for every image, or set the reward's entry "
            "in `reward_weights` to 0 to log it only."
        )


def _depends_on(loss: torch.Tensor, images: torch.Tensor) -> bool:
    """Whether a backward pass from the loss comes to the images. That the loss requires a gradient does not say it: a model
    that nobody froze gives it one, of detached images too."""
    if loss is images:
        return True
    goal, todo, seen = images.grad_fn, [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if node is goal or getattr(node, "variable", None) is images:
            return True
        seen.add(node)
        todo += [function for function, _ in node.next_functions]
    return False
