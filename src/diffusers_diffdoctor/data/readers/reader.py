# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What readers of other people's annotations have in common: items of a source, in shards, become rows of the source "human".

A reader is a stage. Its `find` says what a source consists of, without opening an image, and its `label` turns the annotation of one
image into a map. What an item lacks is known to `find` and said when its turn comes, so that every item is counted once.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Features

from ...files import digest, find_images, read_regular_file
from ..schema import FEATURES, OPTIONAL, Row, conform, decode_image, encode_png
from ..shards import SHARD_MEGABYTES, Quarantined, ranges_of_size
from ..stage import Result, Stage, row_name


ANNOTATION = "annotation"  # key of a row on its way from the shard to the stage
IGNORED = "ignored"  # key of what `label` gives: where the image does not count


@dataclass(frozen=True)
class Item:
    """An image and what was said about it."""

    name: str  # what a row and the quarantine call it
    image: Path | None
    annotation: Any = None  # what JSON can hold, or the path of a mask
    problem: str | None = None  # why it goes no further, where that is known already


@dataclass(frozen=True)
class ItemShard:
    """Items, each a row whose label the reader still has to make."""

    items: tuple[Item, ...]
    sizes: tuple[int, ...]  # bytes of the images
    first: int
    dataset: int = 0

    @property
    def rows(self) -> int:
        return len(self.items)

    @property
    def identity(self) -> dict[str, Any]:
        parts = (
            f"{item.name}\0{size}\0{self.evidence(item)}\0{item.problem}\0"
            for item, size in zip(self.items, self.sizes)
        )
        return {"name": self.items[0].name, "rows": self.rows, "bytes": sum(self.sizes), "sha256": digest(parts)}

    def evidence(self, item: Any) -> str:
        """What tells the annotation of an item from another one, without opening a mask."""
        return _evidence(item.annotation)

    @property
    def features(self) -> Features:
        return FEATURES

    def read(self) -> Iterator[Row | Quarantined]:
        for item in self.items:
            try:
                if item.problem is not None:
                    raise ValueError(item.problem)
                row = conform({"image": {"bytes": read_regular_file(item.image), "path": item.name}})
            except (OSError, ValueError) as error:
                yield Quarantined(item.name, getattr(error, "strerror", None) or str(error))
            else:
                yield row | {ANNOTATION: item.annotation}


def _evidence(annotation: Any) -> str:
    if isinstance(annotation, Path):
        return f"{annotation.name}:{_size_of(annotation)}"
    return json.dumps(annotation, sort_keys=True, default=str)


def _size_of(path: Path | None) -> int:
    """Bytes; a file that is gone, or was never there, has none."""
    try:
        return path.stat().st_size if path is not None else 0
    except OSError:
        return 0


class Shards(list):
    """The shards of a source, and what lay in its folders of images and masks: `found` files, of which `skipped` are no images that
    can be read (reason -> count)."""

    def __init__(self, shards: Iterable[Any], folders: Iterable["ImageFolder"] = ()):
        super().__init__(shards)
        self.found, self.skipped = 0, Counter()
        for folder in folders:
            self.found += len(folder.found)
            self.skipped.update(folder.found.reasons())


def group_items(
    items: Sequence[Item], shard_megabytes: float = SHARD_MEGABYTES, folders: Iterable["ImageFolder"] = ()
) -> Shards:
    """Items in shards whose images have about `shard_megabytes`, in order; `folders` are those that were searched for them."""
    sizes = [_size_of(item.image) for item in items]
    ranges = ranges_of_size(sizes, shard_megabytes)
    return Shards(
        (ItemShard(tuple(items[begin:end]), tuple(sizes[begin:end]), begin) for begin, end in ranges), folders
    )


@dataclass(frozen=True)
class Reader(Stage):
    """Annotated images of one format become rows of the source "human". What cannot be read, or does not fit, is quarantined.

    Args:
        generator: id of the model that made all images, where the format does not say it.
        category: names of what is in all images, beside those that the format says.
    """

    generator: str | None = None
    category: tuple[str, ...] = ()

    def find(self, source: Path, shard_megabytes: float = SHARD_MEGABYTES) -> Shards:
        """The shards of a source, as [`group_items`] makes them.

        Raises:
            FileNotFoundError, ValueError: there is no such source, it is of another format, or it is empty.
        """
        raise NotImplementedError

    def label(self, annotation: Any, size: tuple[int, int]) -> dict[str, Any]:
        """What an annotation says.

        Args:
            annotation: of an item.
            size: (width, height) of its image in pixels, upright.

        Returns:
            `artifact_map` (H, W), uint8, 255 = artifact; optionally `ignored` (H, W), bool; and further columns.

        Raises:
            ValueError: it cannot be understood, or does not fit the image.
        """
        raise NotImplementedError

    def process(self, rows: Iterator[Row], shard: Any) -> Iterator[Result]:
        for row in rows:
            try:
                result = self._labelled(row)
            except Exception as error:  # decoders raise many types; one bad file must not stop the rest
                result = Quarantined(row_name(row), str(error) or type(error).__name__)
            yield result

    def _labelled(self, row: Row) -> Row:
        row = dict(row)
        annotation = row.pop(ANNOTATION)
        size = decode_image(row).size
        labels = self.label(annotation, size)
        values, ignored = labels.pop("artifact_map"), labels.pop(IGNORED, None)
        for found in (values, ignored):
            if found is not None and found.shape != size[::-1]:
                raise ValueError(_misfit(size, found.shape[::-1]))
        row |= {"source": "human", "generator": row["generator"] or self.generator} | labels
        row["category"] = list(dict.fromkeys([*self.category, *labels.get("category", [])]))
        if ignored is not None and ignored.any():
            values = np.where(ignored, np.uint8(0), values)
            row["ignore_map"] = encode_png(ignored * np.uint8(255))
        return conform(row | {"artifact_map": encode_png(values)})


