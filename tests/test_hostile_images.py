# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Files made to take time or memory, and files that change under the reader: each in a process of its own."""

import os
import random
import signal
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
from fixtures.broken_files import (
    animation,
    bmp,
    chunk,
    jpeg_of_many_scans,
    jpeg_of_size,
    png,
    tiff,
    tile_bomb,
    webp_of_canvas,
    whole,
    zeros_packed,
)

from diffusers_diffdoctor.images import read_image


resource = pytest.importorskip("resource")  # there is none on Windows, nor `os.fork`


# What could take much time or memory -> what becomes of it: a size, or words of the error.
BOMBS = {
    "header of a PNG": (lambda: png(60_000, 60_000), "too large to be opened safely"),
    "header of a TIFF": (lambda: tiff({256: (4, [60_000]), 257: (4, [60_000])}), "too large to be opened safely"),
    "header of a WEBP": (lambda: webp_of_canvas(16_383, 16_383), "too large to be opened safely"),
    "header of a BMP": (lambda: bmp(60_000, 60_000), "too large to be opened safely"),
    "header of a JPEG": (lambda: jpeg_of_size(65_500, 65_500), "too large to be opened safely"),
    "just over the limit": (lambda: png(9_460, 9_460), "too large to be opened safely"),
    "tile of a TIFF": (lambda: tile_bomb(26_000), "its 26000 x 26000 pixels"),
    "rows of a TIFF": (lambda: tiff({278: (4, [2**32 - 1])}), (16, 16)),
    "samples of a TIFF": (lambda: tiff({277: (3, [60_000])}), "is not an image"),
    "tag of a TIFF": (lambda: tiff({34675: (7, bytes(50 * 2**20))}), (16, 16)),
    "loop of directories": (lambda: tiff(next_at=None), (16, 16)),
    "scans of a JPEG": (lambda: jpeg_of_many_scans(2000), "scans are more than the limit"),
    "profile of a PNG": (lambda: png(extra=chunk(b"iCCP", b"x\0\0" + zeros_packed(500))), "too large"),
    "profile of a JPEG": (lambda: whole(".jpg", icc_profile=bytes(16_000_000)), (24, 16)),
    "texts of a PNG": (lambda: png(extra=200 * chunk(b"zTXt", b"x\0\0" + zeros_packed(1))), "Too much memory"),
    "chunks of a PNG": (lambda: png(extra=200_000 * chunk(b"tEXt", b"a\0")), (8, 8)),
    "data of a PNG": (lambda: png(data=zeros_packed(1000)), (8, 8)),
    "frames of a PNG": (lambda: animation("PNG", 10_000), (16, 16)),
    "frames of a WEBP": (lambda: animation("WEBP", 10_000), (16, 16)),
    "frames of a GIF": (lambda: animation("GIF", 10_000), "is not an image"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_take_little_time_and_memory(tmp_path, name):
    """In a process that gets 300 MB more than it has, and five seconds of the processor."""
    content, expected = BOMBS[name][0](), BOMBS[name][1]
    (tmp_path / "bomb").write_bytes(content)
    del content
    process = os.fork()
    if not process:
        status = 1
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc").is_dir() else 2**30
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 300 * 2**20,) * 2)
            resource.setrlimit(resource.RLIMIT_CPU, (5, 5))
            warnings.simplefilter("ignore")
            try:
                found = read_image(tmp_path / "bomb").size
            except (OSError, ValueError) as error:
                found = str(error)
            as_expected = expected in found if isinstance(expected, str) else expected == found
            status = 0 if as_expected else print(name, found) or 2
        except BaseException as error:
            print(name, repr(error))
        finally:
            sys.stdout.flush()
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def test_a_file_that_shrinks_while_it_is_read_ends_no_process(tmp_path):
    """A decoder that maps a file into memory dies of a part that is not there any more."""
    side = 1500  # gray and not compressed, as Pillow maps it
    tags = {256: (4, [side]), 257: (4, [side]), 258: (3, [8]), 262: (3, [1]), 277: (3, [1]), 278: (4, [side])}
    path, content = tmp_path / "image.tif", tiff(tags, bytes(side * side))
    path.write_bytes(content)
    processes, generator = [], random.Random(0)
    for work in ("shrink", "read"):
        processes.append(os.fork())
        if processes[-1]:
            continue
        try:
            while work == "shrink":
                os.truncate(path, 100)
                path.write_bytes(content)
                time.sleep(generator.uniform(0, 0.01))
            for _ in range(200):
                with suppress(OSError, ValueError):
                    read_image(path)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(processes[1], 0)[1])
    os.kill(processes[0], signal.SIGKILL)
    os.waitpid(processes[0], 0)
    assert status == 0
