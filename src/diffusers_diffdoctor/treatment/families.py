# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What differs between families of pipelines, one row for each; no other code asks which family a pipeline is of.

A pipeline without a row can still be treated by the pixel loss: its prompts are then passed as text in every step. A row's
`prompt_fields` let prompts be encoded once; its `offline` adds the offline loss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift


SIGMA_SAMPLINGS = ("logit_normal", "uniform")


class Offline(Protocol):
    """The denoiser's own training loss, cut where a trainer may cache: images -> latents -> (prediction, target)."""

    @staticmethod
    def encode(pipeline: DiffusionPipeline, images: torch.Tensor) -> torch.Tensor:
        """Images (R, 3, H, W) in [0, 1] -> latents (R, C, h, w) as the denoiser sees them at zero noise."""

    @staticmethod
    def predict(
        pipeline: DiffusionPipeline,
        denoiser: torch.nn.Module,
        latents: torch.Tensor,
        embeddings: Mapping[str, torch.Tensor],
        generators: Sequence[torch.Generator],
        sigma_sampling: str,
        guidance_scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents of `encode` -> the denoiser's prediction for noised latents, and its target, of one shape (R, ...)."""


class FluxOffline:
    """Flow matching as FLUX.1 was trained: x_s = (1 - s) x + s e, and the target is the velocity e - x."""

    @staticmethod
    def encode(pipeline: DiffusionPipeline, images: torch.Tensor) -> torch.Tensor:
        """The mode of the VAE's posterior, shifted and scaled.

        The mode instead of a sample is our choice: latents can then be cached. It differs from a sample by noise that is small
        beside that of the loss.
        """
        vae = pipeline.vae
        mode = vae.encode((images * 2 - 1).to(vae.device, vae.dtype)).latent_dist.mode()
        return (mode - vae.config.shift_factor) * vae.config.scaling_factor

    @staticmethod
    def predict(
        pipeline: DiffusionPipeline,
        denoiser: torch.nn.Module,
        latents: torch.Tensor,
        embeddings: Mapping[str, torch.Tensor],
        generators: Sequence[torch.Generator],
        sigma_sampling: str,
        guidance_scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Velocity at a noise level drawn for each sample; both results are packed, (R, h/2 * w/2, 4 C)."""
        text = embeddings["prompt_embeds"]
        device, dtype = text.device, text.dtype
        count, channels, height, width = latents.shape
        noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
        latents, noise = (
            pipeline._pack_latents(x.to(device, torch.float32), count, channels, height, width)
            for x in (latents, noise)
        )
        sigmas = draw_flow_sigmas(pipeline.scheduler, generators, latents.shape[1], sigma_sampling).to(device)
        s = sigmas[:, None, None]
        noisy = (1 - s) * latents + s * noise
        guidance = None
        if denoiser.config.guidance_embeds:
            guidance = torch.full((count,), guidance_scale, device=device, dtype=torch.float32)
        prediction = denoiser(
            hidden_states=noisy.to(dtype),
            timestep=sigmas.to(dtype),
            guidance=guidance,
            pooled_projections=embeddings["pooled_prompt_embeds"],
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=device, dtype=dtype),
            img_ids=pipeline._prepare_latent_image_ids(count, height // 2, width // 2, device, dtype),
            return_dict=False,
        )[0]
        return prediction, noise - latents


def draw_flow_sigmas(
    scheduler: Any, generators: Sequence[torch.Generator], image_seq_len: int, sampling: str = "logit_normal"
) -> torch.Tensor:
    """One noise level in (0, 1) for each generator, (R,) float32.

    `"logit_normal"` is the sigmoid of a standard normal draw (SD3, arXiv 2403.03206), `"uniform"` is uniform; both are then
    shifted as the scheduler shifts the levels it samples with: by its fixed `shift`, or by `mu`, which grows with the number
    of image tokens, where it shifts dynamically. Neither the draw nor the shift is given in arXiv 2501.12382: both are ours.
    """
    if sampling == "logit_normal":
        sigmas = torch.sigmoid(torch.cat([torch.randn(1, generator=generator) for generator in generators]))
    else:
        sigmas = torch.cat([torch.rand(1, generator=generator) for generator in generators])
    config = scheduler.config
    if config.get("use_dynamic_shifting", False):
        mu = calculate_shift(
            image_seq_len,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        return scheduler.time_shift(mu, 1.0, sigmas)
    return scheduler.shift * sigmas / (1 + (scheduler.shift - 1) * sigmas)


@dataclass(frozen=True)
class Family:
    """One row.

    Args:
        prompt_fields: the argument of the pipeline's `__call__` that takes each result of its `encode_prompt`, in order; None
            for a result that no argument takes.
        call_defaults: arguments of `__call__` that a rollout needs to differ from the pipeline's default.
        offline: the offline loss, if the family has one.
    """

    prompt_fields: tuple[str | None, ...]
    call_defaults: Mapping[str, Any] = field(default_factory=dict)
    offline: type[Offline] | None = None


_EMBEDS = ("prompt_embeds", "negative_prompt_embeds")
_POOLED = (*_EMBEDS, "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
_MASKED = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
# Binning would change the size that was asked for, and resize the image after the VAE.
_NO_BINNING = {"use_resolution_binning": False}

FAMILIES: dict[str, Family] = {
    "FluxPipeline": Family(("prompt_embeds", "pooled_prompt_embeds", None), offline=FluxOffline),
    "StableDiffusionPipeline": Family(_EMBEDS),
    "LatentConsistencyModelPipeline": Family(_EMBEDS),
    "StableDiffusionXLPipeline": Family(_POOLED),
    "KolorsPipeline": Family(_POOLED),
    "StableDiffusion3Pipeline": Family(_POOLED),
    "PixArtAlphaPipeline": Family(_MASKED, _NO_BINNING),
    "PixArtSigmaPipeline": Family(_MASKED, _NO_BINNING),
    "SanaPipeline": Family(_MASKED, _NO_BINNING),
    "QwenImagePipeline": Family(("prompt_embeds", "prompt_embeds_mask")),
}


def family_of(pipeline: DiffusionPipeline) -> Family | None:
    """The row of the pipeline's class or of the nearest class it derives from; None without one."""
    return next((FAMILIES[base.__name__] for base in type(pipeline).__mro__ if base.__name__ in FAMILIES), None)
