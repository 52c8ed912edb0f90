# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The exponential moving average of a detector's weights."""

import torch
from torch.optim.swa_utils import AveragedModel


def moving_average(model: torch.nn.Module, decay: float) -> AveragedModel:
    """An average that starts as a copy of the model; `update_parameters(model)` moves it on.

    Update n decays by no more than n / (9 + n), and the first one by 0, so that an average over a short run does not consist of the
    weights that it began with. The statistics of normalisation layers are averaged like the weights that they belong to; what is
    counted in them is copied.

    Args:
        model: on its device.
        decay: in (0, 1).

    Returns:
        `module` is the averaged model, in evaluation mode; `n_averaged` counts the updates.
    """

    def average(averaged: torch.Tensor, current: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
        if not averaged.is_floating_point():
            return current
        number = updates + 1
        kept = (number / (9 + number)).clamp(max=decay)
        return torch.lerp(averaged, current, (1 - kept).to(averaged.dtype))

    averaged = AveragedModel(model, avg_fn=average, use_buffers=True)
    averaged.module.eval().requires_grad_(False)
    return averaged
