# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""PAL4VST (Zhang et al., ICCV 2023): images/SPLIT/*.jpg and labels/SPLIT/*.png, where 1, or 255, is an artifact.

A 255 beside a 1 is what segmentation frameworks leave out of their losses: such a pixel does not count.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ...images import read_class_indices
from ..schema import OPTIONAL
from ..shards import SHARD_MEGABYTES
from .folders import paired
from .reader import IGNORED, ImageFolder, Reader, Shards, group_items, split_folder


IGNORE = 255


@dataclass(frozen=True)
class Pal4vst(Reader):
    """A split of PAL4VST, or of any dataset that lies so.

    Args:
        split: folder of `images` and `labels`.
        artifact: value of artifacts, 1 or 255. With 1, each 255 does not count; with None that is so in labels that have a 1, and in
            others 255 is an artifact.
    """

    split: str = "train"
    artifact: int | None = None

    name: ClassVar[str] = "import pal4vst"
    columns: ClassVar[dict[str, Any]] = dict(OPTIONAL)

    def __post_init__(self):
        if self.artifact not in (None, 1, 255):
            raise ValueError(f"`artifact` must be 1 or 255, or None, found {self.artifact!r}.")

    def find(self, source: Path, shard_megabytes: float = SHARD_MEGABYTES) -> Shards:
        folders = [split_folder(source, kind, self.split) for kind in ("images", "labels")]
        both = [ImageFolder(folder) for folder in folders]
        items = paired(*both)
        if not items:
            raise ValueError(f"{str(folders[0])!r} has no images.")
        return group_items(items, shard_megabytes, both)

    def label(self, annotation: Path, size: tuple[int, int]) -> dict[str, Any]:
        values = read_class_indices(annotation)
        artifact, ignored = masks_of(values, self.artifact)
        return {"artifact_map": artifact * np.uint8(255), IGNORED: ignored}


def masks_of(values: np.ndarray, artifact: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(where an artifact is, what does not count), both bool, of class indices 0, 1 and 255.

    Raises:
        ValueError: there are other values.
    """
    if artifact is None:
        artifact = 1 if (values == 1).any() else 255
    known = (0, 1, IGNORE) if artifact == 1 else (0, 255)
    others = sorted(set(np.unique(values).tolist()) - set(known))
    if others:
        raise ValueError(
            f"unknown values {', '.join(map(str, others[:3]))}{', ...' * (len(others) > 3)} in a label, expected were "
            f"{', '.join(map(str, known))}"
        )
    return values == artifact, (values == IGNORE) & (artifact == 1)
