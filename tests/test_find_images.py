# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What a search comes upon: images to be read, and all else with the rule by which it is skipped. Files read without waiting."""

import os
import subprocess
import threading
from collections import Counter

import pytest

from diffusers_diffdoctor.files import NO_IMAGE_NAME, SEARCHED_ALREADY, find_images, read_regular_file


pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes and links are needed")


def test_excluded_folders_are_not_searched(tmp_path):
    for name in ("b.TIF", "a.png", "out/c.png", "deep/out/d.jpg", "note.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = find_images([tmp_path], excluded=[tmp_path / "out"])
    assert [str(path.relative_to(tmp_path)) for path in found.images] == ["a.png", "b.TIF", "deep/out/d.jpg"]
    assert found.skipped == [(tmp_path / "note.txt", NO_IMAGE_NAME)] and len(found) == 4


def relative(found, folder):
    return [str(path.relative_to(folder)) for path in found.images]


def test_linked_folders_are_read_last_and_each_folder_once(tmp_path):
    top = tmp_path / "top"
    for name in ("z/a.png", "b/c.png", "../outside/inner/d.png", "../outside/e.png"):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(b"")
    (top / "a link").symlink_to("../outside")
    (top / "b/back").symlink_to(top)
    (top / "b/link").symlink_to("../z")
    (tmp_path / "outside/inner/loop").symlink_to(tmp_path / "outside")
    (tmp_path / "outside/to top").symlink_to(top)
    found = find_images([top])
    assert relative(found, top) == ["b/c.png", "z/a.png", "a link/e.png", "a link/inner/d.png"]
    loops = {"b/back", "b/link", "a link/to top", "a link/inner/loop"}
    assert {str(path.relative_to(top)) for path, _ in found.skipped} == loops
    assert found.reasons() == {SEARCHED_ALREADY: 4} and not any(skipped.may_hide_images for skipped in found.skipped)
    # a real folder comes before a link to it, whichever is named first
    both = find_images([top, tmp_path / "outside"])
    assert set(both.images) - set(found.images) == {tmp_path / "outside/e.png", tmp_path / "outside/inner/d.png"}
    assert len(both.images) == 4 and len(set(both.images)) == 4


def test_hundreds_of_links_among_folders_end(tmp_path):
    """Each of 30 folders links to all: 30 ** depth paths."""
    for index in range(30):
        (tmp_path / f"{index:02}").mkdir()
        (tmp_path / f"{index:02}/image.png").write_bytes(b"")
        for other in range(30):
            (tmp_path / f"{index:02}/{other:02}").symlink_to(tmp_path / f"{other:02}")
    found = find_images([tmp_path])
    assert len(found.images) == 30 and found.reasons() == {SEARCHED_ALREADY: 900}


def test_deep_folders_are_searched_as_far_as_names_reach(tmp_path):
    """Deeper than Python recurses, and longer than a path may be."""

    def dig(name, times):
        there = os.open(tmp_path, os.O_RDONLY)
        for _ in range(times):
            os.mkdir(name, dir_fd=there)
            inner = os.open(name, os.O_RDONLY, dir_fd=there)
            os.close(there)
            there = inner
        os.close(os.open("image.png", os.O_CREAT, dir_fd=there))
        os.close(there)

    dig("d", 1200)
    dig("l" * 200, 30)
    try:
        found = find_images([tmp_path])
        assert relative(found, tmp_path) == ["d/" * 1200 + "image.png"]
        assert found.reasons() == {"folder that cannot be opened (File name too long)": 1}
    finally:
        subprocess.run(["rm", "-r", tmp_path / "d", tmp_path / ("l" * 200)], check=True)  # pytest would recurse


def test_named_paths(tmp_path):
    folder = tmp_path / "a/folder"
    folder.mkdir(parents=True)
    for name in ("image.png", "note.txt", "picture"):
        (folder / name).write_bytes(b"")
    os.mkfifo(folder / "pipe.png")
    (folder / "nowhere").symlink_to("missing")
    (tmp_path / "link").symlink_to(folder)
    found = find_images([folder / name for name in ("picture", "pipe.png", "nowhere", "note.txt", "picture")])
    assert relative(found, folder) == ["picture", "nowhere", "note.txt"]
    assert found.skipped == [(folder / "pipe.png", "named pipe")] and found.skipped[0].may_hide_images
    # named once more as a part of the folder, before or after
    for paths in ([folder, folder / "note.txt"], [folder / "note.txt", folder]):
        found = find_images(paths)
        assert sorted(relative(found, folder)) == ["image.png", "note.txt"]
        assert [path.name for path, _ in found.skipped] == ["nowhere", "picture", "pipe.png"]
    # `..` of a link is not the folder that the link lies in
    assert find_images([tmp_path / "link/../folder/image.png"]).images == [folder / "image.png"]
    with pytest.raises(FileNotFoundError, match=r"image\.png is neither a file nor a folder"):
        find_images([tmp_path / "link/../image.png"])
    with pytest.raises(ValueError, match=r"No image found in .*Skipped: named pipe: 1\."):
        find_images([folder / "pipe.png"])


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for path, kind in ((tmp_path / "pipe", "named pipe"), (tmp_path / "link", "named pipe"), (tmp_path, "folder")):
        with pytest.raises(ValueError, match=f"is a {kind}, not a file"):
            read_regular_file(path)
    with pytest.raises(ValueError, match="is a device, not a file"):
        read_regular_file("/dev/zero")
    (tmp_path / "file").write_bytes(b"12345")
    assert read_regular_file(tmp_path / "file", 5) == b"12345"
    with pytest.raises(ValueError, match=r"too large to be opened safely: 5 bytes, the limit is 4"):
        read_regular_file(tmp_path / "file", 4)


@pytest.mark.timeout(60)
def test_a_pipe_that_takes_the_place_of_a_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"content")
    outcomes, done = Counter(), threading.Event()

    def swap():
        while not done.is_set():
            for name in ("pipe", "file"):
                os.link(tmp_path / name, tmp_path / "other")
                os.replace(tmp_path / "other", tmp_path / "swapped")

    os.link(tmp_path / "file", tmp_path / "swapped")
    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for _ in range(5000):
            try:
                outcomes[read_regular_file(tmp_path / "swapped")] += 1
            except ValueError:
                outcomes["refused"] += 1
    finally:
        done.set()
        thread.join()
    assert set(outcomes) == {b"content", "refused"}
