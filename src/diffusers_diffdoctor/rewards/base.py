# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What a reward is: a callable from images and prompts to a loss and a score per sample."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass
class RewardOutput:
    """Verdict on B images.

    Attributes:
        loss: (B,), what training minimises; differentiable with respect to the images.
        score: (B,), higher is better; for logging and evaluation.
        map: (B, 1, H, W) in [0, 1], 1 = artifact, or `None` for scorers of whole images.
        parts: where several rewards were combined, the score (B,) of each by its name, not weighted.
    """

    loss: torch.Tensor
    score: torch.Tensor
    map: torch.Tensor | None = None
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self):
        if self.loss.ndim != 1 or self.score.shape != self.loss.shape:
            raise ValueError(
                "A RewardOutput needs one loss and one score per sample, both of shape (B,); got loss "
                f"{tuple(self.loss.shape)} and score {tuple(self.score.shape)}."
            )


class CallableReward(nn.Module):
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
