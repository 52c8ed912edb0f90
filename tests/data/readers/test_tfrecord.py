# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""TFRecord and tf.train.Example against what others write: published sums, and protobuf's own runtime."""

import random
import struct
import time

import numpy as np
import pytest
from fixtures.tfrecords import example, record

from diffusers_diffdoctor.data.readers.tfrecord import (
    BAD_DATA,
    BAD_LENGTH,
    CUT,
    crc32c,
    masked_crc32c,
    parse_example,
    read_record,
    read_records,
)


def test_sums_are_the_published_ones():
    # RFC 3720, B.4, and the check value of the catalogue of CRCs
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(bytes(range(31, -1, -1))) == 0x113FDB5C
    assert crc32c(b"") == 0
    assert (
        masked_crc32c(b"123456789") == (0xC78B + (0xE3069283 << 17) + 0xA282EAD8 - 0xC78B + (0xE3069283 >> 15)) % 2**32
    )


@pytest.mark.parametrize("length", [1, 3, 4, 5, 1023, 1024, 1025, 1026, 1027, 1028, 5000])
def test_sums_of_any_length_are_those_of_one_bit_after_the_other(length):
    data = np.random.default_rng(length).bytes(length)
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = (state >> 1) ^ (0x82F63B78 if state & 1 else 0)
    assert crc32c(data) == state ^ 0xFFFFFFFF


def test_sums_are_fast_enough():
    data = bytes(4_000_000)
    start = time.process_time()
    crc32c(data)
    assert time.process_time() - start < 1  # 18,000 records of 50 kB each in 4 minutes at the very most


def test_examples_are_what_protobuf_wrote():
    features = {
        "filename": [b"train/abc.png"],
        "bytes": [b"", bytes(300), b"\xff\x00"],
        "artifact_score": [0.25],
        "floats": [1.5, -2.0, 2.0**100, float("inf")],
        "integers": [0, 1, -1, 2**63 - 1, -(2**63), 300],
        "naïve name": [b"x"],
    }
    found = parse_example(example(features))
    assert found == features and isinstance(found["integers"][0], int)
    assert parse_example(example({"nothing": []})) == {"nothing": []} and parse_example(b"") == {}


def test_lists_that_are_not_packed_and_fields_that_are_not_known():
    def field(number, wire, content):
        return bytes([number << 3 | wire]) + content

    def message(number, content):
        return field(number, 2, bytes([len(content)]) + content)

    def entry(name, feature):
        return message(1, message(1, name) + message(2, feature))

    floats = message(2, field(1, 5, struct.pack("<f", 0.5)) + field(1, 5, struct.pack("<f", 2.0)))
    integers = message(3, field(1, 0, b"\x07") + field(1, 0, b"\xac\x02"))
    unknown = field(9, 0, b"\x01") + field(10, 1, bytes(8)) + message(11, b"abc")
    data = message(1, entry(b"floats", unknown + floats) + unknown + entry(b"integers", integers)) + unknown
    assert parse_example(data) == {"floats": [0.5, 2.0], "integers": [7, 300]}


def test_whatever_an_example_is_cut_or_spoiled_to_it_is_an_error_of_ours():
    whole = example({"filename": [b"abc.png"], "scores": [0.5, 1.0], "n": [1, 2, 300]})
    rng = random.Random(0)
    refused = 0
    for cut in range(len(whole)):
        spoiled = bytearray(whole)
        spoiled[rng.randrange(len(whole))] = rng.randrange(256)
        for data in (whole[:cut], bytes(spoiled)):
            try:
                parse_example(data)
            except ValueError as error:
                assert "tf.train.Example" in str(error)
                refused += 1
    assert refused > len(whole) / 2


@pytest.fixture
def three(tmp_path):
    """A file of three records."""
    contents = [b"first", bytes(3000), b"third"]
    path = tmp_path / "x.tfrecord"
    path.write_bytes(b"".join(map(record, contents)))
    return path, contents


def test_records_are_found_in_order_and_one_by_one(three):
    path, contents = three
    found = list(read_records(path))
    assert [one.data for one in found] == contents and all(one.problem is None for one in found)
    assert [read_record(path, one.offset) for one in found] == contents


@pytest.mark.parametrize(
    "at, problems",
    [
        (0, [BAD_LENGTH]),  # of the length
        (9, [BAD_LENGTH]),  # of its sum
        (13, [BAD_DATA, None, None]),
        (17, [BAD_DATA, None, None]),  # of the sum of the data
        (21 + 12 + 7, [None, BAD_DATA, None]),
    ],
)
def test_a_wrong_sum_costs_its_record_or_what_comes_after(three, at, problems):
    path, _ = three
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    found = list(read_records(path))
    assert [one.problem for one in found] == problems
    with pytest.raises(ValueError, match="checksum"):
        read_record(path, found[problems.index(next(filter(None, problems)))].offset)


@pytest.mark.parametrize("cut", [1, 4, 8, 9, 15, 20])
def test_the_last_record_may_be_cut(three, cut):
    path, contents = three
    path.write_bytes(path.read_bytes()[:-cut])
    found = list(read_records(path))
    assert [one.data for one in found] == [*contents[:2], None] and found[-1].problem == CUT


def test_a_length_that_lies_takes_no_memory(tmp_path):
    header = struct.pack("<Q", 2**62)
    (tmp_path / "x").write_bytes(header + struct.pack("<I", masked_crc32c(header)) + b"x")
    assert [one.problem for one in read_records(tmp_path / "x")] == [CUT]
