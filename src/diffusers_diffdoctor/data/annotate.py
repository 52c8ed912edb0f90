# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What people painted: one file for each image and annotator, and the stage that makes a dataset of them.

    FOLDER/annotations/KEY/ANNOTATOR.png

The file is the mask at the image's own size (8-bit gray: 255 = artifact, 128 = not sure, 0 = sound), and holds the rest, such as
whether it is finished, as a text of the PNG: so that one atomic write saves all of it. KEY is the beginning of the digest of the
image's bytes, so that an annotation stays with its image whatever becomes of the order of a dataset.
"""

import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import ClassVar

import numpy as np
from datasets import List, Value
from PIL import Image, PngImagePlugin

from ..files import digest, write_atomically
from .schema import OPTIONAL, Row, decode_image, encode_png
from .shards import Quarantined, Shard
from .stage import LEFT_OUT, Stage, row_name


ARTIFACT, UNSURE = 255, 128
KINDS = (
    "hand",
    "face",
    "limbs",
    "animal",
    "object",
    "text",
    "texture",
    "other",
)  # of artifact, unless others are asked for
# draft: unfinished; done: what is painted is all; skipped: this annotator does not judge it
DRAFT, DONE, SKIPPED = STATES = ("draft", "done", "skipped")
ANNOTATIONS = "annotations"
KEY_LENGTH = 24
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
_TEXT = "diffdoctor"


@dataclass(frozen=True)
class Annotation:
    """What one person says about one image.

    Attributes:
        mask: uint8 (H, W) of the image's own size: 255 = artifact, 128 = not sure, 0 = sound.
        state: "draft", "done" or "skipped".
        kinds: of artifact.
        revision: how often it was saved.
        seconds: that were spent on it.
    """

    mask: np.ndarray
    state: str = DRAFT
    kinds: tuple[str, ...] = ()
    revision: int = 0
    seconds: float = 0.0

    def __post_init__(self):
        if self.mask.dtype != np.uint8 or self.mask.ndim != 2:
            raise ValueError(f"`mask` must be uint8 (H, W), found {self.mask.dtype} {self.mask.shape}.")
        others = np.setdiff1d(self.mask, (0, UNSURE, ARTIFACT))
        if others.size:
            raise ValueError(f"`mask` must hold 0, {UNSURE} and {ARTIFACT} only, found {others[0]}.")
        if self.state not in STATES:
            raise ValueError(f"`state` must be one of {', '.join(STATES)}, found {self.state!r:.100}.")


def key_of(row: Row) -> str:
    """What the annotations of a row's image are filed under."""
    return digest(row["image"]["bytes"])[:KEY_LENGTH]


def annotation_path(folder: str | Path, key: str, annotator: str) -> Path:
    """Where an annotation lies.

    Raises:
        ValueError: the key is none, or the annotator's name is no name of a file everywhere.
    """
    if not re.fullmatch(rf"[0-9a-f]{{{KEY_LENGTH}}}", key):
        raise ValueError(f"There is no image {key!r:.100}.")
    if not NAME.fullmatch(annotator):
        raise ValueError(
            f"An annotator's name has 1 to 40 letters, digits, - and _, the first a letter or digit; found {annotator!r:.100}."
        )
    return Path(folder, ANNOTATIONS, key, f"{annotator.lower()}.png")


def write_annotation(folder: str | Path, key: str, annotator: str, annotation: Annotation) -> None:
    """Write an annotation: it is whole on the disk when this returns. Raises what [`annotation_path`] raises."""
    path = annotation_path(folder, key, annotator)
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {name: value for name, value in asdict(annotation).items() if name != "mask"}
    text, file = PngImagePlugin.PngInfo(), io.BytesIO()
    text.add_itxt(_TEXT, json.dumps(facts))
    Image.fromarray(annotation.mask).save(file, "PNG", pnginfo=text)
    write_atomically(path, file.getvalue())


def read_annotation(path: str | Path) -> Annotation:
    """What [`write_annotation`] wrote.

    Raises:
        ValueError: the file is something else, or damaged; it is named.
        FileNotFoundError: there is none.
    """
    content = Path(path).read_bytes()
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            mask = np.array(image)
            facts = json.loads(image.text[_TEXT])
        return Annotation(mask, **{**facts, "kinds": tuple(facts["kinds"])})
    except Exception as error:  # decoders raise many types
        raise ValueError(f"{str(path)!r} is no annotation that can be read: {error}") from error


