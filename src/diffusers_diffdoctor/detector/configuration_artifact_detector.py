# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the artifact detector, and the one rule for the size at which it looks at an image."""

import copy

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.segformer.configuration_segformer import SegformerConfig


SIZE_MULTIPLE = 32  # the encoder halves its input five times
MAX_ASPECT_RATIO = 16


def detector_input_size(height: int, width: int, image_size: int) -> tuple[int, int]:
    """Size at which the detector sees an image: short side `image_size`, aspect kept, both multiples of 32.

    Args:
        height, width: size of the image in pixels.
        image_size: length of the short side in pixels.

    Raises:
        ValueError: an empty image, or one side more than 16 times the other, which would make the long side huge.
    """
    if min(height, width) < 1:
        raise ValueError(f"The image is {height} x {width} pixels; both sides must be at least 1.")
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(
            f"The image is {height} x {width} pixels; one side may be at most {MAX_ASPECT_RATIO} times the other. "
            "Crop it or cut it into parts."
        )
    scale = image_size / min(height, width)
    return tuple(max(1, round(side * scale / SIZE_MULTIPLE)) * SIZE_MULTIPLE for side in (height, width))


@strict
class ArtifactDetectorConfig(SegformerConfig):
    r"""
    Configuration of [`ArtifactDetectorForSemanticSegmentation`]: the hyper-parameters of SegFormer with one output
    channel, and how images are brought to the network. The defaults are SegFormer-b5 at 512 pixels, the detector of the
    DiffDoctor paper (84.6 M parameters).

    The architecture is free of restrictions, but the pretrained encoder that the paper starts from, `nvidia/mit-b5`, is
    under a licence that allows non-commercial use only. Detectors that are trained from other weights do not inherit it.

    Instead of SegFormer's, the encoder may be any of transformers' `AutoBackbone`, under SegFormer's decode head.

    Args:
        backbone_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of an encoder of `AutoBackbone` whose maps have a fourth, an eighth, ... of the image's side, such as
            `PvtV2Config` or `Swinv2Config`. Without `out_features` the maps of its last four stages are used.
            SegFormer's own hyper-parameters mean nothing then, but for `decoder_hidden_size` and `classifier_dropout_prob`.
        image_size (`int`, *optional*, defaults to 512):
            Short side in pixels to which images are resized, aspect kept, before they enter the network. A multiple
            of 32.
        image_mean (`list[float]`, *optional*, defaults to ImageNet's `[0.485, 0.456, 0.406]`):
            Mean per channel by which images in [0, 1] are normalised.
        image_std (`list[float]`, *optional*, defaults to ImageNet's `[0.229, 0.224, 0.225]`):
            Standard deviation per channel by which images in [0, 1] are normalised.
        **kwargs:
            Everything that [`~transformers.SegformerConfig`] takes: `depths`, `hidden_sizes`, `decoder_hidden_size`...

    Example:

    ```python
    >>> from diffusers_diffdoctor import ArtifactDetectorConfig, ArtifactDetectorForSemanticSegmentation

    >>> config = ArtifactDetectorConfig(depths=[1, 1, 1, 1], hidden_sizes=[16, 16, 32, 32], decoder_hidden_size=32,
    ...                                 num_attention_heads=[1, 1, 2, 2], image_size=128)
    >>> model = ArtifactDetectorForSemanticSegmentation(config)
    ```"""

    model_type = "artifact_detector"
    _auto_class = "AutoConfig"
    sub_configs = {"backbone_config": AutoConfig}

    depths: list[int] | tuple[int, ...] = (3, 6, 40, 3)
    hidden_sizes: list[int] | tuple[int, ...] = (64, 128, 320, 512)
    decoder_hidden_size: int = 768
    image_size: int = 512
    image_mean: list[float] | tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: list[float] | tuple[float, ...] = (0.229, 0.224, 0.225)
    backbone_config: dict | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs):
        if self.id2label is None and kwargs.get("num_labels") is None:
            self.id2label = {0: "artifact"}
            self.label2id = {"artifact": 0}
        if self.backbone_config is not None:
            self.backbone_config = _backbone_config(self.backbone_config)
        super().__post_init__(**kwargs)
        self.validate_image_preprocessing()  # here it is a plain ValueError

    def validate_image_preprocessing(self):
        """Called by `validate()` too, that is on saving as well."""
        if self.image_size < SIZE_MULTIPLE or self.image_size % SIZE_MULTIPLE:
            raise ValueError(
                f"image_size must be a positive multiple of {SIZE_MULTIPLE}, got {self.image_size}: the encoder halves "
                "its input five times."
            )
        for name in ("image_mean", "image_std"):
            if len(getattr(self, name)) != self.num_channels:
                raise ValueError(
                    f"{name} must have one number per channel ({self.num_channels}), got {getattr(self, name)}."
                )
        if min(self.image_std) <= 0:
            raise ValueError(f"image_std must be positive, got {self.image_std}.")


def _backbone_config(given: dict | PreTrainedConfig) -> PreTrainedConfig:
    """The configuration with several maps to put out, where it has only the last one, the default of `AutoBackbone`."""
    if isinstance(given, dict):
        given = AutoConfig.for_model(**given)
    stages = getattr(given, "stage_names", None)
    if stages is None:
        raise ValueError(
            f"backbone_config is of the model type {given.model_type!r}, which is no encoder of `AutoBackbone`: use one that is, such "
            "as PvtV2Config, Swinv2Config, ConvNextConfig or ResNetConfig."
        )
    patch = getattr(given, "patch_size", None)
    if isinstance(patch, int) and SIZE_MULTIPLE % patch:
        raise ValueError(
            f"backbone_config of the model type {given.model_type!r} has a patch_size of {patch}, but images enter the detector with "
            f"sides that are multiples of {SIZE_MULTIPLE}, whose last pixels it would not see. Use an encoder whose patch size "
            f"divides {SIZE_MULTIPLE}."
        )
    given = copy.deepcopy(given)
    # of the model that the encoder is from: its path, which may be private, and the names of what it told apart
    given.name_or_path, given.architectures, given.num_labels = "", None, 2
    if given.out_features is None or list(given.out_features) == stages[-1:]:
        given.out_features = stages[-4:]
    return given


__all__ = ["ArtifactDetectorConfig", "detector_input_size"]
