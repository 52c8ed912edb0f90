# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Label Studio's brushes: masks as the packed picture of a layer.

The layer is RGBA, and its alpha says what is covered. It is packed by the run lengths of thi.ng's rle-pack: bits, in which stand the
number of values (32), the bits of a value less 1 (5), four times the bits of a length less 1 (4 each), and then runs: whether one value
is repeated (1), which of the four lengths it has (2), the length less 1, and that value, or so many.
"""

from typing import Any

import numpy as np


OPAQUE = 128  # alpha from which a brush covers a pixel
VALUE_BITS = 8
LENGTH_BITS = (3, 4, 8, 16)  # that Label Studio chooses from


def encode_brush(mask: np.ndarray) -> list[int]:
    """The brush that covers a mask, bool (H, W): bytes as a list of numbers. [`decode_brush`] is its inverse."""
    values = np.repeat(np.asarray(mask, bool).ravel(), 4)
    longest = 2 ** LENGTH_BITS[-1]
    begins = np.flatnonzero(np.diff(values, prepend=~values[:1]))
    ends = np.append(begins[1:], values.size)
    pieces = -(-(ends - begins) // longest)  # of a run that is longer than a length can say
    number = np.arange(pieces.sum()) - np.repeat(pieces.cumsum() - pieces, pieces)
    begins = np.repeat(begins, pieces) + number * longest
    lengths = np.minimum(np.repeat(ends, pieces) - begins, longest)
    which = np.searchsorted(2 ** np.array(LENGTH_BITS), lengths)
    length_bits = np.array(LENGTH_BITS)[which]
    # each run as one number of `size` bits: repeated, which length, length, value
    runs = (((4 | which) << length_bits | (lengths - 1)) << VALUE_BITS) | values[begins] * 255
    size = 3 + length_bits + VALUE_BITS
    bits = np.unpackbits((runs << (32 - size)).astype(">u4").view(np.uint8).reshape(-1, 4), axis=1)
    head = f"{values.size:032b}{VALUE_BITS - 1:05b}" + "".join(f"{length - 1:04b}" for length in LENGTH_BITS)
    return np.packbits(np.append(np.array(list(head), np.uint8), bits[np.arange(32) < size[:, None]])).tolist()


def decode_brush(packed: Any, size: tuple[int, int]) -> np.ndarray:
    """What a brush covers.

    Args:
        packed: bytes as a list of numbers.
        size: (width, height) of the image.

    Returns:
        bool (H, W).

    Raises:
        ValueError: it is cut, no such list, or of another size.
    """
    if not isinstance(packed, list) or not all(isinstance(one, int) and 0 <= one < 256 for one in packed):
        raise ValueError("a brush is no list of bytes")
    bits, (width, height) = _Bits(bytes(packed)), size
    count, value_bits = bits.read(32), bits.read(5) + 1
    length_bits = [bits.read(4) + 1 for _ in range(4)]
    if count != 4 * width * height:
        raise ValueError(f"a brush has {count} values, which are not those of {width} x {height} pixels")
    if value_bits != VALUE_BITS:
        raise ValueError(f"a brush has values of {value_bits} bits, expected were {VALUE_BITS}")
    values, at = np.zeros(count, np.uint8), 0
    while at < count:
        repeated = bits.read(1)
        end = at + bits.read(length_bits[bits.read(2)]) + 1
        if end > count:
            raise ValueError("a brush's runs are longer than it")
        if repeated:
            values[at:end] = bits.read(8)
        else:
            values[at:end] = np.frombuffer(bits.read(8 * (end - at)).to_bytes(end - at, "big"), np.uint8)
        at = end
    return values.reshape(height, width, 4)[..., 3] >= OPAQUE


class _Bits:
    """Numbers of any length from bytes, the highest bit first."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def read(self, length: int) -> int:
        end = self.at + length
        if end > 8 * len(self.data):
            raise ValueError("a brush is cut short")
        last = (end + 7) // 8
        number = int.from_bytes(self.data[self.at // 8 : last], "big") >> (8 * last - end)
        self.at = end
        return number & ((1 << length) - 1)
