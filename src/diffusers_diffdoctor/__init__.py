# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Diagnose the broken pixels of generated images and treat the diffusion model that made them.

The import registers the detector with the Auto classes of transformers, and the task "artifact-detection" with its
`pipeline()`. What needs diffusers, or a trainer, is loaded on first use.
"""

import importlib
from typing import TYPE_CHECKING

from .detector import (
    ArtifactDetectionPipeline,
    ArtifactDetectorConfig,
    ArtifactDetectorForSemanticSegmentation,
    ArtifactDetectorImageProcessor,
    convert_detector_checkpoint,
)


__version__ = "0.1.0.dev0"

# public name -> package that defines it
_LOADED_ON_USE = {
    "ArtifactDetectorTrainer": "detector",
    "ArtifactDetectorTrainingArguments": "detector",
    "ArtifactReward": "rewards",
    "RewardOutput": "rewards",
    "pixel_penalty": "rewards",
    "DifferentiableRollout": "rollout",
    "DDPOConfig": "treatment",
    "DDPOTrainer": "treatment",
    "DiffusionDPOConfig": "treatment",
    "DiffusionDPOTrainer": "treatment",
    "PixelRewardConfig": "treatment",
    "PixelRewardTrainer": "treatment",
}

__all__ = [
    "ArtifactDetectionPipeline",
    "ArtifactDetectorConfig",
    "ArtifactDetectorForSemanticSegmentation",
    "ArtifactDetectorImageProcessor",
    "ArtifactDetectorTrainer",
    "ArtifactDetectorTrainingArguments",
    "ArtifactReward",
    "DDPOConfig",
    "DDPOTrainer",
    "DifferentiableRollout",
    "DiffusionDPOConfig",
    "DiffusionDPOTrainer",
    "PixelRewardConfig",
    "PixelRewardTrainer",
    "RewardOutput",
    "__version__",
    "convert_detector_checkpoint",
    "pixel_penalty",
]

if TYPE_CHECKING:
    from .detector import ArtifactDetectorTrainer, ArtifactDetectorTrainingArguments
    from .rewards import ArtifactReward, RewardOutput, pixel_penalty
    from .rollout import DifferentiableRollout
    from .treatment import (
        DDPOConfig,
        DDPOTrainer,
        DiffusionDPOConfig,
        DiffusionDPOTrainer,
        PixelRewardConfig,
        PixelRewardTrainer,
    )


def __getattr__(name):
    if name in _LOADED_ON_USE:
        return getattr(importlib.import_module(f".{_LOADED_ON_USE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return __all__
