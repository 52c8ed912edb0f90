# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What a pipeline must be to be rolled out with gradient; whatever cannot work is refused before anything runs."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule


def check_pipeline(pipeline: Any) -> str:
    """Return the name of the denoiser, `"transformer"` or `"unet"`.

    Raises:
        TypeError: no pipeline.
        ValueError: it has no denoiser, or was altered in a way that bars an adapter or its gradient.
    """
    if not isinstance(pipeline, DiffusionPipeline):
        raise TypeError(
            f"`pipeline` is a {type(pipeline).__name__}, but must be a DiffusionPipeline: load it with "
            "DiffusionPipeline.from_pretrained(...)."
        )
    if getattr(pipeline, "_offload_device", None) is not None or getattr(pipeline, "hf_device_map", None):
        raise ValueError(
            "`pipeline` moves its models between devices (CPU offload or a device map), which would pull weights away before "
            "the backward pass. Use pipe.remove_all_hooks(); pipe.to(device), and free_text_encoders() to save memory."
        )
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module) and not name.startswith("text_encoder"):  # text is encoded without gradient
            check_unaltered(name, part)
    for name in ("transformer", "unet"):
        if isinstance(getattr(pipeline, name, None), nn.Module):
            return name
    raise ValueError(
        f"`pipeline` is a {type(pipeline).__name__} with neither a transformer nor a unet to treat, only "
        f"{sorted(pipeline.components)}."
    )


def check_unaltered(name: str, module: nn.Module) -> None:
    """A `ValueError` where a component was compiled, fused or hooked."""
    for part in module.modules():
        if isinstance(part, OptimizedModule) or part._compiled_call_impl is not None:
            raise ValueError(
                f"`pipeline.{name}` is compiled, and no adapter can be put into what is compiled already. Pass the pipeline "
                "without torch.compile."
            )
        if getattr(part, "fused_projections", False):
            raise ValueError(
                f"`pipeline.{name}` has fused its attention projections, and so does not use the layers that an adapter is "
                f"put on. Undo it: pipe.{name}.unfuse_qkv_projections()."
            )
        if hooks := list(getattr(getattr(part, "_diffusers_hook", None), "hooks", {})):
            raise ValueError(
                f"`pipeline.{name}` has the hooks {hooks} of diffusers (layerwise casting, group offloading, caching), which "
                "replace weights or results between forward and backward. Load the pipeline without them."
            )


def keep_float32(vae: nn.Module) -> None:
    """Let a VAE that overflows in float16 compute in float32, all the time.

    Its pipeline would cast it to float32 for the call and back afterwards, and backward would find other weights than forward
    used. Autocast, too, would compute in float16.
    """
    if vae.dtype == torch.float16 and vae.config.get("force_upcast", False):
        vae.to(torch.float32)
        for name in ("encode", "decode"):
            setattr(vae, name, _in_float32(getattr(vae, name)))


def _in_float32(method: Callable) -> Callable:
    @functools.wraps(method)
    def call(x: torch.Tensor, *args, **kwargs):
        with torch.autocast(x.device.type, enabled=False):
            return method(x.float(), *args, **kwargs)

    return call
