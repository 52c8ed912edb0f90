# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Diagnose the broken pixels of generated images and treat the diffusion model that made them.

The public names are loaded on first use, so that `import diffusers_diffdoctor` and `diffdoctor --help` import no torch.
Registration with the Auto classes and the pipeline registry of transformers still happens on plain import: see
`diffusers_diffdoctor._registration`.
"""

import importlib
from typing import TYPE_CHECKING

from . import _registration


__version__ = "0.1.0.dev0"

# public name -> module that defines it
_PUBLIC = {
    "ArtifactDetectorConfig": "detector",
    "ArtifactDetectorForSemanticSegmentation": "detector",
    "ArtifactDetectorImageProcessor": "detector",
    "ArtifactDetectorTrainer": "detector",
    "ArtifactDetectorTrainingArguments": "detector",
    "ArtifactDetectionPipeline": "detector",
    "convert_detector_checkpoint": "detector",
    "ArtifactReward": "rewards",
    "RewardOutput": "rewards",
    "pixel_penalty": "rewards",
    "DifferentiableRollout": "rollout",
    "PixelRewardConfig": "treatment",
    "PixelRewardTrainer": "treatment",
}

__all__ = sorted(_PUBLIC) + ["__version__"]

if TYPE_CHECKING:
    from .detector import (  # noqa: F401
        ArtifactDetectionPipeline,
        ArtifactDetectorConfig,
        ArtifactDetectorForSemanticSegmentation,
        ArtifactDetectorImageProcessor,
        ArtifactDetectorTrainer,
        ArtifactDetectorTrainingArguments,
        convert_detector_checkpoint,
    )
    from .rewards import ArtifactReward, RewardOutput, pixel_penalty  # noqa: F401
    from .rollout import DifferentiableRollout  # noqa: F401
    from .treatment import PixelRewardConfig, PixelRewardTrainer  # noqa: F401


def __getattr__(name):
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return __all__


_registration.install()