def _misfit(size: Sequence[int], found: Sequence[int]) -> str:
    return f"An image of {size[0]} x {size[1]} pixels is annotated as one of {found[0]} x {found[1]}."


def check_size(size: tuple[int, int], width: Any, height: Any) -> None:
    """Refuse an annotation that was made on an image of another size. A format need not say it: None."""
    if (width is not None and width != size[0]) or (height is not None and height != size[1]):
        raise ValueError(_misfit(size, (width, height)))


@dataclass(frozen=True)
class RegionReader(Reader):
    """A reader of regions that have names.

    Args:
        labels: names of regions that are artifacts; without them all are that are not named below.
        ignore_labels: names of regions that do not count, such as "unsure".
        skip_labels: names of regions that say nothing about artifacts.
    """

    labels: tuple[str, ...] = ()
    ignore_labels: tuple[str, ...] = ()
    skip_labels: tuple[str, ...] = ()

    columns: ClassVar[dict[str, Any]] = dict(OPTIONAL)

    def __post_init__(self):
        names = [*self.labels, *self.ignore_labels, *self.skip_labels]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"A label can mean one thing only, but {', '.join(map(repr, twice))} is named twice.")

    def role(self, name: str | None) -> str:
        """What a region of this name says: "artifact", "ignore" or "skip".

        Raises:
            ValueError: `labels` are given, and the name is nowhere.
        """
        if name in self.ignore_labels:
            return "ignore"
        if name in self.skip_labels:
            return "skip"
        if self.labels and name not in self.labels:
            raise ValueError(f"unknown label {name!r}: name it among labels, ignore_labels or skip_labels")
        return "artifact"

    def maps(
        self, regions: Iterable[tuple[str | None, np.ndarray]], size: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Regions (name, mask (H, W)) as two masks: where there is an artifact, and where nothing counts and there is none."""
        maps = {role: np.zeros(size[::-1], bool) for role in ("artifact", "ignore", "skip")}
        for name, mask in regions:
            maps[self.role(name)] |= mask
        return maps["artifact"], maps["ignore"] & ~maps["artifact"]


# --- files ---------------------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is broken; the file is named.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}.")
    try:
        return parse_json(read_regular_file(path))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is {error}") from error


def parse_json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from error


def split_folder(source: Path, kind: str, split: str) -> Path:
    """`source/kind/split`.

    Raises:
        FileNotFoundError: there is none; the splits there are, are named.
    """
    folder = source / kind / split
    if not folder.is_dir():
        top = source / kind
        there = sorted(path.name for path in top.iterdir() if path.is_dir()) if top.is_dir() else []
        remedy = f"`split` can be {', '.join(there)}" if there else f"expected was the folder {str(top)!r}"
        raise FileNotFoundError(f"There is no folder {str(folder)!r}: {remedy}.")
    return folder


class ImageFolder:
    """The images of a folder, asked for by what an annotation calls them. Whatever it says, no other file is found.

    Args:
        folder: searched at any depth.
        excluded: folders inside that are not searched.
    """

    def __init__(self, folder: Path, excluded: Iterable[Path] = ()):
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no folder of images {str(folder)!r}.")
        self.top = folder.absolute()
        self.found = find_images([self.top], excluded)
        self.files = {self.name_of(path): path for path in self.found.images}
        self.skipped = {self.name_of(one.path): one.reason for one in self.found.skipped if one.may_hide_images}
        self._by_name: dict[str, list[str]] = {}
        for name in self.files:
            self._by_name.setdefault(name.rpartition("/")[2], []).append(name)

    def name_of(self, path: Path) -> str:
        """The path in the folder: where that lies is nobody's business."""
        return path.relative_to(self.top).as_posix()

    def find(self, name: Any) -> tuple[Path | None, str | None]:
        """(the file, None), or (None, why there is none).

        The longest end of `name` that is a path in the folder is it, and else the one file of its last part.
        """
        if not isinstance(name, str) or not name:
            return None, "the annotation names no image"
        parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".")]
        for begin in range(len(parts)):
            path = self.files.get("/".join(parts[begin:]))
            if path is not None:
                return path, None
        candidates = self._by_name.get(parts[-1], []) if parts else []
        if len(candidates) == 1:
            return self.files[candidates[0]], None
        return None, "several images of this name" if candidates else "no image of this name"


def item_of(images: ImageFolder, name: Any, annotation: Any) -> Item:
    """The item of an annotation that names its image."""
    path, problem = images.find(name)
    if path is not None:
        name = images.name_of(path)
    return Item(name if isinstance(name, str) and name else "?", path, annotation, problem)
