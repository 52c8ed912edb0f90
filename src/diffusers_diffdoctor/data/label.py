# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Pseudo-labels: a detector's own maps for images that nobody has labelled (DiffDoctor, section 3.2), a million and more.

A map is stored at a quarter of its image's side, in 8 bits: what SegFormer can tell apart.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from ..detector.tiling import tiled_confidence
from .by_detector import DetectorStage, confidence_maps
from .schema import Row, encode_png, reduced_size
from .stage import Result


@dataclass(frozen=True)
class Label(DetectorStage):
    """Rows get the detector's map, and the source "pseudo". Rows that have a better label (a map, and a source other than
    "pseudo") stay as they are, unless `relabel` says otherwise. Images that cannot be read are quarantined.

    Args:
        tile: also look at large images piece by piece, see [`tiled_confidence`].
        relabel: also replace better labels.
        full_size: store maps at the size of their images instead of a quarter of the side: for small images, and detectors that
            tell apart more than SegFormer's logits do.
        floor: confidence in [0, 1] below which a pixel is labelled sound, as 0; ours. A detector that is trained on another's faint
            doubts learns to doubt everywhere. 0 keeps all.
    """

    tile: bool = False
    relabel: bool = False
    full_size: bool = False
    floor: float = 0.0

    name: ClassVar[str] = "label"

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.floor <= 1:
            raise ValueError(f"`floor` must lie in [0, 1], got {self.floor}.")

    def skips(self, row: Row) -> bool:
        return row["artifact_map"] is not None and row["source"] not in (None, "pseudo") and not self.relabel

    def look(self, models: list[torch.nn.Module], images: torch.Tensor) -> np.ndarray:
        (model,) = models
        width, height = images.shape[-1], images.shape[-2]
        if not self.full_size:
            width, height = reduced_size((width, height))
        if self.tile:
            maps = tiled_confidence(model, images, model.config.image_size)
            maps = F.interpolate(maps, (height, width), mode="bilinear", antialias=True)[:, 0]
        else:
            maps = confidence_maps(model, images, (height, width))
        maps = maps.masked_fill(maps < self.floor, 0)
        return (maps * 255).round().byte().cpu().numpy()

    def answer(self, row: Row, seen: np.ndarray, position: int) -> Result:
        return {**row, "artifact_map": encode_png(seen), "source": "pseudo"}
