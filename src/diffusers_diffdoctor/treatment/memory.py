# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Say which argument helps most when the memory is full, by the arithmetic of docs/source/memory.md."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..rollout import DifferentiableRollout
from ..rollout.call import decoders
from .config import TreatmentConfig


# Shares of a graph that are kept where its blocks are checkpointed: for each block its input, beside the one block at work.
DENOISER_KEPT, VAE_KEPT = 1 / 16, 1 / 8
PATCH = 16  # pixels of a side that are one token, in transformers; UNets, which also work on larger grids, are near it
VAE_VALUES, VAE_WIDTH = 6200, 128  # kept for a pixel by a decoder whose last blocks have so many channels
BYTES = {"int8": 1.0, "nf4": 0.53}  # of a weight, with its scale

REMEDIES_TOLD = 4
WORTH_TELLING = 0.02  # of what the first remedy frees

OUT_OF_MEMORY = ("out of memory", "can't allocate memory")  # GPUs; CPUs


@contextmanager
def memory_errors_explained(
    args: TreatmentConfig, rollout: DifferentiableRollout, doing: str, **kwargs
) -> Iterator[None]:
    """Context in which an error for want of memory also says what [`memory_advice`] says; the arguments are its."""
    try:
        yield
    except RuntimeError as error:
        full = isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)
        if not full or isinstance(error.__cause__, RuntimeError):  # something else, or explained within
            raise
        raise torch.OutOfMemoryError(f"{error}\n{memory_advice(args, rollout, doing, **kwargs)}") from error


def memory_advice(args: TreatmentConfig, rollout: DifferentiableRollout, doing: str, offline: bool = False) -> str:
    """What would free the most memory, the most effective first, with estimates.

    Args:
        args: what the run was asked for.
        rollout: what it runs, with the pipeline as it is loaded.
        doing: "training", "evaluation", or "loading", which keeps nothing for a gradient.
        offline: whether there are regularization images.
    """
    found = [*_of_weights(args, rollout), *_of_images(args, rollout, doing, offline)]
    found = [(saved, text) for saved, text in found if saved > 0]
    found.sort(key=lambda remedy: -float(f"{remedy[0]:.1e}"))  # of equals the one that changes less, which comes first
    told = [remedy for remedy in found if remedy[0] > WORTH_TELLING * found[0][0]][:REMEDIES_TOLD]
    if not told:
        return (
            f"The memory is full in {doing}, and no argument would free much: take a smaller pipeline or a larger GPU."
        )
    lines = [f"  {number}. {text}: about {_size(saved)}" for number, (saved, text) in enumerate(told, 1)]
    return "\n".join([f"The memory is full in {doing}. What would free the most here, by computation:", *lines])


def _of_weights(args: TreatmentConfig, rollout: DifferentiableRollout) -> Iterable[tuple[float, str]]:
    parts = {name: part for name, part in rollout.pipeline.components.items() if isinstance(part, nn.Module)}
    encoders = [part for name, part in parts.items() if name.startswith("text_encoder")]
    if not (args.cache_prompt_embeddings and args.free_text_encoders):
        yield sum(map(_bytes, encoders)), "`cache_prompt_embeddings=True, free_text_encoders=True` (the same images)"
    linear = [
        module.weight
        for part in (rollout.denoiser, *encoders)
        for module in part.modules()
        if isinstance(module, nn.Linear) and not module.weight.requires_grad
    ]
    size = linear[0].element_size() if linear else 0
    now = BYTES.get(args.quantization, size)
    for name, then in BYTES.items():
        yield (now - then) * sum(weight.numel() for weight in linear), f"`quantization={name!r}` (another base)"
    if args.quantization is None and rollout.denoiser.dtype == torch.float32:
        yield sum(map(_bytes, parts.values())) / 2, "`pipeline_dtype='bfloat16'`, with `bf16=True` (another base)"


def _of_images(
    args: TreatmentConfig, rollout: DifferentiableRollout, doing: str, offline: bool
) -> Iterable[tuple[float, str]]:
    height, width = rollout.height, rollout.width
    half = f"half of {height} x {width} pixels (`resolution`, `height`, `width`; other images)"
    denoiser, decoder = _graphs(args, rollout)
    if doing == "loading":
        return
    if doing == "evaluation":
        count, image = args.per_device_eval_batch_size, DENOISER_KEPT * denoiser + VAE_KEPT * decoder
        yield (count - 1) * image, "`per_device_eval_batch_size=1` (the same images)"
        yield 3 / 4 * count * image, half
        return
    count, others = args.per_device_train_batch_size, getattr(args, "offline_batch_size", 0) if offline else 0
    drift = getattr(args, "drift_weight", 0) > 0  # not every treatment has it
    steps = args.num_inference_steps if drift else rollout.gradient_steps
    kept = DENOISER_KEPT if args.gradient_checkpointing else 1
    image = kept * steps * denoiser + (VAE_KEPT if args.vae_gradient_checkpointing else 1) * decoder
    accumulated = count * args.gradient_accumulation_steps
    yield (
        (count - 1) * image,
        f"`per_device_train_batch_size=1, gradient_accumulation_steps={accumulated}` (the same update)",
    )
    yield max(others - 1, 0) * kept * denoiser, "`offline_batch_size=1` (fewer regularization images)"
    if not args.gradient_checkpointing:
        saved = (1 - DENOISER_KEPT) * (count * steps + others) * denoiser
        yield saved, "`gradient_checkpointing=True` (the same gradients)"
    if not args.vae_gradient_checkpointing:
        yield (1 - VAE_KEPT) * count * decoder, "`vae_gradient_checkpointing=True` (the same gradients)"
    if drift:
        yield count * (steps - rollout.gradient_steps) * kept * denoiser, "`drift_weight=0` (another loss)"
    else:
        one = f"`gradient_fraction={1 / args.num_inference_steps:.3g}`, one step (another gradient)"
        yield count * (steps - 1) * kept * denoiser, one
    yield 3 / 4 * (count * image + others * kept * denoiser), half


def _graphs(args: TreatmentConfig, rollout: DifferentiableRollout) -> tuple[float, float]:
    """Bytes that a backward pass needs of one call of the denoiser and of the decoder for one image, without checkpoints."""
    pixels = rollout.height * rollout.width
    values = sum(
        module.out_features if isinstance(module, nn.Linear) else module.out_channels
        for module in rollout.denoiser.modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not module.weight.requires_grad
    )
    half = args.bf16 or args.fp16 or rollout.denoiser.dtype != torch.float32
    decoder = 0.0
    for vae in decoders(rollout.pipeline):
        widths = getattr(vae.config, "block_out_channels", None) or [VAE_WIDTH]
        decoder += VAE_VALUES * widths[0] / VAE_WIDTH * pixels * vae.dtype.itemsize
    return values * pixels / PATCH**2 * (2 if half else 4), decoder


def _bytes(module: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{math.ceil(count / 1e6)} MB"
