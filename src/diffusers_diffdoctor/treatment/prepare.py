# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Make ready what a treatment needs: the pipeline and the rewards. Whatever cannot work is refused here."""

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from packaging.version import parse
from torch._dynamo.eval_frame import OptimizedModule

from ..rewards import CombinedReward, RewardOutput
from .config import PixelRewardConfig
from .quantization import check_quantization, quantization_config


RewardFunc = Callable[[torch.Tensor, Sequence[str]], RewardOutput | torch.Tensor] | torch.nn.Module


def load_pipeline(
    pipeline: str | os.PathLike | DiffusionPipeline, dtype: torch.dtype, quantization: str | None = None
) -> DiffusionPipeline:
    """An id, a folder or a loaded pipeline -> the pipeline, frozen and ready to be differentiated.

    Args:
        pipeline: what to load; or what is loaded already, and then changed in place.
        dtype: the type of a pipeline given by name.
        quantization: `"int8"` or `"nf4"` for the linear layers of the denoiser and the text encoders of a pipeline given by
            name, see [`~diffusers_diffdoctor.treatment.quantization.quantization_config`].

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
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    for name, module in modules.items():
        if not name.startswith("text_encoder"):  # text is encoded without gradient, so they may be altered
            _check_unaltered(name, module)
        module.requires_grad_(False).eval()
    if "vae" in modules:
        _keep_float32(modules["vae"])
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
    settings = {"dtype" if parse(diffusers.__version__) >= parse("0.42") else "torch_dtype": dtype}
    try:
        if quantization is not None:
            index = DiffusionPipeline.load_config(str(pipeline))
            settings["quantization_config"] = quantization_config(index, quantization, dtype)
        return DiffusionPipeline.from_pretrained(str(pipeline), **settings)
    except (OSError, ValueError) as error:
        raise ValueError(f"`pipeline` is {str(pipeline)!r}, which cannot be loaded: {error}") from error


def _check_unaltered(name: str, module: torch.nn.Module) -> None:
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


def _keep_float32(vae: torch.nn.Module) -> None:
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


def build_reward(funcs: RewardFunc | list[RewardFunc], args: PixelRewardConfig) -> CombinedReward:
    """One function or several, with the weights and the pixel selection of the configuration."""
    funcs = list(funcs) if isinstance(funcs, (list, tuple)) else [funcs]
    selection = {"selection": args.pixel_selection, "threshold": args.pixel_threshold}
    reward = CombinedReward(funcs, args.reward_weights, **selection)
    for part in reward.rewards:
        check_detector(getattr(part, "detector", None), "reward_funcs")
    return reward


@torch.no_grad()
def check_detector(detector: Any | None, name: str) -> None:
    """Refuse a detector whose maps have more than one channel, before training rather than in its first step."""
    if detector is None:
        return
    parameter = next(detector.parameters(), None) if isinstance(detector, torch.nn.Module) else None
    shape = tuple(
        detector.confidence(torch.full((1, 3, 64, 64), 0.5, device=getattr(parameter, "device", None))).shape
    )
    if shape != (1, 1, 64, 64):
        raise ValueError(
            f"`{name}` has a detector ({type(detector).__name__}) whose map of one 64x64 image has the shape {shape}, "
            "but (1, 1, 64, 64) is needed: one channel, 1 = artifact. Train or convert it with one label."
        )
