# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""How a model was trained: the noise levels, the noised latents and the target, which follow from the kind of its scheduler."""

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler


SIGMA_SAMPLINGS = ("logit_normal", "uniform")


@dataclass(frozen=True)
class Noised:
    """One batch of the training loss.

    Args:
        latents: x_t, (R, ...), float32.
        target: what the denoiser should say of them, as the scheduler's `step` is given it, of the same shape.
        timesteps: (R,), as the scheduler counts them.
    """

    latents: torch.Tensor
    target: torch.Tensor
    timesteps: torch.Tensor


def is_flow(scheduler: Any) -> bool:
    """Whether the model predicts the velocity of flow matching."""
    config = scheduler.config
    return (
        "FlowMatch" in type(scheduler).__name__
        or config.get("prediction_type") == "flow_prediction"
        or bool(config.get("use_flow_sigmas"))
    )


def add_noise(
    scheduler: Any, latents: torch.Tensor, generators: Sequence[torch.Generator], sampling: str, mu: float | None
) -> Noised:
    """
    Noise latents as the model saw them in training; every sample has a level of its own.

    Flow matching: x_s = (1 - s) x + s e, target e - x (arXiv 2210.02747). The others: x_t = sqrt(a_t) x + sqrt(1 - a_t) e with t
    uniform, and epsilon, the sample or v = sqrt(a_t) e - sqrt(1 - a_t) x as the target (arXiv 2006.11239, 2202.00512).

    Args:
        scheduler: the pipeline's.
        latents: (R, ...), clean.
        generators: R, each draws the noise and then the level of its sample.
        sampling, mu: see [`draw_flow_sigmas`].
    """
    noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
    noise, clean = noise.to(latents.device), latents.float()
    over_sample = (-1, *[1] * (latents.ndim - 1))
    if is_flow(scheduler):
        sigmas = draw_flow_sigmas(scheduler, generators, mu, sampling).to(latents.device)
        s = sigmas.view(over_sample)
        return Noised((1 - s) * clean + s * noise, noise - clean, sigmas * scheduler.config.num_train_timesteps)
    count = scheduler.config.num_train_timesteps
    timesteps = torch.cat([torch.randint(count, (1,), generator=generator) for generator in generators])
    timesteps = timesteps.to(latents.device)
    alphas = scheduler.alphas_cumprod.to(latents.device, torch.float32)[timesteps].view(over_sample)
    kind = scheduler.config.get("prediction_type", "epsilon")
    noised = alphas.sqrt() * clean + (1 - alphas).sqrt() * noise
    targets = {
        "epsilon": lambda: noise,
        "v_prediction": lambda: alphas.sqrt() * noise - (1 - alphas).sqrt() * clean,
        "sample": lambda: clean,
    }
    if kind not in targets:
        raise ValueError(f"`pipeline` has a scheduler with the prediction type {kind!r}; known are {sorted(targets)}.")
    return Noised(noised, targets[kind](), timesteps)


def draw_flow_sigmas(
    scheduler: Any, generators: Sequence[torch.Generator], mu: float | None, sampling: str = "logit_normal"
) -> torch.Tensor:
    """One noise level in (0, 1) for each generator, (R,) float32.

    `"logit_normal"` is the sigmoid of a standard normal draw (SD3, arXiv 2403.03206), `"uniform"` is uniform; both are then
    shifted as the scheduler shifts the levels it samples with: by `mu`, with which the pipeline itself calls its scheduler and
    which grows with the number of image tokens, where it shifts dynamically, else by its fixed shift. Neither the draw nor the
    shift is given in arXiv 2501.12382: both are ours.
    """
    if sampling == "logit_normal":
        sigmas = torch.sigmoid(torch.cat([torch.randn(1, generator=generator) for generator in generators]))
    else:
        sigmas = torch.cat([torch.rand(1, generator=generator) for generator in generators])
    config = scheduler.config
    if config.get("use_dynamic_shifting", False) and mu is not None:
        return scheduler.time_shift(mu, 1.0, sigmas)
    shift = config.get("shift", config.get("flow_shift")) or 1.0
    return shift * sigmas / (1 + (shift - 1) * sigmas)


class Passed(tuple):
    """What a scheduler's step that changes nothing returns, to be read as a tuple or as an output with attributes."""

    @property
    def prev_sample(self) -> torch.Tensor:
        return self[0]

    pred_original_sample = denoised = prev_sample


@dataclass
class LevelScheduler:
    """
    A scheduler that holds given noise levels for a single step and changes nothing.

    Args:
        original: the pipeline's.
        timesteps: (R,), one for each sample, or (1,).

    Attributes:
        scheduler: to be put in the pipeline's place.
        mu: with which the pipeline called `set_timesteps`, or None.
        output, sample: what its `step` was given.
    """

    original: Any
    timesteps: torch.Tensor
    mu: float | None = None
    output: torch.Tensor | None = None
    sample: torch.Tensor | None = None

    def __post_init__(self):
        flow = is_flow(self.original)
        # DDPM's latents need no scaling, whatever the sampler's do
        self.scheduler = copy.copy(self.original) if flow else DDPMScheduler.from_config(self.original.config)
        scheduler, original = self.scheduler, self.original

        @functools.wraps(original.set_timesteps)  # pipelines look at the arguments that it takes
        def set_timesteps(*args, device=None, mu=None, **kwargs):
            self.mu = mu
            timesteps = self.timesteps.to(device)
            # a vector stands for one step whose level differs between the samples
            scheduler.timesteps = timesteps if len(timesteps) == 1 else timesteps[None]
            if flow:
                sigmas = timesteps / original.config.num_train_timesteps
                scheduler.sigmas = torch.stack([sigmas.max(), torch.zeros_like(sigmas.max())])
            scheduler.num_inference_steps = 1

        @functools.wraps(original.step)
        def step(model_output, timestep, sample, *args, **kwargs):
            self.output, self.sample = model_output, sample
            return Passed((sample, sample))

        vars(scheduler)["set_timesteps"], vars(scheduler)["step"] = set_timesteps, step
