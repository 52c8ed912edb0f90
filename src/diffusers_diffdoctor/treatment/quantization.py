# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""A pipeline whose frozen linear layers are stored in 8 or 4 bits, for small GPUs. The LoRA on them stays float32.

The libraries quantize while they load, so this only writes the configuration that they take.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec

import diffusers
import torch
import transformers
from diffusers.quantizers import PipelineQuantizationConfig

from .config import QUANTIZATIONS


# The denoiser and the text encoders. The VAE is small and made of convolutions, which are not quantized.
_PARTS = ("transformer", "unet", "text_encoder")


def check_quantization(quantization: str) -> None:
    """Refuse, before anything is downloaded, what cannot work on this machine."""
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"`quantization` is {quantization!r}, but must be one of {QUANTIZATIONS}, or left out.")
    if quantization == "int8" and find_spec("torchao") is None:
        raise ValueError(
            "`quantization` is 'int8', but torchao is not installed. Use pip install 'diffusers-diffdoctor[quantization]'."
        )
    if quantization == "nf4" and not (torch.cuda.is_available() or torch.xpu.is_available()):
        raise ValueError("`quantization` is 'nf4', which needs a GPU, but there is none. Use 'int8', or a GPU.")


def quantization_config(
    index: Mapping[str, Sequence[str | None]], quantization: str, dtype: torch.dtype
) -> PipelineQuantizationConfig:
    """What `DiffusionPipeline.from_pretrained(pipeline, quantization_config=...)` takes.

    Args:
        index: the pipeline's model_index.json, component -> (library, class).
        quantization: `"int8"`, one byte for each weight and a scale for each row, by torchao. Or `"nf4"`, half a byte for each
            weight and a scale for 64 of them, by bitsandbytes.
        dtype: the type in which nf4 computes.
    """
    if quantization == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        settings = {"quant_type": Int8WeightOnlyConfig()}
        classes = {"diffusers": diffusers.TorchAoConfig, "transformers": transformers.TorchAoConfig}
    else:
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        classes = {"diffusers": diffusers.BitsAndBytesConfig, "transformers": transformers.BitsAndBytesConfig}
    libraries = {name: part[0] for name, part in index.items() if name.startswith(_PARTS)}
    return PipelineQuantizationConfig(
        quant_mapping={name: classes[library](**settings) for name, library in libraries.items() if library in classes}
    )
