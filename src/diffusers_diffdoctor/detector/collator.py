# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What happens to a row between the dataset and the detector."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from ..images import read_artifact_map, read_image, to_image_tensor
from ..seeds import derive_seed
from .configuration_artifact_detector import ArtifactDetectorConfig
from .modeling_artifact_detector import normalise_images
from .sampling import DRAW


IMAGE, MAP = "image", "artifact_map"
PIXELS, LABELS, SIZES = "pixel_values", "labels", "sizes"
NOT_COUNTED = -1.0  # label of a pixel that no loss and no metric counts


class ArtifactDetectorCollator:
    """Rows of a dataset to a batch for the detector.

    A row has `image` and `artifact_map` of one size, read by [`read_image`] and [`read_artifact_map`]. The image is prepared
    as the detector does it in `confidence`, so that training and inference see the same. The map is reduced to the size at
    which the detector sees the image: a pixel takes the highest value of all that it covers, so that an artifact thinner
    than it stays as certain as it was. What differs in shape is padded on the right and below, images with the mean colour,
    maps with -1, which no loss and no metric counts.

    Or a row has `pixel_values` (3, h, w) and `labels` (1, H, W), which are stacked as they are.

    Args:
        config: configuration of the detector.
        flip_probability, jpeg_probability, jpeg_quality, map_maximum: see [`ArtifactDetectorTrainingArguments`].
            A row with a [`Draw`] is augmented by `seed` and that draw alone, so that a resumed run sees what one that was
            never stopped sees, in whatever worker process; others draw from torch's generator.
        seed: decides the augmentation of rows with a draw.
        for_evaluation: leave maps at the size of their images, and say in `sizes` (B, 4) how high and wide the pixel values
            and the maps are without padding.
    """

    def __init__(
        self,
        config: ArtifactDetectorConfig,
        flip_probability: float = 0.0,
        jpeg_probability: float = 0.0,
        jpeg_quality: tuple[int, int] = (50, 95),
        map_maximum: int | None = None,
        for_evaluation: bool = False,
        seed: int = 0,
    ):
        self.config = config
        self.seed = seed
        self.flip_probability = flip_probability
        self.jpeg_probability = jpeg_probability
        self.jpeg_quality = jpeg_quality
        self.map_maximum = map_maximum
        self.for_evaluation = for_evaluation

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if all(PIXELS in row for row in rows):
            return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in (PIXELS, LABELS)}
        images, maps = zip(*(self._prepare(row) for row in rows))
        batch = {PIXELS: _padded(images, 0.0), LABELS: _padded(maps, NOT_COUNTED)}
        if self.for_evaluation:
            batch[SIZES] = torch.tensor([(*image.shape[-2:], *one.shape[-2:]) for image, one in zip(images, maps)])
        return batch

    def _prepare(self, row: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        generator = None
        if DRAW in row:
            draw = row[DRAW]
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "augmentation", draw.epoch, draw.place))
        image, artifact_map = self._augment(*_read(row, self.map_maximum), generator)
        pixels = normalise_images(to_image_tensor(image)[None], self.config)
        labels = torch.from_numpy(np.array(artifact_map))[None, None] / 255
        return pixels[0], labels[0] if self.for_evaluation else F.adaptive_max_pool2d(labels, pixels.shape[-2:])[0]

    def _augment(
        self, image: Image.Image, artifact_map: Image.Image, generator: torch.Generator | None
    ) -> tuple[Image.Image, Image.Image]:
        if torch.rand((), generator=generator) < self.flip_probability:
            image, artifact_map = ImageOps.mirror(image), ImageOps.mirror(artifact_map)
        if torch.rand((), generator=generator) < self.jpeg_probability:
            low, high = self.jpeg_quality
            file = io.BytesIO()
            image.save(file, "JPEG", quality=int(torch.randint(low, high + 1, (), generator=generator)))
            image = Image.open(file).convert("RGB")
        return image, artifact_map


def _read(row: dict[str, Any], map_maximum: int | None = None) -> tuple[Image.Image, Image.Image]:
    """The image (RGB) and its map (L), of one size."""
    for name in (IMAGE, MAP):
        if row.get(name) is None or isinstance(row[name], (str, dict)):
            raise TypeError(
                f"The column `{name}` must hold images, found {type(row.get(name)).__name__}. With `datasets`, cast it: "
                f'dataset.cast_column("{name}", datasets.Image()).'
            )
    image, artifact_map = read_image(row[IMAGE]), read_artifact_map(row[MAP], map_maximum)
    if image.size != artifact_map.size:
        raise ValueError(
            f"An image of {image.size[0]} x {image.size[1]} pixels has a map of {artifact_map.size[0]} x "
            f"{artifact_map.size[1]}; a map must have the size of its image, turned as the image is shown."
        )
    return image, artifact_map


def _padded(images: Sequence[torch.Tensor], value: float) -> torch.Tensor:
    height, width = (max(image.shape[side] for image in images) for side in (-2, -1))
    return torch.stack(
        [F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2]), value=value) for image in images]
    )
