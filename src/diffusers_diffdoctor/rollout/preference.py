# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""A rollout that can be asked for the model's own training loss with and without its adapter, in one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .drift import without_adapter
from .module import DifferentiableRollout


@dataclass
class ReferredPrediction:
    """What the denoiser says of noised latents, with its adapter and without it, and what it should say.

    Attributes:
        prediction: (R, ...), with gradient.
        reference: the same without the adapter.
        target: see [`~diffusers_diffdoctor.rollout.noise.add_noise`].
    """

    prediction: torch.Tensor
    reference: torch.Tensor
    target: torch.Tensor


class PreferenceRollout(DifferentiableRollout):
    """A [`DifferentiableRollout`] whose `forward` can also leave generation out."""

    def forward(
        self,
        prompts: Any = None,
        *args,
        latents: torch.Tensor | None = None,
        noise_seeds: Sequence[int] = (),
        **kwargs,
    ) -> Any:
        """
        What [`DifferentiableRollout`] does; or, of `latents`, the two sides of the training loss and the reference.

        Args:
            prompts: R texts.
            latents: (R, ...), what `encode_images` made of R images.
            noise_seeds: R numbers that decide noise and noise level. Equal ones give both, so that images can be compared.
        """
        if latents is None:
            return super().forward(prompts, *args, **kwargs)
        self._check_offline(prompts[0])
        with self._known(prompts, self.training_loss.arguments):
            prediction, target = self._ask(latents, prompts, noise_seeds)
            with torch.no_grad(), without_adapter(self.denoiser):
                reference, _ = self._ask(latents, prompts, noise_seeds)
        return ReferredPrediction(prediction, reference, target)

    def _ask(
        self, latents: torch.Tensor, prompts: Sequence[str], seeds: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return self.training_loss.predict(latents, prompts, generators)
