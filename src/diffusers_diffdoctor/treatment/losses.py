# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The loss that keeps a treated model close to real images. The pixel loss is a reward: see `rewards`."""

import torch


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
