# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What a reward is: a callable from images and prompts to a loss and a score per sample."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn


@dataclass
class RewardOutput:
    """Verdict on B images.

    Attributes:
        loss: (B,), what training minimises; differentiable with respect to the images where training needs that.
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
    """A user's callable, its answer brought to a `RewardOutput` and checked.

    Args:
        function: `(images, prompts)` -> a [`RewardOutput`], or one score per image, higher is better: a tensor (B,), or what has no
            gradient, a list of B numbers or a numpy array (B,).
    """

    def __init__(self, function: Callable):
        super().__init__()
        self.function = function
        self.__name__ = getattr(function, "__name__", type(function).__name__)
        self.reads_prompts = getattr(function, "reads_prompts", False)

    def forward(self, images: torch.Tensor, prompts: Sequence[str]) -> RewardOutput:
        output = self.function(images, prompts)
        if not isinstance(output, RewardOutput):
            scores = self._scores(output, len(images)).to(images.device)
            return RewardOutput(loss=-scores, score=scores.detach())
        if len(output.loss) != len(images):
            raise ValueError(
                f"The reward `{self.__name__}` returned {len(output.loss)} losses for {len(images)} images."
            )
        return output

    def _scores(self, output: Any, count: int) -> torch.Tensor:
        if isinstance(output, (list, tuple)) and output and all(isinstance(one, torch.Tensor) for one in output):
            output = torch.stack([one.squeeze() for one in output])
        elif isinstance(output, (list, tuple, np.ndarray)):
            try:
                array = np.asarray(output)
            except ValueError:  # lists of several lengths
                array = np.empty(0, dtype=object)
            if array.dtype.kind not in "fiub":
                raise TypeError(
                    f"The reward `{self.__name__}` must return numbers, one per image, got {output!r:.200}."
                )
            output = torch.from_numpy(array.astype(np.float32))
        if not isinstance(output, torch.Tensor):
            raise TypeError(
                f"The reward `{self.__name__}` must return a RewardOutput or a tensor of scores (B,), a list or an array of as many "
                f"numbers, got {type(output).__name__}."
            )
        if output.shape != (count,):
            raise ValueError(
                f"The reward `{self.__name__}` must return one score per image, shape ({count},), got {tuple(output.shape)}."
            )
        return output if output.is_floating_point() else output.float()
