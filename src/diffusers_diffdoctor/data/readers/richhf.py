# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""RichHF-18K (Liang et al., CVPR 2024): heatmaps of artifacts and scores in TFRecord files, for images of Pick-a-Pic.

The images are not in it: a record names one by the uid under which Pick-a-Pic has it. They come from a folder of files with these
names, or from Pick-a-Pic's own Parquet files, where a row has two images with their uids.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Value
from PIL import Image

from ...files import read_regular_file
from ...images import read_artifact_map
from ..schema import Row, conform
from ..shards import SHARD_MEGABYTES, Quarantined, parquet_files, ranges_of_size
from .reader import ANNOTATION, ImageFolder, ItemShard, Reader, Shards
from .tfrecord import parse_example, read_record, read_records


SCORES = ("aesthetics_score", "artifact_score", "misalignment_score", "overall_score")
SIDES = (0, 1)  # of a row of Pick-a-Pic
BYTES_OF_AN_IMAGE = 200_000  # guessed, where they are not known before they are read


class Place(NamedTuple):
    """Where an image of Pick-a-Pic is. In this order they are read, so that a row group is read once."""

    file: Path
    group: int  # row group of the file
    side: int  # 0 or 1
    row: int  # in its group


@dataclass(frozen=True)
class RecordItem:
    """A record, and its image as a file or as a place in Pick-a-Pic."""

    name: str
    file: Path
    offset: int
    image: Path | Place | None
    problem: str | None = None


@dataclass(frozen=True)
class RecordShard(ItemShard):
    """Records, each a row whose label the reader still has to make."""

    items: tuple[RecordItem, ...]

    def evidence(self, item: RecordItem) -> str:
        return f"{item.file.name}\0{item.offset}"

    def read(self) -> Iterator[Row | Quarantined]:
        pickapic = _RowGroups()
        for item in self.items:
            try:
                if item.problem is not None:
                    raise ValueError(item.problem)
                features = parse_example(read_record(item.file, item.offset))
                if isinstance(item.image, Place):
                    row = pickapic.row(item.image)
                else:
                    row = {"image": read_regular_file(item.image)}
                row = conform(row)
            except (OSError, ValueError, pa.ArrowException) as error:
                yield Quarantined(item.name, getattr(error, "strerror", None) or str(error))
            else:
                row["image"]["path"] = item.name
                yield row | {ANNOTATION: features}


class _RowGroups:
    """Images of Pick-a-Pic with what its rows say of them; the last row group that was asked for is kept."""

    def __init__(self):
        self._kept: tuple[Any, pa.Table | None] = (None, None)

    def row(self, place: Place) -> Row:
        key = (place.file, place.group, place.side)
        if self._kept[0] != key:
            with pq.ParquetFile(place.file) as file:
                wanted = (f"jpg_{place.side}", "caption", f"model_{place.side}")
                there = [name for name in wanted if name in file.schema_arrow.names]
                self._kept = (key, file.read_row_group(place.group, there))
        values = self._kept[1].slice(place.row, 1).to_pylist()[0]
        image = values[f"jpg_{place.side}"]
        image = image.get("bytes") if isinstance(image, dict) else image
        return {"image": image, "prompt": values.get("caption"), "generator": values.get(f"model_{place.side}")}


