# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Image processor of the artifact detector on PIL and numpy, and what both backends share."""

import torch
import torch.nn.functional as F
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
)

from .configuration_artifact_detector import ArtifactDetectorConfig, detector_input_size


class ArtifactDetectorImageProcessing:
    """What does not depend on the backend: the size rule, the maps beside the images, and the way back to maps."""

    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"shortest_edge": 512}
    default_to_square = False
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    rescale_factor = 1 / 255
    _auto_class = "AutoImageProcessor"

    @classmethod
    def for_detector(cls, config: ArtifactDetectorConfig):
        """The processor that prepares images as a detector of this configuration does in `confidence`."""
        return cls(
            size={"shortest_edge": config.image_size},
            image_mean=list(config.image_mean),
            image_std=list(config.image_std),
        )

    def preprocess(self, images: ImageInput, artifact_maps: ImageInput | None = None, **kwargs) -> BatchFeature:
        """Prepare images, and for training their artifact maps.

        Args:
            images: PIL images, arrays or tensors of 8-bit values (pass `do_rescale=False` for floats in [0, 1]), in any
                number; with `return_tensors` all must come to the same size.
            artifact_maps: one per image, of its height and width: PIL "L" images or arrays (H, W), 255 = 1.0 = artifact.

        Returns:
            `pixel_values` (3, h, w) each, and `labels` (1, h, w) each, float in [0, 1], with h and w as in
            [`detector_input_size`].
        """
        return super().preprocess(images, artifact_maps, **kwargs)

    def _preprocess_image_like_inputs(self, images, artifact_maps=None, return_tensors=None, **kwargs) -> BatchFeature:
        # The backends hand different arguments to these methods: of the preparation, only PIL has no device.
        prepare = {
            name: kwargs.pop(name) for name in ("do_convert_rgb", "input_data_format", "device") if name in kwargs
        }
        if self.backend == "pil":
            prepare.pop("device", None)
        images = self._prepare_image_like_inputs(images=images, **prepare)
        data = {"pixel_values": self._preprocess(images, return_tensors=None, **kwargs)["pixel_values"]}
        if artifact_maps is not None:
            prepare |= {"do_convert_rgb": False, "input_data_format": ChannelDimension.FIRST}
            maps = self._prepare_image_like_inputs(images=artifact_maps, expected_ndims=2, **prepare)
            if len(maps) != len(images):
                raise ValueError(f"Got {len(images)} images and {len(maps)} artifact maps; pass one map per image.")
            for index, (image, artifact_map) in enumerate(zip(images, maps)):
                if artifact_map.shape != (1, *image.shape[-2:]):
                    raise ValueError(
                        f"Artifact map {index} has the shape {tuple(artifact_map.shape)}, its image is "
                        f"{image.shape[-2]} x {image.shape[-1]}; a map has one channel and the size of its image."
                    )
            kwargs |= {"do_normalize": False, "do_rescale": True, "rescale_factor": 1 / 255}
            data["labels"] = self._preprocess(maps, return_tensors=None, **kwargs)["pixel_values"]
        return BatchFeature(data=data, tensor_type=return_tensors)

    def resize(self, image, size: SizeDict, resample=None, **kwargs):
        """Resize to the detector's input size for the short side `size.shortest_edge`, or to a given height and width."""
        if size.shortest_edge:
            height, width = detector_input_size(*image.shape[-2:], size.shortest_edge)
            size = SizeDict(height=height, width=width)
        return super().resize(image, size, resample, **kwargs)

    def post_process_artifact_detection(
        self, outputs, target_sizes: list[tuple[int, int]] | None = None
    ) -> list[torch.Tensor]:
        """Logits of the detector to artifact maps.

        Args:
            outputs: output of the detector with `logits` (B, 1, h/4, w/4).
            target_sizes: (height, width) per image; without it maps keep the size of the logits.

        Returns:
            list of B maps (height, width), float32 in [0, 1], 1 = artifact.
        """
        logits = outputs.logits.float()
        if target_sizes is None:
            return list(logits[:, 0].sigmoid())
        if len(target_sizes) != len(logits):
            raise ValueError(f"Got {len(target_sizes)} target_sizes for {len(logits)} maps; pass one per image.")
        return [
            F.interpolate(
                one[None], size=tuple(int(side) for side in size), mode="bilinear", align_corners=False
            ).sigmoid()[0, 0]
            for one, size in zip(logits, target_sizes)
        ]


class ArtifactDetectorImageProcessorPil(ArtifactDetectorImageProcessing, PilBackend):
    """Prepares images for [`ArtifactDetectorForSemanticSegmentation`] with PIL: the same size and statistics as its
    `confidence`, up to the rounding of 8-bit resizing."""


__all__ = ["ArtifactDetectorImageProcessorPil"]
