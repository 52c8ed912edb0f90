# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""A saved LoRA in the layouts that other programs read. diffusers itself reads the result back before it is written.

- `"kohya"`: `lora_unet_down_blocks_...lora_down.weight`, `.lora_up.weight` and `.alpha`, what ComfyUI, AUTOMATIC1111 and Forge
  know of models with a UNet; `lora_transformer_...` for FLUX.
- `"diffusers"`: the names of the saved file, and no alpha: it is multiplied into the weights, for programs that ignore it.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import diffusers
import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..files import written_atomically
from ..training.record import missing_entries_named, read_record
from .adapter import LORA_FILE
from .checkpoint import RECORD_FILE


LAYOUTS = ("kohya", "diffusers")


def export_lora(folder: str | os.PathLike, layout: str = "kohya", output: str | os.PathLike | None = None) -> Path:
    """Write the LoRA of a treatment's folder once more, in another layout.

    Args:
        folder: what `trainer.save_model()` wrote, or a checkpoint.
        layout: `"kohya"` or `"diffusers"`, see the module.
        output: the file to write; `lora_kohya.safetensors` or `lora_diffusers.safetensors` in `folder` without it.

    Returns:
        The file that was written.

    Raises:
        ValueError: the folder has no LoRA of a pipeline that diffusers can load, the adapter is more than two matrices for each
            layer (DoRA, biases), or diffusers does not read the same adapter from the layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"`layout` is {layout!r}, but must be one of {LAYOUTS}.")
    folder = Path(folder)
    for name in (LORA_FILE, RECORD_FILE):
        if not (folder / name).is_file():
            raise ValueError(
                f"`folder` is {str(folder)!r}, which has no {name}. Pass what trainer.save_model() wrote."
            )
    with missing_entries_named(folder / RECORD_FILE):
        pipeline_class = str(read_record(folder / RECORD_FILE)["base"]["pipeline_class"])
    with missing_entries_named(folder / LORA_FILE):
        layers, alpha = _read(folder / LORA_FILE)
    state = _kohya(layers, alpha) if layout == "kohya" else _diffusers(layers, alpha)
    if not _reads_back(getattr(diffusers, pipeline_class, None), state, layers, alpha):
        other = "diffusers" if layout == "kohya" else "kohya"
        raise ValueError(
            f"`layout` is {layout!r}, but the {pipeline_class} of diffusers does not read this LoRA back from it. Try {other!r}, "
            f"or use {LORA_FILE} as it is."
        )
    output = Path(output) if output is not None else folder / f"lora_{layout}.safetensors"
    rank = next(iter(layers.values()))[0].shape[0]
    metadata = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(alpha)}
    with written_atomically(output) as unfinished:
        save_file(state, unfinished, metadata={"format": "pt"} | (metadata if layout == "kohya" else {}))
    return output


def _read(file: Path) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], float]:
    """({layer: (A, B)}, alpha) with the effect alpha / rank * B A, whatever else the configuration said of the scale."""
    weights = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = json.loads((opened.metadata() or {})["lora_adapter_metadata"])
    layers = {}
    for key in weights:
        layer, found, _ = key.rpartition(".lora_A.weight")
        if found:
            layers[layer] = (weights[key], weights[f"{layer}.lora_B.weight"])
    if len(weights) != 2 * len(layers):
        raise ValueError(
            f"{str(file)!r} has more than A and B for a layer (DoRA or biases), which other layouts cannot hold. Merge it into the "
            "model instead: pipe.fuse_lora()."
        )
    denoiser = next(iter(layers)).partition(".")[0]
    config = {key.removeprefix(f"{denoiser}."): value for key, value in metadata.items()}
    return {
        layer: (down, up * _correction(config, layer.removeprefix(f"{denoiser}."), down.shape[0]))
        for layer, (down, up) in layers.items()
    }, float(config["lora_alpha"])


def _correction(config: Mapping, layer: str, rank: int) -> float:
    """The scale of a layer in PEFT over alpha / rank. Not 1 with patterns of alpha, or with rank-stabilised LoRA."""
    pattern = config.get("alpha_pattern") or {}
    alpha = pattern.get(get_pattern_key(pattern.keys(), layer), config["lora_alpha"])
    return alpha / config["lora_alpha"] * (math.sqrt(rank) if config.get("use_rslora") else 1.0)


def _kohya(layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]], alpha: float) -> dict[str, torch.Tensor]:
    state = {}
    for layer, (down, up) in layers.items():
        name = f"lora_{layer.replace('.', '_')}"
        state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"] = down, up
        state[f"{name}.alpha"] = torch.tensor(alpha)
    return state


def _diffusers(layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]], alpha: float) -> dict[str, torch.Tensor]:
    state = {}
    for layer, (down, up) in layers.items():
        state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"] = down, up * (alpha / down.shape[0])
    return state


def _reads_back(
    pipeline_class: type | None,
    state: Mapping[str, torch.Tensor],
    layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    alpha: float,
) -> bool:
    """Whether the pipeline's own reader finds the same change of the same layers."""
    if not hasattr(pipeline_class, "lora_state_dict"):
        return False
    try:
        found = pipeline_class.lora_state_dict(dict(state))
    except Exception:  # each pipeline's reader fails in its own way on names it does not know
        return False
    found, alphas = found[:2] if isinstance(found, tuple) else (found, None)
    if not any(".lora_A." in key for key in found):
        found = convert_unet_state_dict_to_peft(found)
    if set(found) != {f"{layer}.lora_{factor}.weight" for layer in layers for factor in "AB"}:
        return False
    if alphas and set(alphas.values()) != {alpha}:
        return False
    for layer, (down, up) in layers.items():
        here, there = alpha / len(down), alpha / len(down) if alphas else 1.0
        change = there * found[f"{layer}.lora_B.weight"] @ found[f"{layer}.lora_A.weight"]
        if not torch.allclose(change, here * up @ down, rtol=1e-4, atol=1e-7):
            return False
    return True