def annotations_of(folder: str | Path, key: str) -> dict[str, Annotation]:
    """The annotations of an image by annotator, in the order of their names."""
    files = sorted(Path(folder, ANNOTATIONS, key).glob("*.png"))
    return {file.stem: read_annotation(file) for file in files if not file.name.startswith(".")}


# --- agreement ---------------------------------------------------------------------------------------------------------------


def intersection_over_union(first: np.ndarray, second: np.ndarray) -> float:
    """Of the artifacts of two masks, where both annotators are sure. 1 where neither sees any."""
    sure = (first != UNSURE) & (second != UNSURE)
    first, second = (first == ARTIFACT) & sure, (second == ARTIFACT) & sure
    union = np.count_nonzero(first | second)
    return np.count_nonzero(first & second) / union if union else 1.0


def agreement(annotations: Iterable[Sequence[tuple[str, Annotation]]]) -> dict[tuple[str, str], tuple[int, float]]:
    """For each pair of annotators: how many images both have finished, and their mean intersection over union.

    Args:
        annotations: for each image, (annotator, annotation).
    """
    found: dict[tuple[str, str], list[float]] = {}
    for image in annotations:
        done = sorted((name, a.mask) for name, a in image if a.state == DONE)
        for (one, first), (other, second) in combinations(done, 2):
            found.setdefault((one, other), []).append(intersection_over_union(first, second))
    return {pair: (len(values), sum(values) / len(values)) for pair, values in sorted(found.items())}


def merge_masks(masks: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(artifact map, ignore map), uint8 (H, W) of 0 and 255, of several annotators' masks of one image.

    A pixel is an artifact if all say so, sound if all say so, and else does not count.
    """
    stacked = np.stack(masks)
    artifact, sound = (stacked == ARTIFACT).all(axis=0), (stacked == 0).all(axis=0)
    return artifact.astype(np.uint8) * 255, (~artifact & ~sound).astype(np.uint8) * 255


# --- the stage ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Annotate(Stage):
    """Rows with the masks that people painted, `source` "human". Images that nobody has finished are left out.

    Where annotators differ, or were not sure, `ignore_map` says that the pixel does not count. `artifact_kind` lists the kinds that
    they named.

    Args:
        annotations_sha256: digest of the annotations, see [`annotate`].
        folder: of the queue.
    """

    annotations_sha256: str
    folder: str = field(compare=False)

    name: ClassVar[str] = "annotate"
    columns: ClassVar[dict] = {"ignore_map": OPTIONAL["ignore_map"], "artifact_kind": List(Value("string"))}

    def process(self, rows, shard: Shard):
        for row in rows:
            try:
                done = [a for a in annotations_of(self.folder, key_of(row)).values() if a.state == DONE]
                yield self.labelled(row, done) if done else LEFT_OUT
            except (ValueError, OSError) as error:
                yield Quarantined(row_name(row), str(error))

    def labelled(self, row: Row, done: Sequence[Annotation]) -> Row:
        width, height = decode_image(row).size
        for annotation in done:
            if annotation.mask.shape != (height, width):
                raise ValueError(f"A mask has the shape {annotation.mask.shape}, its image {(height, width)}.")
        artifact, ignore = merge_masks([annotation.mask for annotation in done])
        kinds = dict.fromkeys(kind for annotation in done for kind in annotation.kinds)
        return row | {
            "artifact_map": encode_png(artifact),
            "ignore_map": encode_png(ignore) if ignore.any() else None,
            "artifact_kind": list(kinds),
            "source": "human",
        }


def annotate(folder: str | Path) -> Annotate:
    """The stage for the annotations that lie in the folder of a queue now.

    Raises:
        ValueError: there are none.
    """
    files = sorted(Path(folder, ANNOTATIONS).glob("*/*.png"))
    files = [file for file in files if not file.name.startswith(".")]
    if not files:
        raise ValueError(f"{str(folder)!r} holds no annotation: paint some by `diffdoctor ui`.")
    lines = (f"{file.parent.name}/{file.name} {digest(file)}\n" for file in files)
    return Annotate(digest(lines), str(folder))
