# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Image-level feedback with the knowledge of a pixel-level detector."""

import os

import torch

from ..detector import ArtifactScorer
from ..loading import errors_named
from .scorer import Scorer


class ArtifactScorerReward(Scorer):
    """`1 - share of wrong pixels`, as an [`ArtifactScorer`] predicts it. Prompts are not read.

    Args:
        model: the scorer. It is set to `eval()` and frozen.

    Calling it with images, float (B, 3, H, W) in [0, 1], and B prompts returns scores (B,) in [0, 1], differentiable with respect to
    the images. As a reward ([`as_reward`]) the loss is the negative score.
    """

    __name__ = "artifact_scorer"
    published = (None, "config.json")
    reads_prompts = False

    def __init__(self, model: ArtifactScorer):
        super().__init__()
        self.model = model
        self.freeze()

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike) -> "ArtifactScorerReward":
        """From an id or folder of an [`ArtifactScorer`]."""
        with errors_named(name, f"The artifact scorer {str(name)!r}"):
            return cls(ArtifactScorer.from_pretrained(name, dtype=torch.float32))

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return 1 - self.model.share(images)
