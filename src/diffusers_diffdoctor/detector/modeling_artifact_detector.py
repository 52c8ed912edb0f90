# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The artifact detector: SegFormer with one output channel, and the differentiable way from an image to its map."""

import copy
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import HfApi, ModelCard
from transformers import AutoBackbone, SegformerForSemanticSegmentation
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.models.segformer.modeling_segformer import SegformerDecodeHead, SegformerPreTrainedModel
from transformers.utils.generic import can_return_tuple

from .configuration_artifact_detector import SIZE_MULTIPLE, ArtifactDetectorConfig, detector_input_size


RANGE_TOLERANCE = 1e-3
RANGE_CHECK_INTERVAL = 100

MODEL_CARD = """---
library_name: transformers
pipeline_tag: image-segmentation
tags:
- diffusers-diffdoctor
- artifact-detection
{metadata}---

# Artifact detector

Gives every pixel of a generated image the confidence, from 0 to 1, that it belongs to an artifact: a deformed hand, a
sixth finger, a melted face. Made with `diffusers-diffdoctor`, after the first stage of
[DiffDoctor](https://arxiv.org/abs/2501.12382). {architecture}, {parameters:.1f} M parameters; it looks at images with their
short side resized to {image_size} pixels.

```python
import diffusers_diffdoctor
from transformers import pipeline

detect = pipeline("artifact-detection", model={name})
detect("image.png")  # {{"artifact_map": <PIL image>, "max_confidence": 0.93, "area_ratio": 0.04}}
```

Without the package, `model.confidence(images)` takes images (batch, 3, height, width) in [0, 1]:

```python
from transformers import AutoModelForSemanticSegmentation

model = AutoModelForSemanticSegmentation.from_pretrained({name}, trust_remote_code=True).eval()
```

{sections}## Limits

Small hands and faces in large images are seen better in tiles (`detect(image, tile=512)`). A figure of this detector is
no proof for a generator that was trained against it: judge with another one. Detectors that started from `nvidia/mit-b*`
inherit its licence, which allows non-commercial use only.

A detector grows stale: it knows the mistakes of the generators that it learned from, and may find little in images of newer
ones. `diffdoctor data drift` compares a new generator's images with what it knows.
"""


def resize_images(images: torch.Tensor, image_size: int) -> torch.Tensor:
    """Bring images (B, 3, H, W) to [`detector_input_size`], by antialiased bilinear resizing. Differentiable."""
    size = detector_input_size(*images.shape[-2:], image_size)
    if size == tuple(images.shape[-2:]):
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)


def normalise_images(
    images: torch.Tensor, config: ArtifactDetectorConfig, image_size: int | None = None
) -> torch.Tensor:
    """Bring images (B, 3, H, W) in [0, 1] to the size and the statistics that the detector expects. Differentiable.

    [`resize_images`], by `image_size` instead of the configuration's where it is given; then `(images - image_mean) / image_std`.
    """
    images = resize_images(images, config.image_size if image_size is None else image_size)
    mean, std = (images.new_tensor(values)[:, None, None] for values in (config.image_mean, config.image_std))
    return (images - mean) / std


def check_labels(pixel_values: torch.Tensor, labels: torch.Tensor) -> None:
    """Refuse labels that are no artifact maps of these images: another shape, type or range."""
    if labels.ndim != 4 or labels.shape[:2] != (len(pixel_values), 1):
        raise ValueError(
            f"labels must have the shape (B, 1, H, W) with B = {len(pixel_values)}, got {tuple(labels.shape)}."
        )
    if not labels.is_floating_point():
        raise TypeError(f"labels must be floating point maps in [0, 1], got {labels.dtype}; divide 8-bit by 255.")
    if torch.compiler.is_compiling():
        return
    low, high = torch.stack(torch.aminmax(labels)).tolist()
    if not (low >= -1 and high <= 1):
        raise ValueError(
            f"labels must lie in [0, 1], or be -1 where pixels do not count, found values from {low:.4g} to {high:.4g}; "
            "divide 8-bit by 255."
        )


