# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""SynthScars (Kang et al., 2025): polygons of artifacts, each with a sentence, in one JSON file."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Value

from ..shards import SHARD_MEGABYTES
from .coco import polygons_mask
from .reader import ImageFolder, Item, Reader, Shards, group_items, item_of, read_json


@dataclass(frozen=True)
class SynthScars(Reader):
    """`{id: {"refs": [{"segmentation": [[x, y, ...], ...]}, ...], "caption": ..., "img_file_name": ...}}`, or the entries as a list.

    The caption says what is wrong, and not what the image was asked to show: it becomes a column `caption`.

    Args:
        images: folder of the images; None: that of the JSON file.
    """

    images: str | None = field(default=None, compare=False)  # where they lie is no setting

    name: ClassVar[str] = "import synthscars"
    columns: ClassVar[dict[str, Any]] = {"caption": Value("string")}

    def find(self, source: Path, shard_megabytes: float = SHARD_MEGABYTES) -> Shards:
        entries = read_json(source)
        entries = list(entries.items()) if isinstance(entries, dict) else list(enumerate(entries))
        if not entries:
            raise ValueError(f"{str(source)!r} has no entries.")
        images = ImageFolder(Path(self.images) if self.images is not None else source.parent)
        return group_items([_item(images, str(key), entry) for key, entry in entries], shard_megabytes, [images])

    def label(self, annotation: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
        refs, caption = annotation.get("refs"), annotation.get("caption")
        if not isinstance(refs, list) or not all(isinstance(ref, dict) for ref in refs):
            raise ValueError("the entry has no list of refs")
        mask = np.zeros(size[::-1], bool)
        for ref in refs:
            mask |= polygons_mask(ref.get("segmentation"), size)
        return {"artifact_map": mask * np.uint8(255), "caption": caption if isinstance(caption, str) else None}


def _item(images: ImageFolder, key: str, entry: Any) -> Item:
    if not isinstance(entry, dict):
        return Item(key, None, None, "the entry is no object")
    item = item_of(images, entry.get("img_file_name"), entry)
    return item if item.problem is None else Item(key, None, None, item.problem)
