# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What happens to a row between the dataset and the detector."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from ..images import read_artifact_map, read_image
from ..seeds import derive_seed
from .augmentation import NOT_COUNTED, Augmentation, from_picture, reduced_map, without_ignored
from .configuration_artifact_detector import SIZE_MULTIPLE, ArtifactDetectorConfig
from .modeling_artifact_detector import normalise_images, resize_images
from .sampling import DRAW, Draw


IMAGE, MAP, IGNORE, SOURCE = "image", "artifact_map", "ignore_map", "source"
PIXELS, LABELS, SIZES = "pixel_values", "labels", "sizes"
QUARTER = 4  # the detector's logits, and maps that it wrote, have a quarter of an image's side
GROUPS = ("category", "generator", SOURCE)  # columns by which an evaluation groups its figures


class ArtifactDetectorCollator:
    """Rows of a dataset to a batch for the detector.

    A row has `image` and `artifact_map`, read by [`read_image`] and [`read_artifact_map`]. The map has the size of its image, or a
    quarter of both sides, rounded up, and is then enlarged bilinearly as the detector does with its logits. The image is
    brought to its size as the detector does it in `confidence`, so that training and inference see the same. The map is reduced to
    that size: a pixel takes the highest value of all that it covers, so that an artifact thinner than it stays as certain as
    it was. At that size both are augmented. What differs in shape is padded on the right and below, images with the mean colour,
    maps with -1, which no loss and no metric counts.

    A row may have an `ignore_map`, of one of these sizes too: where it is above 0 the map is -1, and moves as the map does.

    Or a row has `pixel_values` (3, h, w) and `labels` (1, H, W), which are stacked as they are.

    A row that carries a [`Draw`] is cropped and augmented by `seed` and that draw alone, and the size of its batch by that of the
    batch's first row: a resumed run sees what one that was never stopped sees, in whatever process. Without a draw torch's
    own generator decides.

    Args:
        config: configuration of the detector.
        augmentation: what may happen to an image and its map; nothing without it.
        crop_probability: in [0, 1]: that an image larger than the detector sees it is not made smaller, but cut to a square of
            that side, somewhere in it, so that small artifacts are seen as large as they are.
        image_sizes: range of the short side in pixels at which batches are seen, multiples of 32, each batch at one drawn from
            it. Without it they are seen at `config.image_size`.
        samples_at_once: samples that all processes take at one time; those see the same size.
        map_maximum: see [`ArtifactDetectorTrainingArguments`].
        for_evaluation: leave maps at the size of their images, and say in `sizes` (B, 4) how high and wide the pixel values
            and the maps are without padding; and pass on the columns `category`, `generator` and `source`.
        seed: decides about rows with a draw.

    Raises:
        ValueError, TypeError: a row without an image or a map, a map of another size, and what the readers refuse.
    """

    def __init__(
        self,
        config: ArtifactDetectorConfig,
        augmentation: Augmentation | None = None,
        crop_probability: float = 0.0,
        image_sizes: tuple[int, int] | None = None,
        samples_at_once: int = 1,
        map_maximum: int | None = None,
        for_evaluation: bool = False,
        seed: int = 0,
    ):
        self.config = config
        self.augmentation = Augmentation() if augmentation is None else augmentation
        self.crop_probability = crop_probability
        self.image_sizes = image_sizes
        self.samples_at_once = samples_at_once
        self.map_maximum = map_maximum
        self.for_evaluation = for_evaluation
        self.seed = seed

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        groups = {name: [row.get(name) for row in rows] for name in GROUPS} if self.for_evaluation else {}
        if all(PIXELS in row for row in rows):
            batch = {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in (PIXELS, LABELS)}
            return batch | groups
        size = self._image_size(rows[0].get(DRAW))
        images, maps = zip(*(self._prepare(row, size) for row in rows))
        batch = {PIXELS: _padded(images, 0.0), LABELS: _padded(maps, NOT_COUNTED)}
        if self.for_evaluation:
            batch[SIZES] = torch.tensor([(*image.shape[-2:], *one.shape[-2:]) for image, one in zip(images, maps)])
        return batch | groups

    def _image_size(self, first: Draw | None) -> int:
        if self.image_sizes is None:
            return self.config.image_size
        generator = None
        if first is not None:
            generator = self._generator("image_size", first.epoch, first.place // self.samples_at_once)
        low, high = (side // SIZE_MULTIPLE for side in self.image_sizes)
        return SIZE_MULTIPLE * int(torch.randint(low, high + 1, (), generator=generator))

    def _prepare(self, row: dict[str, Any], size: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, artifact_map = _read(row, self.map_maximum)
        if self.for_evaluation:
            return normalise_images(image[None], self.config, size)[0], artifact_map
        draw = row.get(DRAW)
        generator = None if draw is None else self._generator("augmentation", draw.epoch, draw.place)
        crop, *place = torch.rand(3, generator=generator).tolist()
        if crop < self.crop_probability and min(image.shape[-2:]) > size:
            top, left = (int(number * (side - size + 1)) for number, side in zip(place, image.shape[-2:]))
            image, artifact_map = (one[:, top : top + size, left : left + size] for one in (image, artifact_map))
        image = resize_images(image[None], size)[0]
        if artifact_map.shape[-2:] != image.shape[-2:]:
            artifact_map = reduced_map(artifact_map, image.shape[-2:])
        image, artifact_map = self.augmentation(image, artifact_map, generator)
        return normalise_images(image[None], self.config, size)[0], artifact_map

    def _generator(self, *what: str | int) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self.seed, *what))


def _read(row: dict[str, Any], map_maximum: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The image (3, H, W) in [0, 1] and its map (1, H, W), in [0, 1] or -1 where it does not count."""
    for name in (IMAGE, MAP, IGNORE):
        if isinstance(row.get(name), (str, dict)) or (row.get(name) is None and name != IGNORE):
            raise TypeError(
                f"The column `{name}` must hold images, found {type(row.get(name)).__name__}. With `datasets`, cast it: "
                f'dataset.cast_column("{name}", datasets.Image()).'
            )
    picture, artifact_map = read_image(row[IMAGE]), read_map(row, map_maximum)
    ignore_map = None if row.get(IGNORE) is None else read_artifact_map(row[IGNORE], maximum=255)
    width, height = picture.size
    quarter = (math.ceil(width / QUARTER), math.ceil(height / QUARTER))
    for what, one in (("a map", artifact_map), ("an ignore_map", ignore_map)):
        if one is not None and one.size not in (picture.size, quarter):
            raise ValueError(
                f"An image of {width} x {height} pixels has {what} of {one.width} x {one.height}; a map must have the size of its "
                f"image, or a quarter of its sides ({quarter[0]} x {quarter[1]}), turned as the image is shown."
            )
    values = from_picture(artifact_map)
    if artifact_map.size != picture.size:
        values = F.interpolate(values[None], size=(height, width), mode="bilinear", align_corners=False)[0]
    return from_picture(picture), without_ignored(values, ignore_map)


def read_map(row: dict[str, Any], map_maximum: int | None) -> Image.Image:
    """The map of a row. One with a `source` is of the house's schema, in which 255 stands for 1.0 even where nothing is above 1."""
    if map_maximum is None and row.get(SOURCE) is not None:
        map_maximum = 255
    return read_artifact_map(row[MAP], map_maximum)


def _padded(images: Sequence[torch.Tensor], value: float) -> torch.Tensor:
    height, width = (max(image.shape[side] for image in images) for side in (-2, -1))
    batch = images[0].new_full((len(images), len(images[0]), height, width), value)
    for place, image in zip(batch, images):
        place[:, : image.shape[-2], : image.shape[-1]] = image
    return batch
