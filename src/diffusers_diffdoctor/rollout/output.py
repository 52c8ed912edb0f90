# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What comes out of a rollout: (B, 3, H, W), float, in [0, 1], of the size asked for, whatever a pipeline's post-processing leaves."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .call import replaced


class _StraightThroughClamp(torch.autograd.Function):
    """Clamps, but lets gradients pass: a plain clamp would hide the artifacts of white and black pixels from the denoiser."""

    @staticmethod
    def forward(ctx, x):
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@contextmanager
def decoded(modules: list[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """What the decoders among the pipeline's components return inside the block, in order."""
    results: list[torch.Tensor] = []
    with ExitStack() as stack:
        for module in modules:
            decode = module.decode

            def keep(*args, decode=decode, **kwargs):
                result = decode(*args, **kwargs)
                results.append(result if isinstance(result, torch.Tensor) else result[0])
                return result

            stack.enter_context(replaced(module, "decode", keep))
        yield results


def own_images(returned: Any, pixels: torch.Tensor, size: tuple[int, int], count: int, name: str) -> torch.Tensor:
    """
    The images of a call, float32 or wider, in [0, 1].

    They are made from `pixels`, before the pipeline's own clamp, wherever that is what the pipeline shows: `pixels` mapped
    from [-1, 1] to [0, 1] and clamped, or `pixels` themselves. What it does beyond that is taken as it is if it lies in [0, 1].

    Args:
        returned: what the pipeline returned for `output_type="pt"`.
        pixels: what its decoder returned, or its last latents if it has none: about [-1, 1].
        size: (height, width) asked for.
        count: B, the number of prompts.
        name: of the pipeline's class, for errors.

    Raises:
        ValueError: no images, others than B, another size, a range that is unknown.
    """
    pixels, returned = _as_images(pixels), _as_images(returned)
    if not isinstance(returned, torch.Tensor) or returned.ndim != 4 or returned.shape[:1] != (count,):
        found = tuple(returned.shape) if isinstance(returned, torch.Tensor) else type(returned).__name__
        raise ValueError(
            f"{name} returned {found} for {count} prompts; images of shape ({count}, 3, H, W) are needed."
        )
    if tuple(returned.shape[-2:]) != tuple(size):
        raise ValueError(
            f"{name} was asked for images of {size[0]} x {size[1]} pixels, but returned {returned.shape[-2]} x "
            f"{returned.shape[-1]}. Set `height` and `width` to a size that it keeps."
        )
    images = returned
    if isinstance(pixels, torch.Tensor) and pixels.shape == returned.shape:
        if any(_same(returned, one) for one in ((pixels * 0.5 + 0.5).clamp(0, 1), pixels, pixels.clamp(-1, 1))):
            images = shown(pixels)
    low, high = images.min().item(), images.max().item()
    if not (-1e-3 <= low and high <= 1 + 1e-3):
        raise ValueError(
            f"{name} returned images in [{low:.3g}, {high:.3g}] that are neither in [0, 1] nor its decoder's: how to bring "
            "them to [0, 1] is not known. This pipeline cannot be treated."
        )
    if images.shape[1] == 4:  # transparent pictures are shown on white
        colours, alpha = images[:, :3], images[:, 3:]
        images = colours * alpha + (1 - alpha)
    if images.shape[1] != 3:
        raise ValueError(f"{name} returned images of {images.shape[1]} channels; 3 are needed.")
    return images.to(torch.promote_types(images.dtype, torch.float32))


def _as_images(value: Any) -> Any:
    """Pictures of a video decoder lose their one frame; lists of pictures are stacked."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(entry, torch.Tensor) for entry in value):
        value = torch.stack(list(value)) if value[0].ndim == 3 else torch.cat(list(value))
    return without_frames(value) if isinstance(value, torch.Tensor) else value


def shown(pixels: torch.Tensor) -> torch.Tensor:
    """What a decoder returned, about [-1, 1], as an image in [0, 1]; the gradient passes through the clamp."""
    return _StraightThroughClamp.apply(pixels * 0.5 + 0.5)


def without_frames(pixels: torch.Tensor) -> torch.Tensor:
    """Videos of one frame, (B, C, 1, H, W) or (B, 1, C, H, W), as images; whatever else as it is."""
    frames = next((dim for dim in (2, 1) if pixels.ndim == 5 and pixels.shape[dim] == 1), None)
    return pixels if frames is None else pixels.squeeze(frames)


@torch.no_grad()
def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for rounding, in half precision too. Strange values are in neither."""
    return torch.allclose(a.float(), b.float(), rtol=0, atol=2e-2)
