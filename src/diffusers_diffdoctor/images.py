# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The one reader of images, so that a picture is the same pixels wherever it goes in: diagnosis, training, treatment."""

import io
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps

from .files import read_regular_file


IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")  # the fewer decoders a stranger's file can reach, the better
MOST_SCANS = 100  # of a JPEG: each goes over all pixels, and a few bytes are enough for one. Encoders write about ten
ORIENTATION, TILE_WIDTH, TILE_LENGTH = 274, 322, 323  # tags of EXIF and TIFF

RANGE_TOLERANCE = 1e-3  # by which floats may leave [0, 1]: rounding, not another range

__all__ = ["read_artifact_map", "read_image", "to_image_tensor"]

ImageSource = str | os.PathLike | BinaryIO | Image.Image | np.ndarray | torch.Tensor


def read_image(source: ImageSource) -> Image.Image:
    """Any picture as one sees it: RGB of 8 bits, upright, transparent parts on white, the full range of values.

    - The EXIF orientation is applied. Of an animation the first frame is taken. Colour profiles are not applied.
    - Alpha, also that of palettes (tRNS) and of gray images (LA), is composited onto white.
    - 16 bits per channel are divided by 257; floats in [0, 1] are multiplied by 255 and rounded.
    - Gray, palette and CMYK become RGB.

    Args:
        source: path or binary file (PNG, JPEG, WEBP, BMP, TIFF, recognised by content), PIL image, array (H, W) or
            (H, W, C) or (C, H, W), or tensor (H, W) or (C, H, W) or (H, W, C), with 1, 2 (gray and alpha), 3 or 4
            channels, of bool, uint8, uint16 or floats in [0, 1]. Where both the first and the last axis could be the
            channels, it is the last of an array and the first of a tensor.

    Raises:
        TypeError: something else, or integers of another type, whose full range is not known.
        ValueError: floats outside [0, 1]; a shape that is no image; a file in another format or broken; an image of more
            than `PIL.Image.MAX_IMAGE_PIXELS` pixels (89 million), which Pillow takes for a decompression bomb.
        OSError: the file does not exist, cannot be read or is cut short.
    """
    if _is_file(source) or isinstance(source, Image.Image):
        with _opened(source) as image:
            return _as_seen(image)
    array = _to_8_bits(_channels_last(source))
    return _as_seen(Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array))


def read_artifact_map(source: ImageSource, maximum: int | None = None) -> Image.Image:
    """A map of one channel as 8-bit gray (mode L), 255 = 1.0 = artifact, turned as its EXIF orientation says.

    Args:
        source: as for [`read_image`], with one channel. Booleans (mode "1"), 16 bits and floats in [0, 1] are brought to the
            full range.
        maximum: the value of 8-bit maps that stands for 1.0: 255 for confidences, 1 for class indices. Without it 255,
            but a map whose highest value is 1 is refused, because it could be either.

    Raises:
        ValueError: more than one channel, a palette, a value above `maximum`, or a highest value of 1 without `maximum`;
            and what [`read_image`] raises.
    """
    if maximum not in (None, 1, 255):
        raise ValueError(f"`maximum` must be 255 or 1, or None where maps leave no doubt, found {maximum!r}.")
    if _is_file(source) or isinstance(source, Image.Image):
        with _opened(source) as image:
            if image.mode not in ("1", "L", "F") and not image.mode.startswith("I;16"):
                raise ValueError(
                    f"An artifact map must have one channel (8-bit gray, mode L, 255 = artifact), found mode {image.mode}. "
                    "Convert it so that 1.0 becomes 255."
                )
            array = np.asarray(ImageOps.exif_transpose(image))
    else:
        array = _channels_last(source)
        array = array[..., 0] if array.shape[2:] == (1,) else array
        if array.ndim != 2:
            raise ValueError(f"An artifact map must have one channel, found an array of shape {array.shape}.")
    eight_bit = array.dtype == np.uint8
    array = _to_8_bits(array)
    highest = int(array.max(initial=0))
    if eight_bit and maximum is None and highest == 1:
        raise ValueError(
            "The highest value of an 8-bit artifact map is 1, which could be a class index (artifact) or a confidence of "
            "1/255. Say which: `map_maximum=1` or `map_maximum=255`, or store masks as booleans or with 255 for 1.0."
        )
    if eight_bit and maximum == 1:
        if highest > 1:
            raise ValueError(
                f"An artifact map has the value {highest}, but `map_maximum` is 1: maps must hold 0 and 1."
            )
        array = array * np.uint8(255)
    return Image.fromarray(array)


def read_class_indices(source: str | os.PathLike | BinaryIO) -> np.ndarray:
    """The values of a mask as its file has them: an index for each pixel, turned as its EXIF orientation says.

    Args:
        source: as for [`read_image`]: 8-bit gray, a palette (of which the indices count, not the colours), booleans (as 0 and 255),
            or RGB whose channels are the same.

    Returns:
        uint8 (H, W).

    Raises:
        ValueError: other channels or another depth; and what [`read_image`] raises.
    """
    with _opened(source) as image:
        if image.mode not in ("1", "L", "P", "RGB"):
            raise ValueError(f"A mask must have one channel of 8 bits, found mode {image.mode}.")
        array = _to_8_bits(np.asarray(ImageOps.exif_transpose(image)))
    if array.ndim == 3:
        if (array != array[..., :1]).any():
            raise ValueError("A mask must have one channel of 8 bits, found colours.")
        array = array[..., 0]
    return array


