# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Label Studio's JSON export: brushes, polygons and rectangles of one or several people."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from ..brushes import decode_brush
from ..shards import SHARD_MEGABYTES
from .reader import IGNORED, ImageFolder, Item, RegionReader, Shards, check_size, group_items, read_json
from .shapes import points_of, polygon_mask


UPLOADED = re.compile(r"^[0-9a-f]{8}-")  # what Label Studio puts before the name of a file that was uploaded
# results that say something about the image, or between regions, and draw nothing
WITHOUT_REGION = ("choices", "textarea", "rating", "number", "taxonomy", "datetime", "ranker", "pairwise", "relation")


@dataclass(frozen=True)
class LabelStudio(RegionReader):
    """Tasks of Label Studio. A region's name is its label; the artifacts' names are the categories of a row. Where several people have
    annotated a task, each pixel's value is the share of those in whose view it is an artifact; it does not count where one of them says
    so. Annotations that were skipped (cancelled) are nobody's view.

    What `data` says of `prompt`, `generator` and `category`, as texts, is taken over; a `category` replaces the artifacts' names.

    Args:
        images: folder of the images; None: that of the JSON file. A task's image is found by its path, or by its name without what
            Label Studio put before it.
        image_key: key of the image in a task's `data`.
        predictions: tasks that nobody has annotated become rows of the source "pseudo", by their predictions; they are quarantined
            otherwise.
    """

    images: str | None = field(default=None, compare=False)  # where they lie is no setting
    image_key: str = "image"
    predictions: bool = False

    name: ClassVar[str] = "import label-studio"

    def find(self, source: Path, shard_megabytes: float = SHARD_MEGABYTES) -> Shards:
        tasks = read_json(source)
        if not isinstance(tasks, list) or not tasks:
            raise ValueError(f"{str(source)!r} is no list of tasks: export them from Label Studio as JSON.")
        wanted = {"annotations", "predictions"} if self.predictions else {"annotations"}
        if not any(isinstance(task, dict) and "data" in task and not wanted.isdisjoint(task) for task in tasks):
            raise ValueError(f"{str(source)!r} has no tasks with annotations: export them as JSON, not as JSON-MIN.")
        images = ImageFolder(Path(self.images) if self.images is not None else source.parent)
        return group_items([self._item(images, task) for task in tasks], shard_megabytes, [images])

    def _item(self, images: ImageFolder, task: Any) -> Item:
        if not isinstance(task, dict):
            return Item("?", None, None, "a task is no object")
        data, name = task.get("data"), f"task {task.get('id')}"
        wanted = data.get(self.image_key) if isinstance(data, dict) else None
        if not isinstance(wanted, str) or not wanted:
            return Item(name, None, None, f"the task has no {self.image_key!r}")
        image, problem = find_uploaded(images, wanted)
        results, source = _results(task, "annotations"), "human"
        if not results and self.predictions:
            results, source = _results(task, "predictions"), "pseudo"
        if not results:
            problem = problem or "nobody has annotated the task"
        elif not all(isinstance(result, list) and all(isinstance(one, dict) for one in result) for result in results):
            problem = problem or "an annotation has no list of results"
        annotation = {"results": results, "columns": _columns(data) | {"source": source}}
        return Item(name if image is None else images.name_of(image), image, annotation, problem)

    def label(self, annotation: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
        results = annotation["results"]
        votes, ignored, names = np.zeros(size[::-1]), np.zeros(size[::-1], bool), set()
        for result in results:
            regions = list(_regions(result, size))
            artifact, mine = self.maps(regions, size)
            votes += artifact
            ignored |= mine
            names |= {name for name, _ in regions if name is not None and self.role(name) == "artifact"}
        values = (votes * (255 / len(results))).round().astype(np.uint8)
        return {"artifact_map": values, IGNORED: ignored, "category": sorted(names)} | annotation["columns"]


def _columns(data: dict[str, Any]) -> dict[str, Any]:
    """What a task says of its image."""
    found = {name: data.get(name) for name in ("prompt", "generator")}
    columns: dict[str, Any] = {name: text for name, text in found.items() if isinstance(text, str) and text}
    names = data.get("category")
    names = [names] if isinstance(names, str) else names
    if isinstance(names, list) and names and all(isinstance(name, str) and name.strip() for name in names):
        columns["category"] = names
    return columns


def _results(task: dict[str, Any], kind: str) -> Shards:
    """What each annotation of a task says, or each prediction."""
    views = task.get(kind)
    views = [one for one in views if isinstance(one, dict)] if isinstance(views, list) else []
    return [one.get("result") for one in views if not one.get("was_cancelled")]


def find_uploaded(images: ImageFolder, wanted: str) -> tuple[Path | None, str | None]:
    """(the file or None, why there is none) of an address that a task has: an upload, a local file, or any URL."""
    address = urlsplit(wanted)
    path = (parse_qs(address.query).get("d") or [unquote(address.path)])[0]
    name = path.rpartition("/")[2]
    image, problem = images.find(path)
    if image is None and UPLOADED.match(name):
        image, problem = images.find(UPLOADED.sub("", name))
    return image, problem


def _regions(result: list[dict], size: tuple[int, int]) -> Iterator[tuple[str | None, np.ndarray]]:
    """(label, mask) of each region and each of its labels; a region may have none."""
    for one in result:
        kind, value = one.get("type"), one.get("value")
        if kind in WITHOUT_REGION:
            continue
        if not isinstance(value, dict):
            raise ValueError("a region has no value")
        check_size(size, one.get("original_width"), one.get("original_height"))
        if one.get("image_rotation"):
            raise ValueError("a region was drawn on the image turned")
        if "rle" in value:
            mask = decode_brush(value["rle"], size)
        elif "points" in value:
            mask = polygon_mask(_in_pixels(points_of(value["points"]), size), size)
        elif {"x", "y", "width", "height"} <= value.keys():
            mask = polygon_mask(_rectangle(value, size), size)
        else:
            raise ValueError(f"unknown kind of region {kind!r}")
        names = next((value[key] for key in _label_keys(kind) if value.get(key)), [None])
        for name in names if isinstance(names, list) else [names]:
            yield name, mask


def _label_keys(kind: Any) -> tuple[str, ...]:
    return (str(kind), "brushlabels", "polygonlabels", "rectanglelabels", "labels")


def _in_pixels(percent: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return percent * (np.array(size) / 100)


def _rectangle(value: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    """Corners (4, 2) in pixels of a rectangle, which is turned clockwise around its first one."""
    corner, sides = points_of([value["x"], value["y"], value["width"], value["height"]])
    turn = points_of([value.get("rotation") or 0, 0])[0, 0]
    cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    corners = _in_pixels(np.array([(0, 0), (sides[0], 0), sides, (0, sides[1])]), size)
    return _in_pixels(corner, size) + corners @ np.array([(cos, sin), (-sin, cos)])
