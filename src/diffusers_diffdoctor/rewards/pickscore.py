# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""PickScore: a CLIP that learned which of two images people pick."""

import os
from pathlib import Path

import torch
from transformers import CLIPModel

from .clip import CLIPScorer, load_processor
from .published import TOKENIZER_FILES, load_pretrained


PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class PickScoreReward(CLIPScorer):
    """Which image a user would pick for a prompt: `exp(logit_scale) * cos(image, text)` (Pick-a-Pic, arXiv 2305.01569).

    The published weights (ViT-H/14, 986 M parameters) are under the MIT licence. Their scale is 100, their scores lie about 20: a
    difference of d means that the better image is picked with the probability `sigmoid(d)`.

    Calling it with images, float (B, 3, H, W) in [0, 1], and B prompts returns scores (B,), differentiable with respect to the
    images. As a reward ([`as_reward`]) the loss is the negative score.
    """

    __name__ = "pickscore"
    published = ("yuvalkirstain/PickScore_v1", "config.json")

    @classmethod
    def from_pretrained(
        cls, weights: str | os.PathLike = "yuvalkirstain/PickScore_v1", processor: str | os.PathLike | None = None
    ) -> "PickScoreReward":
        """From a `CLIPModel` of transformers.

        Args:
            weights: id or folder.
            processor: id or folder of the tokenizer and image processor; those beside the weights where there are any, else
                `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`, as the authors do.

        Raises:
            ValueError: a tensor is missing, unexpected, of another shape or not finite, or a file is damaged.
            OSError: there is no such model.
        """
        if processor is None:
            beside = any(Path(weights, name).is_file() for name in TOKENIZER_FILES)
            processor = weights if beside else PROCESSOR
        return cls(load_pretrained(CLIPModel, weights), load_processor(processor))

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return self.model.logit_scale.exp().float() * self.cosine(images, prompts)