def squared_error(confidence: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Per image, the mean of `(confidence - labels)^2` over the pixels whose label is not negative.

    Args:
        confidence, labels: (B, 1, H, W).

    Returns:
        (B,), 0 for an image of which no pixel counts.
    """
    counted = labels >= 0
    error = ((confidence - labels).square() * counted).flatten(1).sum(dim=1)
    return error / counted.flatten(1).sum(dim=1).clamp(min=1)


class ArtifactDetectorForSemanticSegmentation(SegformerForSemanticSegmentation):
    """SegFormer with one output channel that learns and predicts artifact maps (DiffDoctor, section 3.2).

    `forward` is the network: normalised pixels in, logits at a quarter of their size out. [`confidence`] is what everyone
    else calls: images in [0, 1] in, confidences at their size out. Call `eval()` first; the decode head holds a batch
    norm. Gradients reach the images in both.

    With `config.backbone_config` the encoder is that of transformers' `AutoBackbone`, and the logits have the size of its largest
    map, usually a quarter of the image's side too. All else is the same.

    Weights that were saved by earlier versions of transformers, whose SegFormer had other key names, are converted on
    loading.

    Raises:
        ValueError: if the configuration has more than one label.
    """

    config_class = ArtifactDetectorConfig
    config: ArtifactDetectorConfig
    _auto_class = "AutoModelForSemanticSegmentation"
    # The loss is a mean over pixels: the Trainer must divide by the accumulation steps itself.
    accepts_loss_kwargs = False

    def __init__(self, config: ArtifactDetectorConfig):
        if config.num_labels != 1:
            raise ValueError(
                f"An artifact detector has one output channel, this configuration has {config.num_labels} labels. "
                "Load a two-class segmentation model with its own class, or train a detector with `num_labels=1`."
            )
        if config.backbone_config is None:
            super().__init__(config)
        else:
            SegformerPreTrainedModel.__init__(self, config)  # without SegFormer's own encoder
            self.backbone = AutoBackbone.from_config(config.backbone_config)
            head = copy.copy(config)
            head.hidden_sizes, head.num_encoder_blocks = self.backbone.channels, len(self.backbone.channels)
            self.decode_head = SegformerDecodeHead(head)
            self.post_init()
        self._unchecked_calls = 0

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs
    ) -> SemanticSegmenterOutput:
        """Logits, and with `labels` the loss `L_AD = 1/N sum (C_hat - C)^2` (DiffDoctor, equation 1).

        Args:
            pixel_values: normalised images (B, 3, h, w), as an [`ArtifactDetectorImageProcessor`] makes them.
            labels: artifact maps (B, 1, H, W), float in [0, 1], 1 = artifact, and -1 where a pixel is not to count, such as
                padding. H and W may differ from h and w.

        Returns:
            `SemanticSegmenterOutput` with `logits` (B, 1, h/4, w/4) and `loss`, the mean over images of the mean over the
            counted pixels of the squared difference between `sigmoid` of the logits, upsampled to (H, W), and the labels.
            So an image weighs the same whatever else is in its batch.
        """
        if labels is not None:
            check_labels(pixel_values, labels)
        if self.config.backbone_config is None:
            outputs = super().forward(pixel_values, return_dict=True, **kwargs)
        else:
            outputs = SemanticSegmenterOutput(logits=self.decode_head(self._feature_maps(pixel_values)))
        if labels is not None:
            outputs = SemanticSegmenterOutput(
                loss=squared_error(self._upsample(outputs.logits, labels.shape[-2:]), labels).mean(),
                **outputs,
            )
        return outputs

    def _feature_maps(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Of the backbone, the largest first: (B, C, h/s, w/s) with reductions s that divide 32."""
        maps = self.backbone(pixel_values).feature_maps
        for one in maps:
            if any(
                side % part or SIZE_MULTIPLE % (side // part)
                for side, part in zip(pixel_values.shape[-2:], one.shape[-2:])
            ):
                raise ValueError(
                    f"The backbone {self.config.backbone_config.model_type!r} makes a map of {one.shape[-2]} x {one.shape[-1]} of an "
                    f"input of {pixel_values.shape[-2]} x {pixel_values.shape[-1]}, so that its pixels have no place in the image. Use "
                    f"one that reduces each side by a factor of {SIZE_MULTIPLE}."
                )
        return maps

    def confidence(self, images: torch.Tensor) -> torch.Tensor:
        """Confidence of every pixel that it is an artifact. Differentiable with respect to `images`.

        Images are resized so that the short side is `config.image_size`, aspect kept, both sides multiples of 32, and
        normalised; logits are upsampled to the size of the images. Resizing and the sigmoid are computed in float32
        (float64 stays float64), the network in its own type.

        Args:
            images: float (B, 3, H, W) in [0, 1], on the device of the model.

        Returns:
            float (B, 1, H, W) in [0, 1], 1 = artifact, in float32 (float64 for a float64 model).

        Raises:
            TypeError: not a floating point tensor.
            ValueError: wrong shape, values outside [0, 1], or NaN. On an accelerator, where reading a value back waits
                for all queued work, values are checked on the first call and then on one call of 100.
        """
        self._check_images(images)
        precise = torch.promote_types(images.dtype, torch.float32)
        pixel_values = normalise_images(images.to(precise), self.config)
        logits = self(pixel_values.to(self.dtype)).logits
        return self._upsample(logits, images.shape[-2:])

    @staticmethod
    def _upsample(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False).sigmoid()

    def _check_images(self, images: torch.Tensor) -> None:
        if not isinstance(images, torch.Tensor):
            raise TypeError(
                f"images must be a torch tensor (B, 3, H, W) in [0, 1], got {type(images).__name__}. "
                'For files and PIL images use `pipeline("artifact-detection")`.'
            )
        if not images.is_floating_point():
            raise TypeError(f"images must be floating point in [0, 1], got {images.dtype}; divide 8-bit by 255.")
        if images.ndim != 4 or images.shape[1] != self.config.num_channels or images.shape[0] == 0:
            raise ValueError(
                f"images must have the shape (B, {self.config.num_channels}, H, W) with B > 0, got {tuple(images.shape)}."
            )
        if torch.compiler.is_compiling():
            return
        if images.device.type != "cpu" and self._unchecked_calls % RANGE_CHECK_INTERVAL:
            self._unchecked_calls += 1
            return
        self._unchecked_calls = 1
        low, high = torch.stack(torch.aminmax(images.detach())).tolist()  # NaN anywhere makes both NaN
        if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):
            if low != low:
                remedy = "look for the step that makes NaN, often half precision"
            elif low < -RANGE_TOLERANCE and high > 1.5:
                remedy = "undo their normalisation: the detector normalises by itself"
            elif high > 2:
                remedy = "divide 8-bit by 255"
            elif low < -0.5:
                remedy = "map [-1, 1] by `images / 2 + 0.5`"
            else:
                remedy = "clamp them"
            raise ValueError(f"images must lie in [0, 1], found values from {low:.4g} to {high:.4g}; {remedy}.")

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """As [`~transformers.PreTrainedModel.save_pretrained`]; writes a model card if the folder has none."""
        super().save_pretrained(save_directory, **kwargs)
        for weights in Path(save_directory).glob("*.safetensors"):  # which only their owner could read
            shutil.copymode(Path(save_directory, "config.json"), weights)
        card = os.path.join(save_directory, "README.md")
        if kwargs.get("is_main_process", True) and not os.path.exists(card):
            with open(card, "w", encoding="utf-8") as file:
                file.write(self.model_card(os.path.basename(os.path.abspath(save_directory))))

    def push_to_hub(self, repo_id: str, **kwargs):
        """As [`~transformers.PreTrainedModel.push_to_hub`]; a repository without a model card gets ours."""
        # transformers fills an empty repository with a generic card, and keeps a card that is there before.
        api = HfApi(token=kwargs.get("token"))
        repo_id = api.create_repo(repo_id, private=kwargs.get("private"), exist_ok=True).repo_id
        if not api.file_exists(repo_id, "README.md"):
            ModelCard(self.model_card(repo_id)).push_to_hub(repo_id, token=kwargs.get("token"))
        return super().push_to_hub(repo_id, **kwargs)

    def model_card(self, name: str, metadata: str = "", sections: str = "") -> str:
        """Text of the model card for a repository or folder of this name.

        Its last line is a digest of the others, which tells a card that nobody has edited.

        Args:
            name: of the repository or folder.
            metadata: further lines of its YAML, each ended.
            sections: further sections in Markdown, each ended by an empty line.
        """
        # a folder's name may hold anything: here it is a literal of Python on one line, in ASCII where it is not valid Unicode
        literal = json.dumps(name, ensure_ascii=not name.isprintable())
        backbone = self.config.backbone_config
        text = MODEL_CARD.format(
            name=literal,
            parameters=self.num_parameters() / 1e6,
            image_size=self.config.image_size,
            architecture="SegFormer" if backbone is None else f"SegFormer's decode head on {backbone.model_type}",
            metadata=metadata,
            sections=sections,
        )
        return f"{text}\n<!-- as written: {hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()} -->\n"


# The native class converts its own old keys by class name. Ours needs the entry too, under its own name; the encoder is a
# native SegformerModel and is found by itself.
register_checkpoint_conversion_mapping(
    "ArtifactDetectorForSemanticSegmentation",
    [WeightRenaming("decode_head.linear_c", "decode_head.linear_projections")],
    overwrite=True,
)

__all__ = ["ArtifactDetectorForSemanticSegmentation"]
