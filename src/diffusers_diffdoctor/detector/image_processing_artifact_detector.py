# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Image processor of the artifact detector on torchvision, which is optional."""

from transformers.image_processing_backends import TorchvisionBackend

from .image_processing_pil_artifact_detector import ArtifactDetectorImageProcessing


class ArtifactDetectorImageProcessor(ArtifactDetectorImageProcessing, TorchvisionBackend):
    """Prepares images for [`ArtifactDetectorForSemanticSegmentation`] with torchvision, in batches and on any device: the
    same size and statistics as its `confidence`, up to the rounding of 8-bit resizing."""


__all__ = ["ArtifactDetectorImageProcessor"]
