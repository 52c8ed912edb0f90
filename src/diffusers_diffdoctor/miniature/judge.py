# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The judge of the miniature: a convolutional U-Net, of another architecture than the detector and trained apart from it."""

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import nn


class _Block(nn.Module):
    def __init__(self, channels_in: int, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, channels)
        self.skip = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()

    def forward(self, x):
        h = F.silu(self.norm1(self.conv1(x)))
        return F.silu(self.skip(x) + self.norm2(self.conv2(h)))


class MiniatureJudge(nn.Module, PyTorchModelHubMixin):
    """Artifact maps of 64x64 scenes by a U-Net. Treatment never sees it; it only judges.

    Args:
        channels: width at 32x32, 16x16, 8x8 and 4x4 pixels, each a multiple of 8.
    """

    def __init__(self, channels: tuple[int, ...] = (32, 64, 96, 128)):
        super().__init__()
        self.down = nn.ModuleList([_Block(a, b) for a, b in zip((12, *channels[:-1]), channels)])
        self.up = nn.ModuleList([_Block(a + b, b) for a, b in zip(channels[:0:-1], channels[-2::-1])])
        self.head = nn.Conv2d(channels[0], 4, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1], H and W multiples of 16 -> logits (B, 1, H, W)."""
        x = F.pixel_unshuffle(images * 2 - 1, 2)
        skips = []
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else F.avg_pool2d(x, 2))
            skips.append(x)
        x = skips.pop()
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), skips.pop()], 1))
        return F.pixel_shuffle(self.head(x), 2)

    @torch.no_grad()
    def confidence(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1] -> artifact maps (B, 1, H, W) in [0, 1]."""
        return self(images.float()).sigmoid()
