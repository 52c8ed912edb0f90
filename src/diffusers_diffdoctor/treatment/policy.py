# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The maths of policy gradients on images: how much better than expected a sample was, and what is then raised."""

from collections.abc import Mapping, Sequence

import torch


# Added to a standard deviation: where all samples of a group are scored alike, none was better than another. As in the code of
# Flow-GRPO.
EPSILON = 1e-4


def normalised(scores: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """`(score - mean) / (std + 1e-4)`, with the mean and the population's standard deviation of `like`, or of the scores."""
    like = scores if like is None else like
    return (scores - like.mean()) / (like.std(correction=0) + EPSILON)


def group_advantages(scores: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """The advantage of each sample among those of its prompt: GRPO (arXiv 2402.03300, eq. 4), on images Flow-GRPO
    (arXiv 2505.05470, eq. 4).

    Args:
        scores: (N,), higher is better.
        prompts: N texts; equal ones are a group.

    Returns:
        (N,): 0 for a sample that is alone.
    """
    advantages = torch.empty_like(scores)
    for prompt in dict.fromkeys(prompts):
        rows = torch.tensor([other == prompt for other in prompts])
        advantages[rows] = normalised(scores[rows])
    return advantages


class ScoreHistory:
    """The last scores of every prompt, against which new ones are compared: the running statistics of DDPO
    (arXiv 2305.13301, appendix), for prompts that come again.

    Args:
        size: scores kept for each prompt.
        minimum: of so many on, a prompt has statistics of its own; until then those of the rollout stand for them.

    Attributes:
        scores: by prompt, the newest last.
    """

    def __init__(self, size: int, minimum: int, scores: Mapping[str, Sequence[float]] | None = None):
        self.size, self.minimum = size, minimum
        self.scores = {prompt: list(values) for prompt, values in (scores or {}).items()}

    def advantages(self, scores: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Take the scores (N,) of a rollout in, and return the advantage of each, (N,)."""
        advantages = torch.empty_like(scores)
        for prompt in dict.fromkeys(prompts):
            rows = torch.tensor([other == prompt for other in prompts])
            kept = [*self.scores.get(prompt, ()), *scores[rows].tolist()][-self.size :]
            self.scores[prompt] = kept
            like = torch.tensor(kept, dtype=scores.dtype) if len(kept) >= self.minimum else scores
            advantages[rows] = normalised(scores[rows], like)
        return advantages


def clipped_objective(ratio: torch.Tensor, advantages: torch.Tensor, clip_range: float) -> torch.Tensor:
    """`-min(ratio * A, clip(ratio, 1 - c, 1 + c) * A)`: PPO (arXiv 1707.06347, eq. 7).

    Args:
        ratio: (B,), how much likelier a step is now than it was when it was drawn.
        advantages: (B,).
        clip_range: c, above 0.

    Returns:
        (B,), to be minimised. Without gradient where the ratio has left the range to the side that the advantage favours.
    """
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)
