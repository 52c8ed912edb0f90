# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Images to latents, the inverse of what the pipeline itself does between its noise and its decoder.

A pipeline scales, shifts, unpacks or normalises its latents before it decodes them, each class in its own way. All of these move
values about and change each by a factor and an offset. Both are measured on the pipeline's own call, with latents that were put
in: so no class needs a table, and what cannot be turned around is found out. Left to know is how a VAE class encodes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class LatentMap:
    """`decoder_input = scale * latents[order] + shift`, of one sample, flattened; or what else a pipeline makes of its latents.

    Args:
        scale, shift: (N,) float32, for each value of the decoder's input.
        order: (N,), which value of the latents it comes from.
        latent_shape: of one sample, as the pipeline draws it, without the dimension of the batch.
        input_shape: of the decoder's input of one sample, likewise.
    """

    scale: torch.Tensor
    shift: torch.Tensor
    order: torch.Tensor
    latent_shape: tuple[int, ...]
    input_shape: tuple[int, ...]

    def apply(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (R, *latent_shape) -> (R, *input_shape), float32. Without the offset: for differences of latents."""
        return (self.scale * latents.float().flatten(1)[:, self.order]).view(-1, *self.input_shape)

    def send(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (R, *latent_shape) -> decoder inputs (R, *input_shape), float32."""
        return self.apply(latents) + self.shift.view(self.input_shape)

    def invert(self, decoder_input: torch.Tensor) -> torch.Tensor:
        """Decoder inputs (R, ...) -> latents (R, *latent_shape), float32, as the denoiser sees them at zero noise."""
        values = (decoder_input.float().flatten(1) - self.shift) / self.scale
        return values[:, self.order.argsort()].view(-1, *self.latent_shape)


class NotInvertible(ValueError):
    """Latents reach the decoder in a way that cannot be turned around."""


@torch.no_grad()
def measure_latent_map(decoder_input_of: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...]) -> LatentMap:
    """
    Find the map of one pipeline at one size.

    Args:
        decoder_input_of: latents (1, *shape) -> what the decoder is given, (1, ...), or None if it does not get that far.
        shape: of the latents of one sample.

    Raises:
        NotInvertible: values are lost, mixed, or changed by more than a factor and an offset.
    """
    count = torch.Size(shape).numel()

    def values(x: torch.Tensor) -> torch.Tensor:
        return decoder_input_of(x.view(1, *shape)).float().flatten()

    first = decoder_input_of(torch.zeros(1, *shape))
    shift = first.float().flatten()
    if len(shift) != count:
        raise NotInvertible(f"of {count} values of a latent, {len(shift)} reach the decoder")
    scale = values(torch.ones(count)) - shift
    if (scale.abs() < 1e-6).any():
        raise NotInvertible("some values of a latent do not reach the decoder")
    # Each value's position, bit by bit: exact in half precision too.
    index, order = torch.arange(count), torch.zeros(count, dtype=torch.long, device=shift.device)
    for bit in range(max(1, (count - 1).bit_length())):
        seen = (values((index >> bit & 1).float()) - shift) / scale > 0.5
        order += seen.long() << bit
    if not torch.equal(order.sort().values.cpu(), index):
        raise NotInvertible("values of a latent are mixed before they reach the decoder")
    found = LatentMap(scale, shift, order, tuple(shape), tuple(first.shape[1:]))
    probe = torch.randn(count, generator=torch.Generator().manual_seed(0))
    expected = scale * probe.to(scale.device)[order] + shift
    tolerance = 0.02 if first.dtype in (torch.float16, torch.bfloat16) else 1e-3
    if not torch.allclose(values(probe), expected, rtol=tolerance, atol=tolerance * scale.abs().max().item()):
        raise NotInvertible("latents are changed by more than a factor and an offset before they reach the decoder")
    return found


def encode(vae: nn.Module | None, images: torch.Tensor, input_dims: int) -> torch.Tensor:
    """
    Images in [0, 1] (R, 3, H, W) -> what the VAE's decoder would turn into them, in the shape it takes.

    The mode of the posterior instead of a sample is our choice: latents can then be cached. It differs from a sample by noise that
    is small beside that of the loss.

    Args:
        vae: the decoder; None for a pipeline in pixel space, whose "latents" are the images in [-1, 1].
        images: R images.
        input_dims: dimensions of the decoder's input: 5 for a VAE of videos.
    """
    pixels = images * 2 - 1
    if vae is None:
        return pixels
    weight = next(vae.parameters())
    pixels = pixels.to(weight.device, weight.dtype)
    return posterior_mode(vae.encode(pixels.unsqueeze(2) if input_dims == 5 else pixels))


def posterior_mode(encoded: Any) -> torch.Tensor:
    """How each VAE class says what it encoded: a distribution (AutoencoderKL and its like), a latent (AutoencoderDC), latents (VQ)."""
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mode()
    for name in ("latent", "latents"):
        if hasattr(encoded, name):
            return getattr(encoded, name)
    return encoded[0]
