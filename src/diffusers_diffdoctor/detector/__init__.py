# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Diagnose: a SegFormer that gives every pixel of an image the confidence that it is an artifact.

`configuration_*`, `modeling_*` and `image_processing_*` are copied into every saved detector, so that it loads with
`trust_remote_code=True` where this package is not installed; they import nothing but transformers and one another.
"""

import importlib


_PUBLIC = {
    "ArtifactDetectorConfig": "configuration_artifact_detector",
    "ArtifactDetectorForSemanticSegmentation": "modeling_artifact_detector",
    "ArtifactDetectorImageProcessorPil": "image_processing_pil_artifact_detector",
    "ArtifactDetectionPipeline": "pipeline_artifact_detection",
    "ArtifactDetectorTrainer": "trainer",
    "ArtifactDetectorTrainingArguments": "trainer",
    "ArtifactDetectorCollator": "trainer",
    "convert_detector_checkpoint": "conversion",
}

__all__ = sorted([*_PUBLIC, "ArtifactDetectorImageProcessor"])


def __getattr__(name):
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    if name == "ArtifactDetectorImageProcessor":  # the torchvision backend where torchvision is, as in transformers
        from transformers.utils import is_torchvision_available

        if is_torchvision_available():
            from .image_processing_artifact_detector import ArtifactDetectorImageProcessor as processor
        else:
            from .image_processing_pil_artifact_detector import ArtifactDetectorImageProcessorPil as processor
        return processor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return __all__
