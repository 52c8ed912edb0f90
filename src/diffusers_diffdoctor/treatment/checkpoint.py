# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What a checkpoint of treatment says of its base and its adapter, and what a run that continues it must share with it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig

from ..files import digest
from ..names import shortened
from ..training.record import plain
from .adapter import plain_values


LIVE_LORA_FILE = (
    "live_lora_weights.safetensors"  # the weights being trained, where the LoRA beside it is their average
)
RECORD_FILE = "treatment.json"

# Settings of an adapter that may change on the way: they say how to train it, or which layers have it, and the layers are
# compared where the weights are loaded.
NOT_DRAWN = {
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "peft_version",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}


def describe_base(pipeline: Any, denoiser_name: str) -> dict[str, str]:
    """What tells one base from another: name, class, type and a digest of the denoiser. Call it before an adapter is added.

    The digest covers the name, shape and a few values of each weight, rounded to bfloat16, so that it does not depend on
    the floating-point type the pipeline was loaded in, nor on where the folder lies.
    """
    denoiser, lines = getattr(pipeline, denoiser_name), []
    for name, weight in sorted(denoiser.state_dict().items()):
        sample = [value.to("cpu", torch.bfloat16).tolist() for value in plain_values(weight, 4)]
        lines.append(f"{name} {tuple(weight.shape)} {sample}\n")
    return {
        "pipeline": shortened(str(getattr(pipeline, "name_or_path", "") or "")),
        "pipeline_class": type(pipeline).__name__,
        "denoiser": denoiser_name,
        "dtype": str(denoiser.dtype).removeprefix("torch."),
        "digest": digest(lines)[:16],
    }


def describe_prompts(prompts: Sequence[str]) -> dict[str, int | str]:
    """Number and digest of the prompts: whether a resumed run goes through the same ones."""
    return {"count": len(prompts), "digest": digest(json.dumps(list(prompts)))[:16]}


def describe_adapter(peft_config: PeftConfig) -> dict[str, Any]:
    """The adapter's settings as JSON keeps them."""
    return plain({key: sorted(v) if isinstance(v, set) else v for key, v in peft_config.to_dict().items()})


def check_same_base(folder: Path, then: dict[str, str], now: dict[str, str]) -> None:
    if any(then[key] != now[key] for key in ("pipeline_class", "denoiser", "digest")):
        before, here = (
            f"{side['pipeline'] or 'unnamed'!r} ({side['pipeline_class']}, weights {side['digest']})"
            for side in (then, now)
        )
        raise ValueError(
            f"Checkpoint {str(folder)!r} treats the pipeline {before}, but this trainer treats {here}. Resume with the "
            "pipeline of the checkpoint, or start anew in another `output_dir`."
        )


def check_same_adapter(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    differing = [
        f"{key} {then[key]!r}, here {now[key]!r}"
        for key in sorted(then.keys() & now.keys() - NOT_DRAWN)
        if then[key] != now[key]
    ]
    if differing:
        raise ValueError(
            f"The adapter of checkpoint {str(folder)!r} has {'; '.join(differing)}: its weights would draw other images. "
            "Resume with the `peft_config` (or `lora_rank` and `lora_alpha`) it was trained with."
        )