@dataclass(frozen=True)
class RichHF(Reader):
    """Records of RichHF-18K with their images. The scores become columns of their names: the higher the better.

    A heatmap of another size than its image, but of its shape, is enlarged bilinearly; of another shape it is quarantined. Rows stand
    in the order in which Pick-a-Pic has the images, or with a folder in that of the records.

    Args:
        images: a folder of image files named by uid; or Pick-a-Pic: a folder with Parquet files, one such file, or the id of a dataset
            on the Hub, whose files are downloaded.
    """

    images: str = field(default="", compare=False)  # where they lie is no setting

    name: ClassVar[str] = "import richhf"
    columns: ClassVar[dict[str, Any]] = {"uid": Value("string")} | {name: Value("float32") for name in SCORES}

    def find(self, source: Path, shard_megabytes: float = SHARD_MEGABYTES) -> Shards:
        if not self.images:
            raise ValueError("`images` is missing: RichHF-18K has none. Name a folder of them, or Pick-a-Pic.")
        found = [item for path in _record_files(source) for item in _items(path)]
        if not found:
            raise ValueError(f"{str(source)!r} has no records.")
        folder, images = Path(self.images), None
        if folder.is_dir() and not any(folder.rglob("*.parquet")):
            images = ImageFolder(folder)
        items = self._with_images(found, images)
        sizes = [_size_of(item.image) for item in items]
        ranges = ranges_of_size(sizes, shard_megabytes)
        shards = (RecordShard(tuple(items[begin:end]), tuple(sizes[begin:end]), begin) for begin, end in ranges)
        return Shards(shards, [images] if images else [])

    def _with_images(
        self, found: Sequence[tuple[RecordItem, str | None]], folder: ImageFolder | None
    ) -> list[RecordItem]:
        if folder is not None:
            images = _by_uid(folder)
        else:
            images = _places({uid for _, uid in found if uid is not None}, self.images)
        result = []
        for item, uid in found:
            image = images.get(uid)
            problem = item.problem or ("no image of this uid" if image is None else None)
            result.append(replace(item, image=image, problem=problem))
        # those of Pick-a-Pic as it has them; all others before them, in the order of their records
        return sorted(result, key=lambda item: (1, *item.image) if isinstance(item.image, Place) else (0,))

    def label(self, annotation: dict[str, list], size: tuple[int, int]) -> dict[str, Any]:
        encoded = _first(annotation, "artifact_map", bytes)
        if encoded is None:
            raise ValueError("the record has no artifact_map")
        heatmap = read_artifact_map(io.BytesIO(encoded), maximum=255)
        if heatmap.size != size and heatmap.width * size[1] == heatmap.height * size[0]:
            heatmap = heatmap.resize(size, Image.Resampling.BILINEAR)
        scores = {name: _first(annotation, name, float) for name in SCORES}
        return {"artifact_map": np.asarray(heatmap), "uid": uid_of(annotation), **scores}


def _items(path: Path) -> Iterator[tuple[RecordItem, str | None]]:
    """The records of a file, each with the uid of its image, or None where it has a problem."""
    for number, (offset, data, problem) in enumerate(read_records(path), start=1):
        uid = None
        if problem is None:
            try:
                uid = uid_of(parse_example(data))
            except ValueError as error:
                problem = str(error)
        yield RecordItem(uid or f"{path.name}, record {number}", path, offset, None, problem), uid


def uid_of(features: dict[str, list]) -> str:
    """The uid of a record's image: the last part of its `filename`, without its ending.

    Raises:
        ValueError: it has none.
    """
    name = _first(features, "filename", bytes)
    uid = PurePosixPath(name.decode("utf-8", "replace")).stem if name else ""
    if not uid:
        raise ValueError("the record has no filename")
    return uid


def _first(features: dict[str, list], name: str, kind: type) -> Any:
    values = features.get(name)
    if not values:
        return None
    if not isinstance(values[0], kind):
        raise ValueError(f"{name} of the record is no {kind.__name__}")
    return values[0]


def _record_files(source: Path) -> list[Path]:
    files = [source] if source.is_file() else sorted(source.rglob("*.tfrecord*")) if source.is_dir() else None
    if files is None:
        raise FileNotFoundError(f"There is no file or folder {str(source)!r}.")
    if not files:
        raise ValueError(f"{str(source)!r} has no TFRecord files (*.tfrecord).")
    return files


def _by_uid(folder: ImageFolder) -> dict[str | None, Path]:
    return {PurePosixPath(name).stem: path for name, path in reversed(folder.files.items())}


def _places(uids: set[str], dataset: str) -> dict[str | None, Place]:
    """Where Pick-a-Pic has the images; only its uids are read."""
    places: dict[str | None, Place] = {}
    for path in parquet_files(dataset):
        with pq.ParquetFile(path) as file:
            missing = {f"{what}_{side}{end}" for what, end in (("image", "_uid"), ("jpg", "")) for side in SIDES}
            missing -= set(file.schema_arrow.names)
            if missing:
                raise ValueError(f"{str(path)!r} is no file of Pick-a-Pic: it has no {', '.join(sorted(missing))}.")
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, [f"image_{side}_uid" for side in SIDES])
                for side in SIDES:
                    for row, uid in enumerate(table.column(f"image_{side}_uid").to_pylist()):
                        if uid in uids:
                            places.setdefault(uid, Place(path, group, side, row))
    return places


def _size_of(image: Path | Place | None) -> int:
    if isinstance(image, Path):
        try:
            return image.stat().st_size
        except OSError:
            return 0
    return BYTES_OF_AN_IMAGE if image is not None else 0
