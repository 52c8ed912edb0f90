# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What a row of detector data is: one schema for people's masks, photographs, pseudo-labels and what is injected or rendered.

Inside a stage a row is a dictionary with these columns whose images are undecoded: `{"bytes": bytes, "path": str | None}`, as
`datasets` stores them. They are decoded by [`decode_image`] and [`decode_map`] only, so that a picture is the same pixels in
every stage and in training.
"""

import hashlib
import io
import math
from typing import Any

import numpy as np
from datasets import Features, Image, List, Value
from PIL import Image as PILImage

from ..images import read_artifact_map, read_image
from ..seeds import derive_seed


Row = dict[str, Any]

# human: masks that people painted; photo: real photographs, zero everywhere; pseudo: a detector's own labels; injected: sound
# images that were corrupted on purpose; rendered: drawn by something that knows its mistakes.
SOURCES = ("human", "photo", "pseudo", "injected", "rendered")
MAP_REDUCTION = 4  # side of an image to side of a map that a detector made: the detector's own resolution

FEATURES = Features(
    {
        "image": Image(),
        "artifact_map": Image(),  # 8-bit gray, 255 = 1.0 = artifact; None: not labelled
        "prompt": Value("string"),
        "category": List(Value("string")),  # what is in the image, as many as there are
        "generator": Value("string"),  # id of the model that made it; None: unknown, or nobody's
        "source": Value("string"),  # one of SOURCES; None: not labelled
    }
)
# columns that only datasets have which need them
OPTIONAL = Features({"ignore_map": Image()})  # 8-bit gray, 255 = the pixel does not count, 0 = it does; None: all do
IMAGES = ("image", "artifact_map", "ignore_map")


def with_schema(columns: Features) -> Features:
    """The schema, and behind it those of the columns that are not in it."""
    others = {name: OPTIONAL.get(name, feature) for name, feature in columns.items() if name not in FEATURES}
    return Features(FEATURES | others)


def conform(row: Row) -> Row:
    """The row with all columns of [`FEATURES`], those first and in their order; further ones stay behind them.

    A `category` that is one text becomes a list of one; columns that are missing are None, or an empty list, but for those of
    [`OPTIONAL`], which stay away.

    Raises:
        ValueError: a column holds something else than the schema says; the column and the value are named.
    """
    result = {name: row.get(name) for name in FEATURES} | {key: row[key] for key in row if key not in FEATURES}
    for name in IMAGES:
        value = result.get(name)
        if value is None and name != "image":
            continue
        if isinstance(value, bytes):
            value = result[name] = {"bytes": value, "path": None}
        if not isinstance(value, dict) or not isinstance(value.get("bytes"), bytes):
            # a path alone would let a stranger's dataset read any file of this machine
            found = "only a path" if isinstance(value, dict) and value.get("path") else type(value).__name__
            raise ValueError(f"`{name}` must hold the bytes of an image file, found {found}.")
        result[name] = {"bytes": value["bytes"], "path": value.get("path")}
    for name in ("prompt", "generator"):
        if result[name] is not None and not isinstance(result[name], str):
            raise ValueError(f"`{name}` must be a text or None, found {result[name]!r:.100}.")
    if result["source"] not in (None, *SOURCES):
        raise ValueError(f"`source` must be one of {', '.join(SOURCES)}, or None, found {result['source']!r:.100}.")
    category = result["category"]
    category = [] if category is None else [category] if isinstance(category, str) else category
    if not isinstance(category, list) or not all(isinstance(name, str) and name.strip() for name in category):
        raise ValueError(f"`category` must be a text or a list of texts, found {category!r:.100}.")
    result["category"] = category
    return result


def decode_image(row: Row) -> PILImage.Image:
    """The image of a row as RGB, upright. Raises what [`read_image`] raises."""
    return read_image(io.BytesIO(row["image"]["bytes"]))


def decode_map(row: Row, size: tuple[int, int]) -> PILImage.Image | None:
    """The map of a row (mode L), or None where it has none.

    Args:
        row: of a stage.
        size: (width, height) of its image in pixels, as [`decode_image`] gives it.

    Raises:
        ValueError: the map is no image of one channel, or has neither the size of its image nor a quarter of its side.
    """
    return _decode(row, "artifact_map", size, "a map")


def decode_ignore_map(row: Row, size: tuple[int, int]) -> PILImage.Image | None:
    """What does not count of a row (mode L, above 0), or None where all does. Arguments and errors are those of [`decode_map`]."""
    return _decode(row, "ignore_map", size, "an ignore_map")


def _decode(row: Row, name: str, size: tuple[int, int], what: str) -> PILImage.Image | None:
    if row.get(name) is None:
        return None
    found = read_artifact_map(io.BytesIO(row[name]["bytes"]), maximum=255)
    if found.size not in (size, reduced_size(size)):
        raise ValueError(
            f"An image of {size[0]} x {size[1]} pixels has {what} of {found.size[0]} x {found.size[1]}; it must have the size "
            f"of its image, or {' x '.join(map(str, reduced_size(size)))}, a quarter of its side."
        )
    return found


def reduced_size(size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of the map that a detector makes of an image of `size`: a quarter of each side, rounded up."""
    return tuple(math.ceil(side / MAP_REDUCTION) for side in size)


def encode_png(array: np.ndarray, path: str | None = None) -> dict[str, Any]:
    """An image (H, W, 3) or a map (H, W) of uint8 as a row holds it, without loss."""
    file = io.BytesIO()
    PILImage.fromarray(array).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": path}


def no_artifact(size: tuple[int, int]) -> dict[str, Any]:
    """The map of a sound image of `size` (width, height): zeros, at a quarter of the side."""
    width, height = reduced_size(size)
    return encode_png(np.zeros((height, width), np.uint8))


def row_seed(seed: int, row: Row) -> int:
    """A seed in [0, 2**31) for what is random about a row: it follows from its image, wherever the row stands."""
    return derive_seed(seed, hashlib.sha256(row["image"]["bytes"]).hexdigest())
