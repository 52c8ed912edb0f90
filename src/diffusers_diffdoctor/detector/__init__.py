# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Diagnose: a SegFormer that gives every pixel of an image the confidence that it is an artifact.

The import registers it with transformers. `configuration_*`, `modeling_*` and `image_processing_*` are copied into every
saved detector, so that it loads with `trust_remote_code=True` where this package is not installed; they import nothing but
transformers and one another.
"""

import importlib

from transformers import AutoConfig, AutoImageProcessor, AutoModelForSemanticSegmentation
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils import is_torchvision_available

from .collator import ArtifactDetectorCollator
from .configuration_artifact_detector import ArtifactDetectorConfig
from .conversion import convert_detector_checkpoint
from .image_processing_pil_artifact_detector import ArtifactDetectorImageProcessorPil
from .modeling_artifact_detector import ArtifactDetectorForSemanticSegmentation
from .modeling_artifact_scorer import ArtifactScorer, ArtifactScorerConfig
from .pipeline_artifact_detection import TASK, ArtifactDetectionPipeline


if is_torchvision_available():
    from .image_processing_artifact_detector import ArtifactDetectorImageProcessor

    _PROCESSORS = {"pil": ArtifactDetectorImageProcessorPil, "torchvision": ArtifactDetectorImageProcessor}
else:
    ArtifactDetectorImageProcessor = ArtifactDetectorImageProcessorPil
    _PROCESSORS = {"pil": ArtifactDetectorImageProcessorPil}

AutoConfig.register(ArtifactDetectorConfig.model_type, ArtifactDetectorConfig, exist_ok=True)
AutoModelForSemanticSegmentation.register(
    ArtifactDetectorConfig, ArtifactDetectorForSemanticSegmentation, exist_ok=True
)
AutoImageProcessor.register(ArtifactDetectorConfig, image_processor_classes=_PROCESSORS, exist_ok=True)
AutoConfig.register(ArtifactScorerConfig.model_type, ArtifactScorerConfig, exist_ok=True)
AutoModelForSemanticSegmentation.register(ArtifactScorerConfig, ArtifactScorer, exist_ok=True)
AutoImageProcessor.register(ArtifactScorerConfig, image_processor_classes=_PROCESSORS, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(
    TASK, pipeline_class=ArtifactDetectionPipeline, pt_model=AutoModelForSemanticSegmentation, type="image"
)

__all__ = [
    "ArtifactDetectionPipeline",
    "ArtifactDetectorCollator",
    "ArtifactDetectorConfig",
    "ArtifactDetectorForSemanticSegmentation",
    "ArtifactDetectorImageProcessor",
    "ArtifactDetectorImageProcessorPil",
    "ArtifactDetectorTrainer",
    "ArtifactDetectorTrainingArguments",
    "ArtifactScorer",
    "ArtifactScorerConfig",
    "convert_detector_checkpoint",
]


def __getattr__(name):
    if name in ("ArtifactDetectorTrainer", "ArtifactDetectorTrainingArguments"):
        return getattr(
            importlib.import_module(".trainer", __name__), name
        )  # seconds, which diagnosing need not wait for
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return __all__
