# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Make ready what a treatment needs: the pipeline and the rewards. Whatever cannot work is refused here."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from transformers.utils import logging

from ..images import RANGE_TOLERANCE
from ..loading import dtype_argument, errors_named
from ..rewards import CombinedReward, RewardOutput
from ..rollout import DifferentiableRollout
from ..rollout.requirements import check_pipeline
from .adapter import merge_lora
from .config import TreatmentConfig
from .quantization import check_quantization, quantization_config


logger = logging.get_logger(__name__)

RewardFunc = Callable[[torch.Tensor, Sequence[str]], RewardOutput | torch.Tensor] | torch.nn.Module


def load_pipeline(
    pipeline: str | os.PathLike | DiffusionPipeline,
    dtype: torch.dtype,
    quantization: str | None = None,
    base_lora: str | None = None,
    base_lora_scale: float = 1.0,
) -> DiffusionPipeline:
    """An id, a folder or a loaded pipeline -> the pipeline, frozen and ready to be differentiated.

    Args:
        pipeline: what to load; or what is loaded already, and then changed in place.
        dtype: the type of a pipeline given by name.
        quantization: `"int8"` or `"nf4"` for the linear layers of the denoiser and the text encoders of a pipeline given by
            name, see [`~diffusers_diffdoctor.treatment.quantization.quantization_config`].
        base_lora, base_lora_scale: a LoRA that is merged into it, see
            [`~diffusers_diffdoctor.treatment.adapter.merge_lora`].

    Raises:
        ValueError: the name leads to no pipeline, it cannot be quantized so, or the loaded pipeline was altered in a way that
            bars an adapter or its gradient.
    """
    if isinstance(pipeline, (str, os.PathLike)):
        pipeline = _from_pretrained(pipeline, dtype, quantization)
    elif not isinstance(pipeline, DiffusionPipeline):
        raise TypeError(
            f"`pipeline` is a {type(pipeline).__name__}, but must be an id, a folder or a DiffusionPipeline."
        )
    elif quantization is not None:
        raise ValueError(
            f"`quantization` is {quantization!r}, but `pipeline` is loaded already, and weights are quantized while they are "
            "loaded. Pass the pipeline's id or folder, or load it quantized and leave `quantization` out."
        )
    if base_lora is not None:
        if adapters := sorted(pipeline.get_list_adapters()) if hasattr(pipeline, "get_list_adapters") else []:
            raise ValueError(f"`pipeline` already has adapters, of {adapters}: merge them before `base_lora`.")
        merge_lora(pipeline, base_lora, base_lora_scale)
    check_pipeline(pipeline)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _from_pretrained(pipeline: str | os.PathLike, dtype: torch.dtype, quantization: str | None) -> DiffusionPipeline:
    if quantization is not None:
        check_quantization(quantization)
    path = Path(pipeline)
    if path.exists() and not (path / "model_index.json").is_file():
        raise ValueError(
            f"`pipeline` is {str(pipeline)!r}, which has no model_index.json and so is no pipeline of diffusers. Pass the "
            "folder that `pipe.save_pretrained(folder)` wrote."
        )
    settings = dtype_argument(dtype)
    try:
        with errors_named(pipeline, f"`pipeline` is {str(pipeline)!r}, which"):
            if quantization is not None:
                index = DiffusionPipeline.load_config(str(pipeline))
                settings["quantization_config"] = quantization_config(index, quantization, dtype)
            return DiffusionPipeline.from_pretrained(str(pipeline), **settings)
    except OSError as error:
        raise ValueError(f"`pipeline` is {str(pipeline)!r}, which cannot be loaded: {error}") from error


def build_reward(funcs: RewardFunc | list[RewardFunc], args: TreatmentConfig) -> CombinedReward:
    """One function or several, with the weights and the pixel selection of the configuration."""
    funcs = list(funcs) if isinstance(funcs, (list, tuple)) else [funcs]
    selection = {
        "selection": args.pixel_selection,
        "threshold": args.pixel_threshold,
        "clean_level": args.pixel_clean_level,
    }
    reward = CombinedReward(funcs, args.reward_weights, **selection)
    for part in reward.rewards:
        check_detector(getattr(part, "detector", None), "reward_funcs")
    return reward


def build_rollout(
    pipeline: DiffusionPipeline,
    args: TreatmentConfig,
    rollout_class: type[DifferentiableRollout] = DifferentiableRollout,
    **further: Any,
) -> DifferentiableRollout:
    """The pipeline's rollout as the configuration asks for it, with `further` arguments of its class."""
    rollout = rollout_class(
        pipeline,
        height=args.height,
        width=args.width,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        max_sequence_length=args.max_sequence_length,
        pipeline_kwargs=args.pipeline_kwargs,
        offline_sigmas=args.offline_sigmas,
        offline_guidance_scale=args.offline_guidance_scale,
        **further,
    )
    rollout.vae_gradient_checkpointing = args.vae_gradient_checkpointing
    return rollout


def encode_prompts(
    rollout: DifferentiableRollout, args: TreatmentConfig, prompts: Sequence[str], offline: Sequence[str]
) -> None:
    """Encode all prompts once, those of the offline loss too, then drop the text encoders: the denoiser comes after them."""
    if rollout.prompts.takes_device:
        for name, component in rollout.pipeline.components.items():
            if name.startswith("text_encoder") and component is not None:
                component.to(args.device)
    else:  # such a pipeline encodes where its first component lies
        rollout.pipeline.to(args.device)
    rollout.cache_prompts(list(dict.fromkeys(prompts)))
    if offline:
        rollout.cache_prompts(list(dict.fromkeys(offline)), offline=True)
    if args.free_text_encoders:
        rollout.free_text_encoders()


def warn_of_idle_weights(rollout: torch.nn.Module) -> None:
    """Name trained weights that the first backward pass did not reach. A gradient of 0 is normal: a new B hides all else."""
    trained = [(name, weight) for name, weight in rollout.named_parameters() if weight.requires_grad]
    idle = [name for name, weight in trained if weight.grad is None]
    if idle:
        logger.warning(
            f"{len(idle)} of {len(trained)} adapter weights get no gradient, the first is {idle[0]}: the steps that carry "
            "gradient do not use these layers, or use other objects than the adapter is on (an offloaded, compiled or "
            "replaced denoiser). They stay untrained."
        )


@torch.no_grad()
def check_detector(detector: Any | None, name: str) -> None:
    """Refuse a detector whose maps are not (B, 1, H, W) in [0, 1], before training rather than in its first step."""
    if detector is None:
        return
    parameter = next(detector.parameters(), None) if isinstance(detector, torch.nn.Module) else None
    maps = detector.confidence(torch.full((1, 3, 64, 64), 0.5, device=getattr(parameter, "device", None)))
    shape = tuple(maps.shape)
    if shape != (1, 1, 64, 64):
        raise ValueError(
            f"`{name}` has a detector ({type(detector).__name__}) whose map of one 64x64 image has the shape {shape}, "
            "but (1, 1, 64, 64) is needed: one channel, 1 = artifact. Train or convert it with one label."
        )
    low, high = maps.min().item(), maps.max().item()  # nan anywhere makes both nan
    if not (-RANGE_TOLERANCE <= low and high <= 1 + RANGE_TOLERANCE):
        raise ValueError(
            f"`{name}` has a detector ({type(detector).__name__}) whose map of a gray image has values from {low:.4g} to "
            f"{high:.4g}, but confidences in [0, 1] are needed, 1 = artifact. If these are logits, return their sigmoid."
        )
