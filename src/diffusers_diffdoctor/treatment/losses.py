# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The losses that keep a treated model close to real images and to itself. The pixel loss is a reward: see `rewards`."""

import torch
import torch.nn.functional as F


def offline_loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each sample, `L_offline` of arXiv 2501.12382: the model's own training loss.

    Args:
        prediction: what the denoiser says, (R, ...).
        target: what it should say, of the same shape: velocity for flow models, epsilon or v for the others.

    Returns:
        Tensor (R,), float32 or wider: half-precision predictions are compared in float32.

    Raises:
        ValueError: the shapes differ.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"`prediction` has shape {tuple(prediction.shape)} and `target` {tuple(target.shape)}; they must be equal."
        )
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    return (prediction.to(dtype) - target.to(dtype)).square().flatten(1).mean(1)


def preservation_loss(
    images: torch.Tensor, untreated: torch.Tensor, maps: torch.Tensor | None = None, threshold: float = 0.1
) -> torch.Tensor:
    """How far the layout of each image is from that of its untreated twin, where nothing was diagnosed in the twin. Ours.

    A treatment that only lowers the artifact confidence may do so by drawing the same pose for every seed. This asks it to
    leave alone what was well. Layout means averages over square cells of 1/16 of the shorter side: finer detail may change.

    Args:
        images: (B, 3, H, W) in [0, 1], with gradient.
        untreated: (B, 3, H, W) in [0, 1], of the same prompts and seeds without the adapter.
        maps: (B, 1, H, W) in [0, 1], the artifact maps of `untreated`; without them every pixel counts.
        threshold: a pixel is diagnosed above this confidence. The region is grown by one cell, so that a mended part has room.

    Returns:
        Tensor (B,), mean squared difference, float32 or wider; 0 for an image that was diagnosed in every cell.
    """
    size = max(1, min(images.shape[-2:]) // 16)
    difference = F.avg_pool2d(images - untreated.detach(), size).square().mean(dim=1, keepdim=True)
    if maps is None:
        return difference.flatten(1).mean(1)
    grown = F.max_pool2d(maps.detach(), 2 * size + 1, stride=1, padding=size)
    sound = (F.max_pool2d(grown, size) <= threshold).to(difference.dtype)
    return (difference * sound).flatten(1).sum(1) / sound.flatten(1).sum(1).clamp(min=1)
