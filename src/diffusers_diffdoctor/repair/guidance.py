# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Guidance by a detector while a pipeline samples, without training."""

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ..rewards.artifact import pixel_penalty
from ..rollout import DifferentiableRollout
from ..rollout.call import replaced
from ..rollout.clean import clean_prediction


class DiagnosticGuidance:
    """Samples with a detector that looks on, and corrects what it does not like.

    In each of the last steps, the clean image that the denoiser believes in is decoded and shown to the detector. The gradient of its
    penalty says how that image should differ, and the denoiser is answered for as if it had said so; the steps that follow make a
    whole of it. The gradient goes through the decoder and the detector, not through the denoiser: universal guidance (Bansal et
    al. 2023, arXiv 2302.07121), whose backward pass this is, with one gradient step.

    A change is at most `strength` times the standard deviation of the latents, and that times the detector's highest confidence in
    the image: what it finds sound is left alone.

    Args:
        rollout: of the pipeline, see [`DifferentiableRollout`].
        detector: with `confidence(images)`.
        strength: at least 0; at 0 images are those of the pipeline.
        last: share in (0, 1] of the steps, counted from the last, that are guided. The very last is not, as nothing follows that
            would make a whole of it, unless it is the only one.

    Raises:
        ValueError: an argument out of its range; a pipeline whose latents cannot be followed to its decoder.
    """

    def __init__(
        self, rollout: DifferentiableRollout, detector: torch.nn.Module, strength: float = 0.1, last: float = 0.5
    ):
        if not (math.isfinite(strength) and strength >= 0):
            raise ValueError(f"`strength` must be at least 0, got {strength}.")
        if not 0 < last <= 1:
            raise ValueError(f"`last` must lie in (0, 1], got {last}.")
        self.rollout, self.detector, self.strength, self.last = rollout, detector, strength, last

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], seeds: Sequence[int], batch_size: int = 8) -> torch.Tensor:
        """Guided images, as [`DifferentiableRollout.generate`] gives those without: (N, 3, H, W) in [0, 1], on the CPU."""
        if missing := self.rollout.training_loss.missing(prompts[0]):
            raise ValueError(f"`rollout` has a pipeline that cannot be guided: {missing}.")
        with self._guided():
            return self.rollout.generate(prompts, seeds, batch_size)

    @contextmanager
    def _guided(self) -> Iterator[None]:
        scheduler = self.rollout.pipeline.scheduler
        step = scheduler.step

        @functools.wraps(step)  # pipelines look at the arguments that it takes
        def guided(model_output, timestep, sample, *args, **kwargs):
            if self.strength and model_output.shape == sample.shape and self._chosen(scheduler, timestep):
                model_output = self._corrected(model_output, timestep, sample)
            return step(model_output, timestep, sample, *args, **kwargs)

        with replaced(scheduler, "step", guided):
            yield

    def _chosen(self, scheduler, timestep) -> bool:
        steps = len(scheduler.timesteps)
        number = scheduler.step_index if getattr(scheduler, "step_index", None) is not None else None
        if number is None:
            number = int(
                (scheduler.timesteps == torch.as_tensor(timestep, device=scheduler.timesteps.device)).nonzero()[0]
            )
        guided = max(1, math.ceil(self.last * steps - 1e-9))
        return steps - guided <= number < max(1, steps - 1)

    def _corrected(self, output: torch.Tensor, timestep, sample: torch.Tensor) -> torch.Tensor:
        prediction = clean_prediction(self.rollout.pipeline.scheduler, timestep)
        with torch.enable_grad():
            clean = prediction.clean(output, sample).detach().requires_grad_()
            confidence = self.detector.confidence(self.rollout.training_loss.decode(clean))
            (gradient,) = torch.autograd.grad(pixel_penalty(confidence).sum(), clean)
        over_sample = (-1, *[1] * (clean.ndim - 1))
        size = gradient.flatten(1).square().mean(1).sqrt().clamp(min=1e-20).view(over_sample)
        spread = clean.detach().flatten(1).std(1).view(over_sample)
        doubt = confidence.detach().flatten(1).amax(1).view(over_sample).to(gradient)
        change = -self.strength * doubt * spread * (gradient / size).clamp(-8, 8)
        return prediction.moved(output, change)
