# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The clean image that a step of a scheduler believes in, and how to change its mind.

Every scheduler takes what the denoiser says and what it was said of, x_t. Together they fix the clean sample x_0 that the denoiser
believes in, by one of three conventions:

- flow matching: x_t = (1 - s) x_0 + s e, and it says e - x_0;
- noise is added to x_0 (Euler, Heun, LMS and their like): x_t = x_0 + s e;
- x_0 shrinks as noise grows (DDPM, DDIM, DPM-Solver and others): x_t = a x_0 + s e with a^2 + s^2 = 1;

in the last two it says e, x_0, or v = a e - s x_0 with a^2 = 1 / (1 + s^2) where noise is added.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from .noise import is_flow


@dataclass(frozen=True)
class CleanPrediction:
    """x_0 = of_sample * x_t + of_output * output, all of which are known in a step.

    Args:
        of_sample, of_output: the factors, scalars.
    """

    of_sample: float
    of_output: float

    def clean(self, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """x_0, float32, of the shape of the sample."""
        return self.of_sample * sample.float() + self.of_output * output.float()

    def moved(self, output: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """What the denoiser would have said of the same sample, had it believed in x_0 + change."""
        return (output.float() + change / self.of_output).to(output.dtype)


def clean_prediction(scheduler: Any, timestep: Any) -> CleanPrediction:
    """How x_0 follows from a step's arguments, which the scheduler is about to be given.

    Args:
        scheduler: with its timesteps set.
        timestep: of the step.

    Raises:
        ValueError: an unknown prediction type.
    """
    if is_flow(scheduler):
        sigma = _sigma(scheduler, timestep)
        return CleanPrediction(1.0, -sigma)
    if float(scheduler.init_noise_sigma) != 1.0:  # noise is added
        sigma = _sigma(scheduler, timestep)
        alpha = 1 / (1 + sigma**2) ** 0.5
        shrunk = alpha  # x_t times this is that of the other convention
    else:
        alpha = float(scheduler.alphas_cumprod[int(timestep)]) ** 0.5
        sigma, shrunk = (1 - alpha**2) ** 0.5 / alpha, 1.0
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind == "epsilon":
        return CleanPrediction(shrunk / alpha, -sigma)
    if kind == "v_prediction":
        return CleanPrediction(shrunk * alpha, -sigma * alpha)
    if kind == "sample":
        return CleanPrediction(0.0, 1.0)
    raise ValueError(
        f"`pipeline` has a scheduler with the prediction type {kind!r}; known are epsilon, v_prediction, sample."
    )


def noise_levels(scheduler: Any) -> list[tuple[float, float]]:
    """(a, s) of x = a x_0 + s e for every step of a scheduler whose timesteps are set, and for the end."""
    if is_flow(scheduler):
        return [(1 - s, s) for s in scheduler.sigmas.tolist()]
    if float(scheduler.init_noise_sigma) != 1.0:  # noise is added
        return [(1.0, s) for s in scheduler.sigmas.tolist()]
    products = [float(scheduler.alphas_cumprod[int(t)]) for t in scheduler.timesteps]
    products.append(float(getattr(scheduler, "final_alpha_cumprod", 1.0)))
    return [(math.sqrt(product), math.sqrt(1 - product)) for product in products]


def _sigma(scheduler: Any, timestep: Any) -> float:
    index = scheduler.step_index
    if index is None:
        index = scheduler.index_for_timestep(timestep)
    return float(scheduler.sigmas[index])
