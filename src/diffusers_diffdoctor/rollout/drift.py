# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""How far an adapter has moved the denoiser away from itself in the early steps of a rollout (ours)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .window import GradientWindow


@dataclass
class DenoiserCall:
    """One call of the denoiser in a rollout, what it said, and how much its drift counts."""

    args: tuple
    kwargs: dict[str, Any]
    prediction: torch.Tensor
    weight: float


def drift_step_weight(step: int, steps: int) -> float:
    """
    How much the drift of a denoising step counts: `(1 - step / steps) ** 8`, and 0 below a tenth. Ours.

    The first steps settle the layout, and with it what differs between two seeds; the later ones must be free to mend.

    Args:
        step: counted from 0.
        steps: of the whole rollout.
    """
    weight = (1 - step / steps) ** 8
    return weight if weight >= 0.1 else 0.0


@contextmanager
def recorded(denoiser: nn.Module, window: GradientWindow) -> Iterator[list[DenoiserCall]]:
    """The calls of the denoiser whose drift counts, inside the block."""
    calls: list[DenoiserCall] = []

    def record(module, args, kwargs, result):
        if (weight := drift_step_weight(window.finished, window.total)) > 0:
            calls.append(DenoiserCall(args, kwargs, prediction_of(result), weight))

    hook = denoiser.register_forward_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def drift(denoiser: nn.Module, calls: list[DenoiserCall], count: int) -> torch.Tensor:
    """(B,): the weighted mean over the early steps of the squared difference that the adapter makes to the prediction.

    Inside the gradient window the gradient also runs through the latents.

    Args:
        denoiser: has the adapter.
        calls: of one rollout, see [`recorded`].
        count: B, the images of the rollout.
    """
    total = 0.0
    for call in calls:
        with without_adapter(denoiser), torch.no_grad():
            untreated = prediction_of(denoiser(*call.args, **call.kwargs))
        dtype = torch.promote_types(call.prediction.dtype, torch.float32)
        square = (call.prediction.to(dtype) - untreated.to(dtype)).square().flatten(1).mean(1)
        per_image = square.unflatten(0, (-1, count)).mean(0)  # guidance asks for each image twice
        total = total + call.weight * per_image
    return total / sum(call.weight for call in calls)


def has_adapter(denoiser: nn.Module) -> bool:
    return any(isinstance(module, BaseTunerLayer) for module in denoiser.modules())


@contextmanager
def without_adapter(denoiser: nn.Module) -> Iterator[None]:
    """The denoiser as it was before its PEFT adapter, inside the block, however the adapter came in."""
    layers = [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]
    layers = [layer for layer in layers if not layer.disable_adapters]
    trained = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, requires_grad in trained:  # PEFT forgets which of them were trained
            parameter.requires_grad_(requires_grad)


def prediction_of(result: Any) -> torch.Tensor:
    """What a denoiser says, out of what its forward returns; lists of one tensor for each image are stacked."""
    prediction = result[0] if isinstance(result, tuple) else getattr(result, "sample", result)
    return torch.stack(list(prediction)) if isinstance(prediction, (list, tuple)) else prediction
