# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""TFRecord files and the `tf.train.Example` in their records, read without TensorFlow.

A record is its length (8 bytes, little endian), the masked CRC32C of these, the data, and the masked CRC32C of the data. An Example
is a protocol buffer: a map from names to lists of bytes, of floats or of integers.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np


HEADER, FOOTER = struct.Struct("<QI"), struct.Struct("<I")
POLYNOMIAL = 0x82F63B78  # Castagnoli's, its bits reversed
MASK_DELTA = 0xA282EAD8
CUT = "the record is cut short"
BAD_LENGTH = "the checksum of a record's length does not fit: the rest of the file cannot be read"
BAD_DATA = "the checksum of the record's data does not fit"

Feature = list[bytes] | list[float] | list[int]


# --- CRC32C --------------------------------------------------------------------------------------------------------------------

BLOCK = 1024  # bytes that are looked up at once: their tables, of 1 MB, stay in a processor's cache


def _tables() -> np.ndarray:
    """(BLOCK, 256): what a byte does to the sum of a block, by its place in the block."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> 1) ^ np.where(table & 1, np.uint32(POLYNOMIAL), np.uint32(0))
    tables = np.empty((BLOCK, 256), np.uint32)
    tables[-1] = table
    for place in range(BLOCK - 2, -1, -1):  # one byte further from the end: another zero comes after it
        tables[place] = (tables[place + 1] >> 8) ^ table[tables[place + 1] & 255]
    return tables


_TABLES = _tables()
_STARTS = np.arange(BLOCK) * 256


def crc32c(data: bytes | memoryview) -> int:
    """CRC32C (Castagnoli) of `data`."""
    data, state = np.frombuffer(data, np.uint8), 0xFFFFFFFF
    for begin in range(0, len(data), BLOCK):
        block = data[begin : begin + BLOCK].astype(np.int64)
        # The sum is linear: what came before acts as if it stood, bit for bit, in the first four bytes.
        first = min(4, len(block))
        block[:first] ^= np.frombuffer(struct.pack("<I", state), np.uint8)[:first]
        sums = _TABLES.ravel()[_STARTS[BLOCK - len(block) :] + block]
        state = int(np.bitwise_xor.reduce(sums)) ^ (state >> (8 * first) if first < 4 else 0)
    return state ^ 0xFFFFFFFF


def masked_crc32c(data: bytes | memoryview) -> int:
    """As TFRecord stores it: turned by 15 bits, plus a constant."""
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + MASK_DELTA) & 0xFFFFFFFF


# --- records -------------------------------------------------------------------------------------------------------------------


class Record(NamedTuple):
    """A record of a file, or what stands in its place."""

    offset: int  # of its first byte in the file
    data: bytes | None
    problem: str | None = None


def read_records(path: Path) -> Iterator[Record]:
    """All records of a file in order. After one that is cut, or whose length is not known, none is found."""
    with open(path, "rb") as file:
        while True:
            record = _read(file)
            if record is None:
                return
            yield record
            if record.problem in (CUT, BAD_LENGTH):
                return


def read_record(path: Path, offset: int) -> bytes:
    """The data of the record that begins at `offset`.

    Raises:
        ValueError: it is cut, or a checksum does not fit.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        record = _read(file)
    if record is None or record.problem is not None:
        raise ValueError(CUT if record is None else record.problem)
    return record.data


def _read(file) -> Record | None:
    """The record at the file's position, which moves behind it; None at the end."""
    offset, header = file.tell(), file.read(HEADER.size)
    if not header:
        return None
    if len(header) < HEADER.size:
        return Record(offset, None, CUT)
    length, crc = HEADER.unpack(header)
    if masked_crc32c(header[:8]) != crc:
        return Record(offset, None, BAD_LENGTH)
    # a length that was damaged on purpose must not ask for more memory than the file has bytes
    rest = file.seek(0, 2) - offset - HEADER.size
    file.seek(offset + HEADER.size)
    if length + FOOTER.size > rest:
        return Record(offset, None, CUT)
    data, footer = file.read(length), file.read(FOOTER.size)
    if masked_crc32c(data) != FOOTER.unpack(footer)[0]:
        return Record(offset, None, BAD_DATA)
    return Record(offset, data)


