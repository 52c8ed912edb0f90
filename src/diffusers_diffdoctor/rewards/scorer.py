# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What all scorers of whole images have in common."""

from collections.abc import Sequence

import torch
from torch import nn


class Scorer(nn.Module):
    """A frozen model of images and prompts in evaluation mode. A subclass has `__name__` and `score(images, prompts)`.

    Calling it with images, float (B, 3, H, W) in [0, 1], and B prompts returns scores (B,) in float32, higher is better,
    differentiable with respect to the images. As a reward ([`as_reward`]) the loss is the negative score.
    """

    reads_prompts = True
    published: tuple[str | None, str]  # id on the Hub, and the file of the weights, or one beside them

    def freeze(self) -> None:
        """To be called when all is built."""
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True):
        return super().train(False)

    def forward(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images must be float (B, 3, H, W) in [0, 1], got {images.dtype} {tuple(images.shape)}.")
        if isinstance(prompts, str) or len(prompts) != len(images):
            raise ValueError(f"Pass a list of one prompt per image: {len(images)} images, prompts {prompts!r:.80}.")
        device = next(self.parameters()).device
        return self.score(images.to(device), list(prompts)).to(images.device)

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        raise NotImplementedError
