# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""CLIP score on plain transformers models, with a preprocessing that gradients pass."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD


class ClipScore(nn.Module):
    """How well images fit their prompts: `100 * max(cos(image, text), 0)` (CLIPScore, arXiv 2104.08718; "CLIP-T").

    Args:
        model: a [`~transformers.CLIPModel`]. It is set to `eval()` and frozen.
        processor_or_tokenizer: a [`~transformers.CLIPProcessor`], whose image processor then names size, crop, mean and
            standard deviation; or a tokenizer, then these are OpenAI's, at the size of the vision model.

    Calling it with images, float (B, 3, H, W) in [0, 1], and B prompts returns scores (B,) in [0, 100], differentiable with
    respect to the images. As a reward ([`as_reward`]) the loss is the negative score.
    """

    __name__ = "clip_score"

    def __init__(self, model: nn.Module, processor_or_tokenizer: Any):
        super().__init__()
        for name in ("get_image_features", "get_text_features"):
            if not hasattr(model, name):
                raise TypeError(f"model must be a CLIPModel; {type(model).__name__} has no `{name}`.")
        if not callable(processor_or_tokenizer):
            raise TypeError(f"processor_or_tokenizer must be one, got {type(processor_or_tokenizer).__name__}.")
        self.model = model
        self.tokenizer = getattr(processor_or_tokenizer, "tokenizer", processor_or_tokenizer)
        side = model.config.vision_config.image_size
        self.size, self.crop = {"shortest_edge": side}, (side, side)
        self.mean, self.std = OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
        image_processor = getattr(processor_or_tokenizer, "image_processor", None)
        if image_processor is not None:
            self.size = dict(image_processor.size)
            self.crop = (image_processor.crop_size["height"], image_processor.crop_size["width"])
            self.mean, self.std = image_processor.image_mean, image_processor.image_std
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True):
        return super().train(False)

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1] -> normalised pixels: bicubic resizing of the short side, central crop."""
        height, width = images.shape[-2:]
        edge = self.size.get("shortest_edge")
        if edge:
            size = (edge, int(edge * width / height)) if height <= width else (int(edge * height / width), edge)
        else:
            size = (self.size["height"], self.size["width"])
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        if size != (height, width):
            images = F.interpolate(images, size=size, mode="bicubic", align_corners=False, antialias=True)
            images = images.clamp(0, 1)  # bicubic overshoots; 8-bit pictures saturate there
        crop_height, crop_width = self.crop
        if crop_height > size[0] or crop_width > size[1]:
            raise ValueError(
                f"The crop {self.crop} is larger than the resized image {size}; correct the processor's size."
            )
        top, left = (size[0] - crop_height) // 2, (size[1] - crop_width) // 2
        images = images[..., top : top + crop_height, left : left + crop_width]
        mean, std = (images.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (images - mean) / std

    def forward(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images must be float (B, 3, H, W) in [0, 1], got {images.dtype} {tuple(images.shape)}.")
        if isinstance(prompts, str) or len(prompts) != len(images):
            raise ValueError(f"Pass a list of one prompt per image: {len(images)} images, prompts {prompts!r:.80}.")
        tokens = self.tokenizer(
            list(prompts),
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(images.device)
        with torch.no_grad():
            text = self.model.get_text_features(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            ).pooler_output
        pixel_values = self.preprocess(images).to(self.model.dtype)
        image = self.model.get_image_features(pixel_values=pixel_values).pooler_output
        return 100 * F.cosine_similarity(image.float(), text.float(), dim=-1).clamp(min=0)
