# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""How scorers of whole images look at one: resized, cut or padded to a square, normalised. Gradients pass.

The originals resize 8-bit pictures with Pillow; here the same filters act on floats.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD


@dataclass(frozen=True)
class CropToSquare:
    """Bicubic resizing of the short side, central crop, normalisation: images (B, 3, H, W) in [0, 1] -> (B, 3, h, w).

    Args:
        size: length in pixels of the short side, or (height, width) of both.
        crop: (height, width).
        mean, std: a number for each channel.
        torchvision: where the crop cannot be central, torchvision rounds its corner (half to even), transformers rounds down.
    """

    size: int | tuple[int, int]
    crop: tuple[int, int]
    mean: Sequence[float] = tuple(OPENAI_CLIP_MEAN)
    std: Sequence[float] = tuple(OPENAI_CLIP_STD)
    torchvision: bool = False

    @classmethod
    def of_processor(cls, image_processor: Any) -> "CropToSquare":
        """What a [`~transformers.CLIPImageProcessor`] does."""
        size, crop = dict(image_processor.size), image_processor.crop_size
        return cls(
            size["shortest_edge"] if "shortest_edge" in size else (size["height"], size["width"]),
            (crop["height"], crop["width"]),
            tuple(image_processor.image_mean),
            tuple(image_processor.image_std),
        )

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[-2:]
        size, edge = self.size, self.size
        if isinstance(edge, int):
            size = (edge, int(edge * width / height)) if height <= width else (int(edge * height / width), edge)
        # bicubic overshoots; 8-bit pictures saturate there
        images = _bicubic(images, size).clamp(0, 1)
        crop_height, crop_width = self.crop
        if crop_height > size[0] or crop_width > size[1]:
            raise ValueError(
                f"The crop {self.crop} is larger than the resized image {size}; correct the processor's size."
            )
        spare = (size[0] - crop_height, size[1] - crop_width)
        top, left = (round(one / 2) if self.torchvision else one // 2 for one in spare)
        return _normalised(images[..., top : top + crop_height, left : left + crop_width], self.mean, self.std)


@dataclass(frozen=True)
class PadToSquare:
    """Bicubic resizing of the long side, black on both sides of the short one, normalisation.

    Args:
        side: of the square, in pixels.
        mean, std: a number for each channel.
    """

    side: int
    mean: Sequence[float] = tuple(OPENAI_CLIP_MEAN)
    std: Sequence[float] = tuple(OPENAI_CLIP_STD)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        scale = self.side / max(images.shape[-2:])
        size = tuple(max(1, round(edge * scale)) for edge in images.shape[-2:])
        down, right = self.side - size[0], self.side - size[1]
        padding = (right // 2, right - right // 2, down // 2, down - down // 2)
        return _normalised(F.pad(_bicubic(images, size), padding), self.mean, self.std)


def _bicubic(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    if size == tuple(images.shape[-2:]):
        return images
    return F.interpolate(images, size=size, mode="bicubic", align_corners=False, antialias=True)


def _normalised(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    mean, std = (images.new_tensor(values)[:, None, None] for values in (mean, std))
    return (images - mean) / std
