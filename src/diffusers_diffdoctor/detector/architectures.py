# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Where a detector's training begins: random weights of a known size, a pretrained encoder, or another detector."""

import os
from typing import Any

import torch
from transformers import AutoBackbone, AutoConfig, PreTrainedConfig, SegformerConfig, SegformerModel
from transformers.image_processing_base import ImageProcessingMixin

from ..loading import errors_named
from .configuration_artifact_detector import ArtifactDetectorConfig
from .modeling_artifact_detector import ArtifactDetectorForSemanticSegmentation


__all__ = ["ARCHITECTURES", "load_detector", "new_detector"]

# SegFormer's encoders, Mix Transformers (arXiv 2105.15203, table 6), with the decode heads of its section 3.2
ARCHITECTURES = {
    "b0": {"depths": [2, 2, 2, 2], "hidden_sizes": [32, 64, 160, 256], "decoder_hidden_size": 256},
    "b1": {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 320, 512], "decoder_hidden_size": 256},
    "b2": {"depths": [3, 4, 6, 3], "hidden_sizes": [64, 128, 320, 512], "decoder_hidden_size": 768},
    "b3": {"depths": [3, 4, 18, 3], "hidden_sizes": [64, 128, 320, 512], "decoder_hidden_size": 768},
    "b4": {"depths": [3, 8, 27, 3], "hidden_sizes": [64, 128, 320, 512], "decoder_hidden_size": 768},
    "b5": {"depths": [3, 6, 40, 3], "hidden_sizes": [64, 128, 320, 512], "decoder_hidden_size": 768},
}


def new_detector(architecture: str, **changes: Any) -> ArtifactDetectorForSemanticSegmentation:
    """A SegFormer with random weights.

    Args:
        architecture: one of `ARCHITECTURES`.
        **changes: of the configuration, such as `image_size`.
    """
    return ArtifactDetectorForSemanticSegmentation(ArtifactDetectorConfig(**ARCHITECTURES[architecture] | changes))


def load_detector(name: str | os.PathLike, **changes: Any) -> ArtifactDetectorForSemanticSegmentation:
    """A detector, or the pretrained encoder of another model under a decode head with random weights, in float32.

    Args:
        name: folder or Hub id of a detector, of a SegFormer (`nvidia/mit-b5`), or of another model that has an encoder in
            `AutoBackbone` (`OpenGVLab/pvt_v2_b2`).
        **changes: of the configuration, such as `image_size`.

    Raises:
        ValueError: it is no such model, or its file lacks weights of the encoder.
    """
    with errors_named(name, f"`model` {str(name)!r}"):
        kind = PreTrainedConfig.get_config_dict(name)[0].get("model_type")
        if kind == ArtifactDetectorConfig.model_type:
            return ArtifactDetectorForSemanticSegmentation.from_pretrained(name, dtype=torch.float32, **changes)
        given = AutoConfig.from_pretrained(name)
        if kind == "segformer":
            own = {key: getattr(given, key) for key in SegformerConfig.__annotations__ if hasattr(given, key)}
            config, encoder_class = ArtifactDetectorConfig(**own | _statistics(name) | changes), SegformerModel
        else:
            config = ArtifactDetectorConfig(backbone_config=given, **_statistics(name) | changes)
            given = config.backbone_config
            with torch.device("meta"):
                encoder_class = type(AutoBackbone.from_config(given))
        encoder, info = encoder_class.from_pretrained(
            name, config=given, dtype=torch.float32, output_loading_info=True
        )
        # the norms of a backbone's maps, which classifiers have not
        missing = sorted(key for key in info["missing_keys"] if "hidden_states_norms" not in key)
        if missing:
            raise ValueError(f"its file has no weights of {len(missing)} tensors of the encoder, such as {missing[0]}")
    model = ArtifactDetectorForSemanticSegmentation(config)
    (model.segformer if kind == "segformer" else model.backbone).load_state_dict(encoder.state_dict())
    model.config.name_or_path = str(name)
    return model


def _statistics(name: str | os.PathLike) -> dict[str, Any]:
    """`image_mean` and `image_std` of the encoder's image processor, if it has one."""
    try:
        content, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        return {}
    return {key: content[key] for key in ("image_mean", "image_std") if content.get(key) is not None}