# --- tf.train.Example ----------------------------------------------------------------------------------------------------------

VARINT, FIXED64, LENGTH_DELIMITED, FIXED32 = 0, 1, 2, 5  # wire types
BYTES, FLOATS, INTEGERS = 1, 2, 3  # fields of a Feature


def parse_example(data: bytes) -> dict[str, Feature]:
    """The features of a serialized `tf.train.Example`. Fields that it does not know are passed over.

    Raises:
        ValueError: it is none.
    """
    features: dict[str, Feature] = {}
    for number, wire, value in _fields(memoryview(data)):
        if (number, wire) == (1, LENGTH_DELIMITED):
            for inner, inner_wire, entry in _fields(value):
                if (inner, inner_wire) == (1, LENGTH_DELIMITED):
                    name, feature = _entry(entry)
                    features[name] = feature
    return features


def _entry(data: memoryview) -> tuple[str, Feature]:
    """An entry of the map: its key and its Feature."""
    name, feature = "", []
    for number, wire, value in _fields(data):
        if (number, wire) == (1, LENGTH_DELIMITED):
            try:
                name = str(value, "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError("no tf.train.Example: a feature's name is no text") from error
        elif (number, wire) == (2, LENGTH_DELIMITED):
            feature = _feature(value)
    return name, feature


def _feature(data: memoryview) -> Feature:
    """The list of a Feature; of several kinds, which only one of may be set, the last."""
    kind, result = None, []
    for number, wire, value in _fields(data):
        if number in (BYTES, FLOATS, INTEGERS) and wire == LENGTH_DELIMITED:
            if number != kind:
                kind, result = number, []
            result += _VALUES[number](value)
    return result


def _bytes(data: memoryview) -> list[bytes]:
    return [bytes(value) for number, wire, value in _fields(data) if (number, wire) == (1, LENGTH_DELIMITED)]


def _floats(data: memoryview) -> list[float]:
    result = []
    for number, wire, value in _fields(data):
        if number == 1 and wire in (LENGTH_DELIMITED, FIXED32):  # packed, or one at a time
            if len(value) % 4:
                raise ValueError("no tf.train.Example: a list of floats is cut")
            result += np.frombuffer(value, "<f4").tolist()
    return result


def _integers(data: memoryview) -> list[int]:
    result = []
    for number, wire, value in _fields(data):
        if (number, wire) == (1, VARINT):
            result.append(_signed(value))
        elif (number, wire) == (1, LENGTH_DELIMITED):
            at = 0
            while at < len(value):
                one, at = _varint(value, at)
                result.append(_signed(one))
    return result


_VALUES = {BYTES: _bytes, FLOATS: _floats, INTEGERS: _integers}


def _fields(data: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """(number, wire type, value) of a message's fields in order; the value is an integer or the field's bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            value, at = _varint(data, at)
        else:
            if wire == LENGTH_DELIMITED:
                length, at = _varint(data, at)
            elif wire in (FIXED32, FIXED64):
                length = 4 if wire == FIXED32 else 8
            else:
                raise ValueError(f"no tf.train.Example: a field has the wire type {wire}")
            if length > len(data) - at:
                raise ValueError("no tf.train.Example: a field is longer than its message")
            value, at = data[at : at + length], at + length
        yield number, wire, value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """The integer that begins at `at`, seven bits a byte, the lowest first; and where it ends."""
    value = 0
    for place in range(10):
        if at + place >= len(data):
            raise ValueError("no tf.train.Example: a number is cut")
        byte = data[at + place]
        value |= (byte & 127) << (7 * place)
        if byte < 128:
            return value & (2**64 - 1), at + place + 1
    raise ValueError("no tf.train.Example: a number is too long")


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
