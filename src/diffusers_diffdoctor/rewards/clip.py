# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""CLIP score, and what rewards that are a CLIP have in common."""

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoProcessor, CLIPModel

from ..loading import errors_named
from .preprocessing import CropToSquare
from .published import load_pretrained
from .scorer import Scorer


class CLIPScorer(Scorer):
    """A CLIP with its tokenizer and preprocessing.

    Args:
        model: a [`~transformers.CLIPModel`]. It is set to `eval()` and frozen.
        processor_or_tokenizer: a [`~transformers.CLIPProcessor`], whose image processor then names size, crop, mean and
            standard deviation; or a tokenizer, then these are OpenAI's, at the size of the vision model.
    """

    def __init__(self, model: nn.Module, processor_or_tokenizer: Any):
        super().__init__()
        for name in ("get_image_features", "get_text_features"):
            if not hasattr(model, name):
                raise TypeError(f"model must be a CLIPModel; {type(model).__name__} has no `{name}`.")
        if not callable(processor_or_tokenizer):
            raise TypeError(f"processor_or_tokenizer must be one, got {type(processor_or_tokenizer).__name__}.")
        self.model = model
        self.tokenizer = getattr(processor_or_tokenizer, "tokenizer", processor_or_tokenizer)
        image_processor = getattr(processor_or_tokenizer, "image_processor", None)
        if image_processor is None:
            side = model.config.vision_config.image_size
            self.preprocess = CropToSquare(side, (side, side))
        else:
            self.preprocess = CropToSquare.of_processor(image_processor)
        self.freeze()

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, F), not normalised; images (B, 3, H, W) in [0, 1]."""
        pixel_values = self.preprocess(images).to(self.model.dtype)
        return self.model.get_image_features(pixel_values=pixel_values).pooler_output.float()

    @torch.no_grad()
    def text_features(self, prompts: list[str]) -> torch.Tensor:
        """(B, F), not normalised."""
        tokens = self.tokenizer(
            prompts,
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.model.device)
        return self.model.get_text_features(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output.float()

    def cosine(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """(B,), in [-1, 1]."""
        return F.cosine_similarity(self.image_features(images), self.text_features(prompts), dim=-1)


class CLIPReward(CLIPScorer):
    """How well images fit their prompts: `100 * max(cos(image, text), 0)` (CLIPScore, arXiv 2104.08718; "CLIP-T").

    The default weights, OpenAI's ViT-L/14 (428 M parameters), are under the MIT licence.

    Args:
        model: a [`~transformers.CLIPModel`]. It is set to `eval()` and frozen.
        processor_or_tokenizer: a [`~transformers.CLIPProcessor`], whose image processor then names size, crop, mean and
            standard deviation; or a tokenizer, then these are OpenAI's, at the size of the vision model.

    Calling it with images, float (B, 3, H, W) in [0, 1], and B prompts returns scores (B,) in [0, 100], differentiable with
    respect to the images. As a reward ([`as_reward`]) the loss is the negative score.
    """

    __name__ = "clip"
    published = ("openai/clip-vit-large-patch14", "config.json")

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike = "openai/clip-vit-large-patch14") -> "CLIPReward":
        """From an id or folder of transformers with model and processor.

        Raises:
            ValueError: a tensor is missing, unexpected, of another shape or not finite, or a file is damaged.
            OSError: there is no such model.
        """
        return cls(load_pretrained(CLIPModel, name), load_processor(name))

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return 100 * self.cosine(images, prompts).clamp(min=0)


def load_processor(name: str | os.PathLike) -> Any:
    with errors_named(name, f"The processor {str(name)!r}"):
        return AutoProcessor.from_pretrained(name)