def to_image_tensor(image: ImageSource, size: tuple[int, int] | None = None) -> torch.Tensor:
    """A picture, read by [`read_image`], as float (3, height, width) in [0, 1].

    Args:
        image: anything that [`read_image`] reads.
        size: (height, width) in pixels to which the picture is brought: scaled to cover it (Lanczos) and cropped around
            its centre. Without it the picture keeps its size.
    """
    image = read_image(image)
    if size is not None and image.size != (size[1], size[0]):
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _is_file(source: Any) -> bool:
    return isinstance(source, (str, os.PathLike)) or hasattr(source, "read")


@contextmanager
def _opened(source: str | os.PathLike | BinaryIO | Image.Image) -> Iterator[Image.Image]:
    """The PIL image of a file, or the one given; what Pillow says of bad files is said in our words."""
    path = source if isinstance(source, (str, os.PathLike)) else getattr(source, "name", None)
    name = repr(os.fspath(path)) if isinstance(path, (str, os.PathLike)) else "The image"
    content = b"" if isinstance(source, Image.Image) else _content(source)
    try:
        with (
            nullcontext(source)
            if isinstance(source, Image.Image)
            else Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image
        ):
            _refuse_bombs(image, content)
            _check_sums(content)
            image.load()
            yield image
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image in one of the formats {', '.join(IMAGE_FORMATS)}.") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} is too large to be opened safely: {error}") from error
    except SyntaxError as error:  # Pillow's word for a broken file
        raise ValueError(f"{name} is broken: {error}") from error


def _content(source: str | os.PathLike | BinaryIO) -> bytes:
    """All bytes of a file, so that no decoder waits for it, maps it into memory or sees it change."""
    if isinstance(source, (str, os.PathLike)):
        # 8 bytes a pixel are as many as an image that is small enough can need (RGBA of 16 bits, not compressed), beside what
        # is said about it.
        most = None if Image.MAX_IMAGE_PIXELS is None else 8 * Image.MAX_IMAGE_PIXELS + 2**26
        return read_regular_file(source, most)
    if hasattr(source, "seekable") and source.seekable():
        source.seek(0)
    return source.read()


def _refuse_bombs(image: Image.Image, content: bytes) -> None:
    """Refuse what would take more memory or time than an image of `PIL.Image.MAX_IMAGE_PIXELS` pixels."""
    sizes = [image.size]
    if image.format == "TIFF" and TILE_WIDTH in image.tag_v2:  # tiles are unpacked whole, however small the image is
        sizes.append((image.tag_v2[TILE_WIDTH], image.tag_v2[TILE_LENGTH]))
    for width, height in sizes:
        # Pillow itself only warns up to twice as many.
        if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(
                f"its {width} x {height} pixels are more than the limit of {Image.MAX_IMAGE_PIXELS}."
            )
    scans = content.count(b"\xff\xda") if content.startswith(b"\xff\xd8") else 0
    if scans > MOST_SCANS:
        raise Image.DecompressionBombError(f"its {scans} scans are more than the limit of {MOST_SCANS}.")


def _check_sums(content: bytes) -> None:
    """Pillow checks a PNG's sums but for those of its pixels, and takes damaged ones for what was drawn."""
    content, at = memoryview(content), 8
    while content[:4] == b"\x89PNG" and at + 12 <= len(content):
        length, kind = struct.unpack(">I4s", content[at : at + 8])
        end = at + 8 + length
        if end + 4 > len(content):
            return  # cut short, as Pillow will say
        if kind == b"IDAT" and content[end : end + 4] != struct.pack(">I", zlib.crc32(content[at + 4 : end])):
            raise SyntaxError("the checksum of its pixels does not fit them.")
        at = end + 4


def _as_seen(image: Image.Image) -> Image.Image:
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I;16"):
        array = np.asarray(image)
        clear = array == image.info.get("transparency", -1)  # tRNS of a gray image names one level
        return Image.fromarray(np.where(clear, np.uint8(255), _to_8_bits(array))).convert("RGB")
    if image.mode == "I":
        raise TypeError(
            "The image has integers of 32 bits (mode I), whose full range is not known: store it with 8 or 16 bits."
        )
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    return image.convert("RGB")


def _channels_last(source: Any) -> np.ndarray:
    """An array (H, W) or (H, W, C)."""
    first = isinstance(source, torch.Tensor)
    if first:
        source = source.detach().cpu()
        source = source.float() if source.dtype == torch.bfloat16 else source  # numpy has none
    array = np.asarray(source)
    if array.ndim == 0 or array.dtype.kind not in "biuf":
        raise TypeError(
            "An image must be a path, a binary file, a PIL image, an array or a tensor, found "
            f"{type(source).__name__}."
        )
    counts = (1, 2, 3, 4)
    if array.ndim == 3:
        ends = [array.shape[axis] in counts for axis in (0, 2)]
        if ends[0] and (first or not ends[1]):
            array = array.transpose(1, 2, 0)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in counts) or array.size == 0:
        raise ValueError(
            f"An array or tensor of shape {array.shape} is no image; expected was (H, W), (H, W, C) or (C, H, W) with 1 to "
            "4 channels."
        )
    return np.ascontiguousarray(array)


def _to_8_bits(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array * np.uint8(255)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())  # nan anywhere makes both nan
        if not (-RANGE_TOLERANCE <= low and high <= 1 + RANGE_TOLERANCE):
            raise ValueError(
                f"An image of floats must lie in [0, 1], found values from {low:.4g} to {high:.4g}. Scale it, or pass 8-bit "
                "values as uint8."
            )
        return (array.clip(0, 1) * 255).round().astype(np.uint8)
    raise TypeError(
        f"An image of {array.dtype} has no known full range; pass uint8, uint16, bool, or floats in [0, 1]."
    )
