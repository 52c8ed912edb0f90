# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""A folder of images and a folder of masks of the same names."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np

from ...images import read_artifact_map, read_class_indices
from ..schema import OPTIONAL
from ..shards import SHARD_MEGABYTES
from .reader import IGNORED, ImageFolder, Item, Reader, Shards, group_items


NO_MASK, NO_IMAGE = "no mask of this name", "a mask without an image of its name"


def paired(images: ImageFolder, masks: ImageFolder, suffix: str = "", sound_without: bool = False) -> list[Item]:
    """Images and masks whose paths in their folders are the same but for the ends of their names.

    What could be an image or a mask and finds no partner, or several, is an item with a problem.

    Args:
        suffix: of a mask's name, before its ending: "_mask" for `a.jpg` and `a_mask.png`.
        sound_without: images without a mask have no artifacts; their annotation is None.
    """
    mask_of: dict[str, Path] = {}
    problems = [*images.skipped.items(), *((_mask_name(name), reason) for name, reason in masks.skipped.items())]
    for name, path in masks.files.items():
        stem = _stem(name)
        if not stem.endswith(suffix):
            problems.append((_mask_name(name), f"a mask whose name does not end in {suffix!r}"))
        elif stem.removesuffix(suffix) in mask_of:
            problems.append((_mask_name(name), "a second mask of this name"))
        else:
            mask_of[stem.removesuffix(suffix)] = path
    times, items, used = Counter(map(_stem, images.files)), [], set()
    for name, path in images.files.items():
        stem = _stem(name)
        mask = mask_of.get(stem)
        used.add(stem)
        problem = "several images of this name" if times[stem] > 1 else None
        if mask is None and not sound_without:
            problem = problem or NO_MASK
        items.append(Item(name, path, mask, problem))
    problems += [(_mask_name(masks.name_of(mask)), NO_IMAGE) for stem, mask in mask_of.items() if stem not in used]
    items += [Item(name, None, None, problem) for name, problem in problems]
    return sorted(items, key=lambda item: item.name)


def _mask_name(name: str) -> str:
    """What the quarantine calls a mask, whose path may be that of an image in another folder."""
    return f"mask {name}"


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()


@dataclass(frozen=True)
class Folders(Reader):
    """Images of a folder with masks of another one.

    Args:
        masks: folder of the masks; None: the folder `masks` beside, or in, that of the images.
        suffix: of a mask's name, before its ending.
        map_maximum: value that stands for 1.0: 255 for confidences and masks of 0 and 255, 1 for class indices. Without it 255, but a
            mask whose highest value is 1 is quarantined, because it could be either.
        ignore: value of the pixels that do not count; no value does without it.
        sound_without: images without a mask have no artifacts; they are quarantined otherwise.
    """

    masks: str | None = field(default=None, compare=False)  # where they lie is no setting
    suffix: str = ""
    map_maximum: int | None = None
    ignore: int | None = None
    sound_without: bool = False

    name: ClassVar[str] = "import folders"
    columns: ClassVar[dict[str, Any]] = dict(OPTIONAL)

    def __post_init__(self):
        if self.map_maximum not in (None, 1, 255):
            raise ValueError(f"`map_maximum` must be 1 or 255, or None, found {self.map_maximum!r}.")
        if self.ignore is not None and not 1 <= self.ignore <= 255:
            raise ValueError(f"`ignore` must be a value from 1 to 255, found {self.ignore}.")

    def find(self, source: Path, shard_megabytes: float = SHARD_MEGABYTES) -> Shards:
        masks = Path(self.masks) if self.masks is not None else source / "masks"
        if self.masks is None and not masks.is_dir():
            masks = source.parent / "masks"
        both = ImageFolder(source, [masks]), ImageFolder(masks)
        items = paired(*both, self.suffix, self.sound_without)
        if not items:
            raise ValueError(f"{str(source)!r} has no images.")
        return group_items(items, shard_megabytes, both)

    def label(self, annotation: Path | None, size: tuple[int, int]) -> dict[str, Any]:
        if annotation is None:
            return {"artifact_map": np.zeros(size[::-1], np.uint8)}
        if self.ignore is None:
            return {"artifact_map": np.asarray(read_artifact_map(annotation, self.map_maximum))}
        values = read_class_indices(annotation)
        ignored = values == self.ignore
        counted = np.where(ignored, np.uint8(0), values)
        return {"artifact_map": np.asarray(read_artifact_map(counted, self.map_maximum)), IGNORED: ignored}
