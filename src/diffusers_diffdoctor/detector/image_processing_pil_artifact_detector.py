# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Image processor of the artifact detector on PIL and numpy, and what both backends share."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
)

from .configuration_artifact_detector import ArtifactDetectorConfig, detector_input_size


RANGE_TOLERANCE = 1e-3  # by which floats may leave [0, 1]: rounding, not another range


class ArtifactDetectorImageProcessing:
    """What does not depend on the backend: the range of values, the size rule, and the way from logits to maps."""

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

    def preprocess(self, images: ImageInput, **kwargs) -> BatchFeature:
        """Prepare images.

        Args:
            images: PIL images, arrays or tensors, of 8-bit values or floats in [0, 1], in any number; transparent parts are
                laid on white. With `return_tensors` all must come to the same size.

        Returns:
            `pixel_values` (3, h, w) each, with h and w as in [`detector_input_size`].

        Raises:
            ValueError: floats outside [0, 1], or `do_rescale=False`, which would leave the range in doubt.
            TypeError: integers of more than 8 bits.
        """
        if not kwargs.get("do_rescale", self.do_rescale):
            raise ValueError("`do_rescale` must stay true: floats in [0, 1] are recognised and need no other setting.")
        return super().preprocess(images, **kwargs)

    def process_image(self, image, *args, **kwargs):
        """As the backend's, which then sees RGB of 8 bits whatever came in: before transformers 5.21 it drops alpha."""
        if not isinstance(image, Image.Image):
            image = _to_8_bits(image)
            layout = kwargs.get("input_data_format")
            if image.ndim == 3:
                layout = layout or infer_channel_dimension_format(image, num_channels=(1, 3, 4))
                if image.shape[0 if layout == ChannelDimension.FIRST else 2] == 3:
                    return super().process_image(image, *args, **kwargs)
            array = image.cpu().numpy() if isinstance(image, torch.Tensor) else image
            array = np.moveaxis(array, 0, 2) if array.ndim == 3 and layout == ChannelDimension.FIRST else array
            image = Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)
            kwargs["input_data_format"] = None
        elif image.mode.startswith(("I", "F")):  # more than 8 bits
            image = Image.fromarray(_to_8_bits(image))
        return super().process_image(_on_white(image), *args, **kwargs)

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


def _on_white(image: Image.Image) -> Image.Image:
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _to_8_bits(image):
    """Array or tensor of bytes or of floats in [0, 1] -> bytes."""
    image = image if isinstance(image, torch.Tensor) else np.asarray(image)
    if image.dtype in (torch.uint8, np.uint8):
        return image
    remedy = "For pictures of any kind there is `diffusers_diffdoctor.images.read_image`."
    if not (image.is_floating_point() if isinstance(image, torch.Tensor) else image.dtype.kind == "f"):
        raise TypeError(f"Images must be 8-bit (uint8) or floats in [0, 1], found {image.dtype}. {remedy}")
    low, high = float(image.min()), float(image.max())
    if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):
        raise ValueError(
            f"Images of floats must lie in [0, 1], found values from {low:.4g} to {high:.4g}. Cast 8-bit values to uint8. "
            f"{remedy}"
        )
    image = (image.clip(0, 1) * 255).round()
    return image.to(torch.uint8) if isinstance(image, torch.Tensor) else image.astype(np.uint8)


class ArtifactDetectorImageProcessorPil(ArtifactDetectorImageProcessing, PilBackend):
    """Prepares images for [`ArtifactDetectorForSemanticSegmentation`] with PIL: the same size and statistics as its
    `confidence`, up to the rounding of 8-bit resizing."""


__all__ = ["ArtifactDetectorImageProcessorPil"]
