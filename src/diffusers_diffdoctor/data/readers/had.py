# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The Human Artifact Dataset (Wang et al., 2024): boxes around broken body parts, mild or severe.

annotations/SPLIT/NAME.json     `image`, `annotation` (boxes of parts), `human` (boxes of people, with what is missing or extra)
images/SPLIT/...                the `file_name` of `image`
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ...files import read_regular_file
from ..schema import OPTIONAL
from ..shards import SHARD_MEGABYTES
from .reader import (
    IGNORED,
    ImageFolder,
    Item,
    Reader,
    Shards,
    check_size,
    group_items,
    parse_json,
    split_folder,
)
from .shapes import box_mask, points_of


HUMANS = ("ignore", "artifact", "skip")


@dataclass(frozen=True)
class Had(Reader):
    """A split of HAD. A box is coarse: it holds sound pixels too.

    The categories of a row are its `body_parts`.

    Args:
        split: folder of `annotations` and `images`.
        images: folder of the images; None: `images/SPLIT` of the source.
        mild, severe: value in [0, 1] of a box of this level. Where boxes lie over each other the higher one holds.
        humans: what the box of a person says who lacks a part or has one too many: "ignore", its pixels outside of the parts' boxes do
            not count; "artifact", all of it is one; "skip", nothing.
    """

    split: str = "train_ALL"
    images: str | None = field(default=None, compare=False)  # where they lie is no setting
    mild: float = 1.0
    severe: float = 1.0
    humans: str = "ignore"

    name: ClassVar[str] = "import had"
    columns: ClassVar[dict[str, Any]] = dict(OPTIONAL)

    def __post_init__(self):
        for name in ("mild", "severe"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie in [0, 1], found {getattr(self, name)}.")
        if self.humans not in HUMANS:
            raise ValueError(f"`humans` must be one of {', '.join(HUMANS)}, found {self.humans!r}.")

    def find(self, source: Path, shard_megabytes: float = SHARD_MEGABYTES) -> Shards:
        annotations = split_folder(source, "annotations", self.split)
        folder = Path(self.images) if self.images is not None else split_folder(source, "images", self.split)
        images = ImageFolder(folder)
        items = list(_items(annotations, images))
        if not items:
            raise ValueError(f"{str(annotations)!r} has no annotations (*.json), and {str(folder)!r} no images.")
        return group_items(items, shard_megabytes, [images])

    def label(self, annotation: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
        image = _object(annotation, "image")
        check_size(size, image.get("width"), image.get("height"))
        values, parts = np.zeros(size[::-1], np.uint8), []
        for box in _boxes(annotation, "annotation"):
            level = box.get("level")
            if level not in ("mild", "severe"):
                raise ValueError(f"unknown level {level!r}, expected was mild or severe")
            value = np.uint8(round(255 * getattr(self, level)))
            values = np.where(_mask(box, size), np.maximum(values, value), values)
            parts += _names(box)
        people = np.zeros(size[::-1], bool)
        for box in _boxes(annotation, "human"):
            if box.get("tag") and self.humans != "skip":
                people |= _mask(box, size)
        if self.humans == "artifact":
            return {"artifact_map": np.where(people, np.uint8(255), values), "category": parts}
        return {"artifact_map": values, IGNORED: people & (values == 0), "category": parts}


def _items(annotations: Path, images: ImageFolder) -> Iterator[Item]:
    """One for each annotation, and for each image that has none."""
    used = set()
    for path in sorted(annotations.rglob("*.json")):
        name = path.relative_to(annotations).as_posix()
        try:
            annotation = parse_json(read_regular_file(path))
            file_name = _object(annotation, "image").get("file_name")
        except (OSError, ValueError) as error:
            yield Item(name, None, None, getattr(error, "strerror", None) or str(error))
            continue
        image, problem = images.find(file_name)
        used.add(image)
        yield Item(images.name_of(image) if problem is None else name, image, annotation, problem)
    for name, image in images.files.items():
        if image not in used:
            yield Item(name, image, None, "no annotation of this image")
    for name, problem in images.skipped.items():
        yield Item(name, None, None, problem)


def _object(annotation: Any, key: str) -> dict[str, Any]:
    value = annotation.get(key) if isinstance(annotation, dict) else None
    if not isinstance(value, dict):
        raise ValueError(f"the annotation has no {key!r}")
    return value


def _boxes(annotation: dict[str, Any], key: str) -> list[dict[str, Any]]:
    boxes = annotation.get(key) or []
    if not isinstance(boxes, list) or not all(isinstance(box, dict) for box in boxes):
        raise ValueError(f"{key!r} of the annotation is no list of boxes")
    return boxes


def _mask(box: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    corners = points_of(box.get("bbox"))
    if len(corners) != 2:
        raise ValueError("a box has not four numbers")
    return box_mask(corners, size)


def _names(box: dict[str, Any]) -> list[str]:
    names = box.get("body_parts")
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError("a box has no body_parts")
    return names
