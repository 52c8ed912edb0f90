# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The LoRA that a treatment trains: put on the denoiser, written, and read back."""

import os
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, PeftConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from .config import PixelRewardConfig


LORA_FILE = "pytorch_lora_weights.safetensors"  # the name `pipe.load_lora_weights(folder)` looks for


def add_lora(denoiser: torch.nn.Module, args: PixelRewardConfig, peft_config: PeftConfig | None = None) -> PeftConfig:
    """Give the denoiser a trainable adapter in float32 and return its configuration, by default the one of `args`."""
    if not hasattr(denoiser, "add_adapter"):
        raise ValueError(f"`pipeline` cannot be treated: diffusers gives its {type(denoiser).__name__} no LoRA.")
    if getattr(denoiser, "peft_config", None):
        raise ValueError(
            f"`pipeline` already has the adapters {list(denoiser.peft_config)}. Merge them before treatment: "
            "pipe.fuse_lora(); pipe.unload_lora_weights()."
        )
    if peft_config is None:
        peft_config = LoraConfig(
            r=args.lora_rank,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=list(args.lora_target_modules),
        )
    denoiser.add_adapter(peft_config)
    cast_training_params(denoiser, dtype=torch.float32)  # half precision would swallow small updates
    return peft_config


def save_lora(pipeline: Any, denoiser_name: str, folder: str | os.PathLike, weight_name: str = LORA_FILE) -> None:
    """Write the denoiser's adapter so that `pipeline.load_lora_weights(folder)` restores it, rank and alpha included."""
    denoiser = getattr(pipeline, denoiser_name)
    weights = {name: value.detach().cpu().contiguous() for name, value in get_peft_model_state_dict(denoiser).items()}
    metadata = {
        # sets have no order, so the same adapter would be described otherwise in another process
        key: sorted(value) if isinstance(value, set) else value
        for key, value in denoiser.peft_config["default"].to_dict().items()
    }
    if hasattr(pipeline, "save_lora_weights"):
        layers = {f"{denoiser_name}_lora_layers": weights, f"{denoiser_name}_lora_adapter_metadata": metadata}
        pipeline.save_lora_weights(folder, weight_name=weight_name, **layers)
    else:
        denoiser.save_lora_adapter(folder, weight_name=weight_name)


def load_lora(denoiser: torch.nn.Module, denoiser_name: str, path: str | os.PathLike) -> None:
    """Put weights written by [`save_lora`] into the adapter the denoiser already has.

    Raises:
        ValueError: the adapters have other layers or another rank.
    """
    prefix = f"{denoiser_name}."
    found = {name.removeprefix(prefix): value for name, value in load_file(path).items()}
    expected = get_peft_model_state_dict(denoiser)
    differing = [
        f"{name}: {_shape(found.get(name))} in the file, {_shape(expected.get(name))} here"
        for name in sorted(found.keys() | expected.keys())
        if _shape(found.get(name)) != _shape(expected.get(name))
    ]
    if differing:
        raise ValueError(
            f"The LoRA of {str(path)!r} does not fit this trainer's: {len(differing)} weights differ, the first is "
            f"{differing[0]}. Use the `peft_config` (or `lora_rank` and `lora_target_modules`) and the pipeline it was "
            "trained with."
        )
    set_peft_model_state_dict(denoiser, found)


def _shape(tensor: torch.Tensor | None) -> str:
    return "missing" if tensor is None else "x".join(map(str, tensor.shape))
