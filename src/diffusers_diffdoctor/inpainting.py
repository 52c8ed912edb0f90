# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Any inpainting pipeline, asked for a region of any image."""

import inspect
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from .loading import dtype_argument, errors_named


MULTIPLE = 64  # of pixels: no pipeline wants a coarser one
OWN = {
    "prompt", "image", "mask_image", "width", "height", "num_inference_steps", "strength", "generator", "output_type", "return_dict",
}  # fmt: skip


def load_inpainting_pipeline(pipeline: str | os.PathLike, device: str = "cpu", dtype: str = "float32"):
    """The pipeline of a Hub id or a folder.

    Raises:
        ValueError: it cannot be loaded, or is of no class of `AutoPipelineForInpainting`.
    """
    from diffusers import AutoPipelineForInpainting

    with errors_named(pipeline, f"`pipeline` {os.fspath(pipeline)!r}"):
        loaded = AutoPipelineForInpainting.from_pretrained(pipeline, **dtype_argument(getattr(torch, dtype)))
    loaded.set_progress_bar_config(disable=True)
    return loaded.to(device)


def check_pipeline_kwargs(pipeline, pipeline_kwargs: Mapping[str, Any]) -> None:
    """A `ValueError` that names what the pipeline does not take, or what is said by arguments of our own."""
    known = inspect.signature(pipeline.__call__).parameters
    for name in pipeline_kwargs:
        if name in OWN:
            raise ValueError(f"`pipeline_kwargs` has {name!r}, for which there is an argument of its own. Remove it.")
        if name not in known:
            raise ValueError(f"`pipeline_kwargs` has {name!r}, which {type(pipeline).__name__} does not take.")


def inpainted(
    pipeline,
    image: np.ndarray,
    region: np.ndarray,
    prompt: str,
    steps: int,
    strength: float,
    size: int,
    seed: int,
    pipeline_kwargs: Mapping[str, Any] | None = None,
) -> np.ndarray | None:
    """What an inpainting pipeline draws in a region.

    Args:
        pipeline: of a class of `AutoPipelineForInpainting`.
        image: float32 (H, W, 3) in [0, 255].
        region: (H, W), drawn anew where it is above zero.
        prompt: what to draw.
        steps: of the denoiser; one that takes the last `strength` of its schedule takes as many fewer.
        strength: share in (0, 1] of the noise from which it starts; 1 forgets what was there.
        size: pixels of the longer side at which it draws, a multiple of 64; the image is brought to that size and back.
        seed: of the noise.
        pipeline_kwargs: what else the pipeline is called with, see [`check_pipeline_kwargs`].

    Returns:
        float32 (H, W, 3) in [0, 255], the whole image as the pipeline returns it; None where it returns nothing (black, which is a
        safety checker's answer, or NaN).
    """
    height, width = region.shape
    scale = size / max(height, width)
    asked = tuple(max(MULTIPLE, round(side * scale / MULTIPLE) * MULTIPLE) for side in (width, height))
    picture = Image.fromarray(np.clip(image + 0.5, 0, 255).astype(np.uint8)).resize(asked, Image.Resampling.LANCZOS)
    mask = Image.fromarray((region > 0).astype(np.uint8) * 255).resize(asked, Image.Resampling.NEAREST)
    arguments = {
        "prompt": prompt,
        "image": picture,
        "mask_image": mask,
        "width": asked[0],
        "height": asked[1],
        "num_inference_steps": steps,
        "strength": strength,
        "generator": torch.Generator("cpu").manual_seed(seed),
        "output_type": "np",
    }
    known = inspect.signature(pipeline.__call__).parameters
    with torch.no_grad():
        taken = {name: value for name, value in arguments.items() if name in known}
        returned = pipeline(**taken, **(pipeline_kwargs or {}))
    drawn = np.asarray(returned.images[0], np.float32)
    if not np.isfinite(drawn).all() or not drawn.any():
        return None
    new = Image.fromarray(np.rint(drawn.clip(0, 1) * 255).astype(np.uint8))
    return np.asarray(new.resize((width, height), Image.Resampling.LANCZOS), np.float32)
