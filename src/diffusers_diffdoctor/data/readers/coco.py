# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""COCO's JSON: polygons, and masks as run lengths, column by column, as a list of numbers or packed into a text."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..shards import SHARD_MEGABYTES
from .reader import IGNORED, ImageFolder, Item, RegionReader, Shards, check_size, group_items, item_of, read_json
from .shapes import box_mask, points_of, polygon_mask


MOST_BITS = 40  # of a run length


@dataclass(frozen=True)
class Coco(RegionReader):
    """Images of a COCO file. Those without annotations are sound. The names of regions are those of its categories, and the artifacts'
    names are the categories of a row. A region without a segmentation is its box.

    Args:
        images: folder of the images; None: that of the JSON file.
    """

    images: str | None = field(default=None, compare=False)  # where they lie is no setting

    name: ClassVar[str] = "import coco"

    def find(self, source: Path, shard_megabytes: float = SHARD_MEGABYTES) -> Shards:
        content = read_json(source)
        lists = {key: content.get(key) if isinstance(content, dict) else None for key in ("images", "annotations")}
        for key, value in lists.items():
            if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
                raise ValueError(f"{str(source)!r} is no COCO file: it has no list of {key!r}.")
        if not lists["images"]:
            raise ValueError(f"{str(source)!r} has no images.")
        names = {one.get("id"): one.get("name") for one in content.get("categories") or [] if isinstance(one, dict)}
        folder = ImageFolder(Path(self.images) if self.images is not None else source.parent)
        return group_items(list(_items(folder, *lists.values(), names)), shard_megabytes, [folder])

    def label(self, annotation: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
        check_size(size, annotation["width"], annotation["height"])
        regions = [(region["name"], _region_mask(region, size)) for region in annotation["regions"]]
        artifact, ignored = self.maps(regions, size)
        names = sorted({name for name, _ in regions if self.role(name) == "artifact"})
        return {"artifact_map": artifact * np.uint8(255), IGNORED: ignored, "category": names}


def _items(
    folder: ImageFolder, images: Sequence[dict], annotations: Sequence[dict], names: dict[Any, Any]
) -> Iterator[Item]:
    """One for each image with its regions, and for each annotation of an image that is not there."""
    regions: dict[Any, list[dict]] = {}
    for one in annotations:
        regions.setdefault(_hashable(one.get("image_id")), []).append(one)
    times = Counter(_hashable(image.get("id")) for image in images)
    for image in images:
        mine = regions.get(_hashable(image.get("id")), [])
        unknown = [
            one.get("category_id") for one in mine if not isinstance(names.get(_hashable(one.get("category_id"))), str)
        ]
        named = [
            {"name": names.get(_hashable(one.get("category_id")))}
            | {key: one.get(key) for key in ("segmentation", "bbox")}
            for one in mine
        ]
        annotation = {"width": image.get("width"), "height": image.get("height"), "regions": named}
        item = item_of(folder, image.get("file_name"), annotation)
        problem = f"unknown category {unknown[0]!r}" if unknown else None
        if times[_hashable(image.get("id"))] > 1:
            problem = f"several images of the id {image.get('id')!r}"
        yield item if problem is None else replace(item, problem=item.problem or problem)
    for number, ones in regions.items():
        for one in ones if number not in times else ():
            yield Item(f"annotation {one.get('id')}", None, None, f"an annotation of an unknown image {number!r}")


def _hashable(value: Any) -> Any:
    return value if isinstance(value, (int, str, type(None))) else str(value)


def _region_mask(region: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    segmentation = region["segmentation"]
    if isinstance(segmentation, dict):
        return decode_rle(segmentation, size)
    if segmentation:
        return polygons_mask(segmentation, size)
    box = points_of(region["bbox"])
    if len(box) != 2:
        raise ValueError("a region has neither a segmentation nor a box of four numbers")
    return box_mask(np.array([box[0], box[0] + box[1]]), size)  # x, y, width, height


def polygons_mask(polygons: Any, size: tuple[int, int]) -> np.ndarray:
    """What lies in one polygon at least, of [[x1, y1, x2, y2, ...], ...].

    Raises:
        ValueError: it is no such list, or a polygon is none; see [`polygon_mask`].
    """
    if not isinstance(polygons, list) or not polygons:
        raise ValueError("a region has no polygons")
    mask = np.zeros(size[::-1], bool)
    for polygon in polygons:
        mask |= polygon_mask(points_of(polygon), size)
    return mask


def decode_rle(segmentation: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    """The mask of `{"size": [height, width], "counts": ...}`: lengths of runs of 0, 1, 0, ... down the columns, from left to right.

    Args:
        segmentation: its `counts` are a list of numbers, or a text in which they are packed.
        size: (width, height) of the image.

    Returns:
        bool (H, W).

    Raises:
        ValueError: the size is another, or the runs do not fill it.
    """
    shape, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(shape, (list, tuple)) or len(shape) != 2:
        raise ValueError("a mask of run lengths has no size")
    check_size(size, shape[1], shape[0])
    if isinstance(counts, (str, bytes)):
        counts = unpack_counts(counts.encode() if isinstance(counts, str) else counts)
    if not isinstance(counts, list) or not all(isinstance(one, int) and one >= 0 for one in counts):
        raise ValueError("a mask of run lengths has other counts than numbers from 0")
    if sum(counts) != size[0] * size[1]:
        raise ValueError("a mask's run lengths do not fill it")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(size).T


def unpack_counts(packed: bytes) -> list[int]:
    """The run lengths in a text: digits to the base 32, the lowest first, each a character from "0", with 32 more if another follows;
    the sign is the fifth bit of the last; from the fourth number on what is stored is the difference to the one before the last.

    Raises:
        ValueError: it is cut, or has another character.
    """
    counts, value, shift = [], 0, 0
    for character in packed:
        digit = character - 48
        if not 0 <= digit < 64:
            raise ValueError("a mask's packed run lengths have a character that is none of theirs")
        value |= (digit & 31) << shift
        shift += 5
        if shift > MOST_BITS:
            raise ValueError("a mask's packed run lengths have a number that no image is large enough for")
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value, shift = 0, 0
    if shift:
        raise ValueError("a mask's packed run lengths are cut short")
    return counts
