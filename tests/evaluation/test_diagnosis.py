# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Diagnosing files: what comes out for what went in, with a detector whose answer is known."""

import csv
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_diffdoctor.evaluation import diagnose_images
from diffusers_diffdoctor.files import SEARCHED_ALREADY, FolderInUse, find_images, only_run


class RedDetector(torch.nn.Module):
    """The confidence of a pixel is its red channel times `weight`. Stopped after `fuse` images."""

    def __init__(self, weight=1.0, fuse=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight))
        self.config = SimpleNamespace(image_size=32)
        self.seen, self.shapes, self.fuse = 0, [], fuse

    def confidence(self, images):
        assert not torch.is_grad_enabled()
        if self.fuse is not None and self.seen + len(images) > self.fuse:
            raise KeyboardInterrupt
        self.seen += len(images)
        self.shapes.append(tuple(images.shape))
        return images[:, :1] * self.weight


def save(path, red, size=(16, 16)):
    """A black PNG with one pixel in eight of the given red, 0 to 255."""
    array = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    array.reshape(-1, 3)[::8, 0] = red
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


REDS = {"a": 51, "b": 255, "c": 0, "d": 204, "e": 102, "f": 153}


@pytest.fixture
def folder(tmp_path):
    """Six good images in two folders and two sizes, three bad files, and a text that is none of our business."""
    folder = tmp_path / "images"
    for index, (name, red) in enumerate(REDS.items()):
        save(folder / ("deep/er" if index % 2 else ".") / f"{name}.png", red, size=(16, 16) if index < 4 else (24, 16))
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("not an image")
    whole = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "readme.txt").write_text("hello")
    return folder


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def diagnose(folder, output, detector=None, **options):
    options.setdefault("show_progress", False)
    return diagnose_images([folder], output, detector or RedDetector(), detector_name="red", **options)


def test_rows_in_are_rows_out_and_quarantined(folder, tmp_path):
    result = diagnose(folder, tmp_path / "out")
    counts = [result[name] for name in ("found", "diagnosed", "quarantined", "skipped", "unread")]
    assert counts == [10, 6, 3, 1, 3]
    table = {os.path.basename(row["path"])[0]: row for row in rows(tmp_path / "out/diagnosis.jsonl")}
    assert {name: row["max_confidence"] for name, row in table.items()} == {
        name: pytest.approx(red / 255, abs=1e-5) for name, red in REDS.items()
    }
    assert {name for name, row in table.items() if row["artifact"]} == {"b", "d", "f"}
    assert result["artifacts"] == 3
    assert {name: row["area_ratio"] for name, row in table.items()} == {
        name: 0.125 if red >= 128 else 0 for name, red in REDS.items()
    }
    assert (table["e"]["width"], table["e"]["height"]) == (24, 16)
    for row in table.values():
        overlay = Image.open(tmp_path / "out" / row["overlay"])
        assert overlay.size == (row["width"], row["height"])
    bad = rows(tmp_path / "out/quarantine.jsonl")
    assert [os.path.basename(row["path"]) for row in bad] == ["cut.png", "empty.png", "text.jpg"]
    assert all(row["reason"] for row in bad)
    (skipped,) = rows(tmp_path / "out/skipped.jsonl")
    assert skipped == {"path": str(folder / "readme.txt"), "reason": "name that is no image's"}
    assert result["skipped_reasons"] == {skipped["reason"]: 1}
    assert not [name for name in os.listdir(tmp_path / "out") if "unfinished" in name]


def test_best_of_n(folder, tmp_path):
    result = diagnose(folder, tmp_path / "out", top_k=3)
    best = rows(tmp_path / "out/best.jsonl")
    assert [os.path.basename(row["path"]) for row in best] == ["c.png", "a.png", "e.png"]
    assert [row["rank"] for row in best] == [1, 2, 3]
    assert result["best"] == best
    assert len(diagnose(folder, tmp_path / "out", top_k=50)["best"]) == 6
    diagnose(folder, tmp_path / "out")
    assert not (tmp_path / "out/best.jsonl").exists()  # nothing old is left to be mistaken for new


def test_batches_are_of_one_size_and_change_nothing(folder, tmp_path):
    alone, together = RedDetector(0.7), RedDetector(0.7)
    diagnose(folder, tmp_path / "one", alone, batch_size=1)
    diagnose(folder, tmp_path / "many", together, batch_size=3)
    assert {shape[0] for shape in alone.shapes} == {1}
    assert sorted(together.shapes) == [(1, 3, 16, 16), (2, 3, 16, 24), (3, 3, 16, 16)]
    assert rows(tmp_path / "one/diagnosis.jsonl") == rows(tmp_path / "many/diagnosis.jsonl")


def test_an_image_that_the_detector_refuses_is_set_aside(folder, tmp_path):
    class Picky(RedDetector):
        def confidence(self, images):
            if images.shape[-1] > 2 * images.shape[-2]:
                raise ValueError("one side is too long")
            return super().confidence(images)

    save(folder / "strip1.png", 9, size=(40, 8))
    save(folder / "strip2.png", 9, size=(40, 8))
    result = diagnose(folder, tmp_path / "out", Picky(), batch_size=2)
    assert (result["found"], result["diagnosed"], result["quarantined"]) == (12, 6, 5)
    bad = {os.path.basename(row["path"]): row["reason"] for row in rows(tmp_path / "out/quarantine.jsonl")}
    assert bad["strip1.png"] == bad["strip2.png"] == "ValueError: one side is too long"


def test_memory_is_bounded_by_pixels(folder, tmp_path, monkeypatch):
    from diffusers_diffdoctor.evaluation import diagnosis

    monkeypatch.setattr(diagnosis, "BATCH_PIXELS", 2 * 16 * 16)
    detector = RedDetector()
    diagnose(folder, tmp_path / "batch", detector)
    assert max(shape[0] * shape[2] * shape[3] for shape in detector.shapes) <= 2 * 16 * 16
    monkeypatch.setattr(diagnosis, "WAITING_PIXELS", 0)
    detector = RedDetector()
    diagnose(folder, tmp_path / "waiting", detector)
    assert {shape[0] for shape in detector.shapes} == {1}


def test_batches_that_do_not_fit_into_memory_are_halved(folder, tmp_path):
    class Small(RedDetector):
        """Room for one image of 16 x 16 pixels and for none of 24 x 16."""

        def confidence(self, images):
            if len(images) > 1 or images.shape[-1] > 16:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().confidence(images)

    detector = Small()
    result = diagnose(folder, tmp_path / "out", detector, batch_size=4)
    assert detector.shapes == [(1, 3, 16, 16)] * 4
    assert (result["found"], result["diagnosed"], result["quarantined"]) == (10, 4, 5)
    bad = {os.path.basename(row["path"]): row["reason"] for row in rows(tmp_path / "out/quarantine.jsonl")}
    assert bad["e.png"] == bad["f.png"] == "OutOfMemoryError: CUDA out of memory"
    result = diagnose(folder, tmp_path / "out")  # elsewhere there is room: tried again, and the others kept
    assert (result["resumed"], result["diagnosed"]) == (4, 6)


def test_an_interrupted_run_goes_on(folder, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        diagnose(folder, tmp_path / "out", RedDetector(fuse=2), batch_size=1)
    journal = tmp_path / "out/diagnosis.jsonl"
    assert len(rows(journal)) == 2
    with open(journal, "a", encoding="utf-8") as file:
        file.write('{"path": "/half a li')
    detector = RedDetector()
    result = diagnose(folder, tmp_path / "out", detector, batch_size=4)
    assert detector.seen == 4
    assert (result["resumed"], result["diagnosed"], result["quarantined"]) == (2, 6, 3)
    diagnose(folder, tmp_path / "fresh")
    assert rows(journal) == rows(tmp_path / "fresh/diagnosis.jsonl")
    html = [(tmp_path / name / "report.html").read_text(encoding="utf-8") for name in ("out", "fresh")]
    assert html[0] == html[1]


def test_damaged_lines_of_the_journal_are_counted_and_cost_their_images_only(folder, tmp_path):
    out = tmp_path / "out"
    diagnose(folder, out)
    whole = (out / "diagnosis.jsonl").read_bytes()
    lines = whole.splitlines()
    first = json.loads(lines[0])
    damaged = [
        lines[0][:40],  # cut
        b"",
        bytes(4096),
        b"\xff\xfe not UTF-8",
        b"[1, 2]",
        b"[" * 100_000,
        json.dumps(first | {"max_confidence": float("nan")}).encode(),
        json.dumps(first | {"max_confidence": 7.0}).encode(),
        json.dumps(first | {"bytes": "many"}).encode(),
        json.dumps(first | {"path": "\ud800"}).encode(),
        json.dumps({"path": first["path"]}).encode(),
    ]
    (out / "diagnosis.jsonl").write_bytes(b"\n".join(damaged + lines[1:3] + [lines[3][:-1]] + lines[4:]))
    detector = RedDetector()
    result = diagnose(folder, out, detector)
    assert (result["damaged_lines"], result["resumed"], detector.seen) == (len(damaged) + 1, 4, 2)
    assert (out / "diagnosis.jsonl").read_bytes() == whole
    assert diagnose(folder, out)["damaged_lines"] == 0
    for content in (b"", b"[]", b"\xff", b"{"):
        (out / "settings.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"detector was unknown, now red.*restart"):
            diagnose(folder, out)


def test_a_journal_leads_nowhere_outside_of_its_folder(folder, tmp_path):
    """Paths in it are not believed, whether the images leave the report or not."""
    out, precious = tmp_path / "out", tmp_path / "precious.jpg"
    precious.write_bytes(b"precious")
    diagnose(folder, out)
    before = (out / "diagnosis.jsonl").read_bytes()
    row = json.loads(before.splitlines()[0])
    strange = [str(precious), "../../precious.jpg", "..", "", "/", "a\0b", "x" * 5000, row["overlay"]]
    evil = [row | {"overlay": text} for text in strange] + [row | {"path": text} for text in strange]
    evil.append(row | {"path": str(tmp_path / "gone.png")})  # whose overlay would be that of an image that is there
    (out / "diagnosis.jsonl").write_bytes(before + "".join(json.dumps(row) + "\n" for row in evil).encode())
    result = diagnose(folder, out)
    assert (result["diagnosed"], result["damaged_lines"]) == (6, 0)
    assert (out / "diagnosis.jsonl").read_bytes() == before
    (out / "diagnosis.jsonl").write_bytes(before + "".join(json.dumps(row) + "\n" for row in evil).encode())
    diagnose(folder, out, restart=True)
    assert precious.read_bytes() == b"precious" and len(os.listdir(out / "overlays")) == 6
    assert len(os.listdir(out / "report_files")) == 12


def test_a_file_that_changes_while_it_is_read_is_set_aside(folder, tmp_path):
    save(folder / "large.png", 9, size=(1500, 1500))
    done = threading.Event()

    def touch():
        while not done.is_set():
            os.utime(folder / "large.png")

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        result = diagnose(folder, tmp_path / "out")
    finally:
        done.set()
        thread.join()
    assert (result["diagnosed"], result["quarantined"]) == (6, 4)
    reasons = {os.path.basename(row["path"]): row["reason"] for row in rows(tmp_path / "out/quarantine.jsonl")}
    assert "changed while it was read" in reasons["large.png"]
    assert diagnose(folder, tmp_path / "out")["diagnosed"] == 7


def test_images_that_vanish_after_they_were_read_stay_in_the_report(folder, tmp_path):
    class Vanishing(RedDetector):
        def confidence(self, images):
            (folder / "a.png").unlink(missing_ok=True)
            return super().confidence(images)

    result = diagnose(folder, tmp_path / "out", Vanishing(), batch_size=8)
    assert (result["found"], result["diagnosed"], result["quarantined"], result["skipped"]) == (10, 6, 3, 1)
    assert "a.png" in (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert diagnose(folder, tmp_path / "out")["dropped"] == 1


def test_a_folder_that_another_process_writes_to_is_refused(folder, tmp_path):
    out = tmp_path / "out"
    (ready, tell), (wait, go_on) = os.pipe(), os.pipe()
    other = os.fork()
    if not other:
        try:
            with only_run(out):
                os.write(tell, b"!")
                os.read(wait, 1)
        finally:
            os._exit(0)
    try:
        assert os.read(ready, 1)
        with pytest.raises(FolderInUse, match=rf"in use by process {other} on"):
            diagnose(folder, out)
        assert not (out / "settings.json").exists()
    finally:
        os.write(go_on, b"!")
        os.waitpid(other, 0)
        for end in (ready, tell, wait, go_on):
            os.close(end)
    assert diagnose(folder, out)["diagnosed"] == 6


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0 or sys.platform != "linux", reason="mounts a tiny disk")
def test_a_full_disk_is_named_and_costs_nothing_that_was_done(folder, tmp_path):
    for index in range(20):
        save(folder / f"more {index}.png", index)
    out = tmp_path / "small disk"
    out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "none", out], capture_output=True).returncode:
        pytest.skip("no right to mount")
    try:
        done = 0
        for size in (40, 60, 80, 1000):  # a little more room each time
            subprocess.run(["mount", "-o", f"remount,size={size}k", out], check=True)
            try:
                result = diagnose(folder, out, batch_size=1)
            except OSError as error:
                assert re.search(
                    r"small disk cannot be written .*MB are free.* run the same command again", str(error)
                )
                lines = (out / "diagnosis.jsonl").read_bytes().count(b"\n")
                assert lines > done
                done = lines
        assert (result["diagnosed"], result["resumed"]) == (26, done) and 0 < done < 26
    finally:
        subprocess.run(["umount", out], check=True)


def test_leftovers_of_killed_writers_are_no_harm(folder, tmp_path):
    """Nor do images that are named like them."""
    for name in ("_partial-x.png", ".a.unfinished.png", ".diagnosis.jsonl.unfinished.png", "-.png", "..x.png"):
        save(folder / name, 10)
    (folder / ".b.png.unfinished").mkdir()
    save(folder / ".b.png.unfinished/b.png", 10)
    for output in (tmp_path / "out", folder):
        diagnose(folder, output)
        (output / ".diagnosis.jsonl.unfinished").mkdir()
        (output / ".diagnosis.jsonl.unfinished/diagnosis.jsonl").write_text("half")
        result = diagnose(folder, output)
        assert (result["found"], result["diagnosed"], result["quarantined"]) == (16, 12, 3)
        assert not (output / ".diagnosis.jsonl.unfinished").exists()
        assert len(os.listdir(output / "overlays")) == 12 and len(os.listdir(output / "report_files")) == 24


def test_overlays_are_the_same_in_bands(tmp_path, monkeypatch):
    from diffusers_diffdoctor.evaluation import diagnosis

    array = np.random.default_rng(0).integers(0, 256, (50, 33, 3), dtype=np.uint8)
    confidence = torch.rand(1, 50, 33, generator=torch.Generator().manual_seed(0))
    at_once = np.asarray(diagnosis._heatmap(array, confidence))
    for pixels in (1, 3 * 33, 1000):
        monkeypatch.setattr(diagnosis, "BAND_PIXELS", pixels)
        assert np.array_equal(np.asarray(diagnosis._heatmap(array, confidence)), at_once)


def test_only_what_changed_is_diagnosed_again(folder, tmp_path):
    out = tmp_path / "out"
    diagnose(folder, out)
    save(folder / "c.png", 250)
    save(folder / "new.png", 30)
    (out / rows(out / "diagnosis.jsonl")[0]["overlay"]).unlink()  # a.png
    next((out / "report_files").glob("e-*.image.webp")).unlink()
    (folder / "deep/er/b.png").unlink()
    detector = RedDetector()
    result = diagnose(folder, out, detector)
    assert detector.seen == 4
    assert (result["resumed"], result["dropped"], result["diagnosed"]) == (4 - 2, 1, 6)
    table = rows(out / "diagnosis.jsonl")
    assert [os.path.basename(row["path"]) for row in table] == ["a.png", "c.png", "e.png", "new.png", "d.png", "f.png"]
    assert table[1]["max_confidence"] == pytest.approx(250 / 255, abs=1e-5)
    assert len(os.listdir(out / "overlays")) == 6 and len(os.listdir(out / "report_files")) == 12


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"threshold": 0.3}, "threshold was 0.5, now 0.3"),
        ({"tile": True}, "tile"),
        ({"detector": RedDetector(0.9)}, "sha256"),
    ],
)
def test_other_settings_are_not_mixed_in(folder, tmp_path, change, word):
    diagnose(folder, tmp_path / "out")
    before = (tmp_path / "out/diagnosis.jsonl").read_bytes()
    with pytest.raises(ValueError, match=rf"{word}.*restart"):
        diagnose(folder, tmp_path / "out", **change)
    assert (tmp_path / "out/diagnosis.jsonl").read_bytes() == before
    result = diagnose(folder, tmp_path / "out", **change, restart=True)
    assert (result["resumed"], result["diagnosed"]) == (0, 6)


def test_report_is_ranked_and_has_its_pictures_beside_it(folder, tmp_path):
    out = tmp_path / "out"
    diagnose(folder, out, top_k=2)
    html = (out / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'class="title">(\w)\.png', html) == ["b", "d", "f", "e", "a", "c"] + [
        "c",
        "a",
    ]  # clean ones too
    assert re.findall(r'data-verdict="(\w+)"', html) == ["artifact"] * 3 + ["clean"] * 5
    assert re.findall(r'data-category="([^"]+)"', html)[:6] == ["deep/er", "deep/er", "deep/er", ".", ".", "."]
    pictures = re.findall(
        r'<a href="([^"]+)"><img src="([^"]+)" width="(\d+)" height="(\d+)"[^>]* loading="lazy"', html
    )
    assert len(pictures) == html.count("<img") == 16
    for full, thumbnail, *size in pictures:
        assert (out / full).is_file()
        with Image.open(out / thumbnail) as image:
            assert image.format == "WEBP" and list(image.size) == [int(side) for side in size]
    with Image.open(out / pictures[0][1]) as image:  # as it is, and magenta where the detector was sure
        assert image.convert("RGB").getpixel((0, 0)) == (255, 0, 0)
    with Image.open(out / pictures[1][1]) as image:
        red, green, blue = image.convert("RGB").getpixel((0, 0))
        assert red > blue > green
    links = set(re.findall(r"""(?:src|href)=["']([^#"'][^"']*)""", html))
    assert {link.split("/")[0] for link in links if "." not in link.split("/")[0]} == {"overlays", "report_files"}
    assert not re.search(r"""url\(|@import|<link|https?:""", html)
    assert "text.jpg" in html and "3 (50.0 %)" in html
    assert "10 files found = 6 diagnosed + 3 quarantined + 1 skipped" in html
    assert re.search(r"name that is no image&#39;s</t.>\s*<td[^>]*>1</td>", html)
    assert sorted(os.listdir(out / "report_files")) == sorted({Path(thumbnail).name for _, thumbnail, *_ in pictures})
    diagnose(folder, out, report_images=4)
    html = (out / "report.html").read_text(encoding="utf-8")
    assert html.count('class="card"') == 4 and "The worst 4 of 6 images" in html and 'href="diagnosis.csv"' in html


def test_large_images_have_small_thumbnails_and_strips_too(tmp_path):
    save(tmp_path / "in/large.png", 200, size=(1000, 500))
    save(tmp_path / "in/strip.png", 200, size=(2, 900))
    diagnose(tmp_path / "in", tmp_path / "out")
    sizes = {}
    for path in (tmp_path / "out/report_files").iterdir():
        with Image.open(path) as image:
            sizes[path.name[:5], path.suffixes[0]] = image.size
        assert path.stat().st_size < 20_000
    assert sizes == {
        (name, kind): size
        for name, size in (("large", (320, 160)), ("strip", (1, 320)))
        for kind in (".image", ".overlay")
    }


def test_tables_are_written_for_spreadsheets_too(folder, tmp_path):
    out = tmp_path / "out"
    diagnose(folder, out, top_k=2)
    for name in ("diagnosis", "best", "quarantine", "skipped"):
        told = rows(out / f"{name}.jsonl")
        with open(out / f"{name}.csv", encoding="utf-8", newline="") as file:
            table = list(csv.DictReader(file))
        assert table == [{key: str(value) for key, value in row.items()} for row in told] and table
    diagnose(folder, out)
    assert not (out / "best.csv").exists()


def test_its_own_output_is_not_searched(folder):
    first = diagnose(folder, folder / "out")
    again = diagnose(folder, folder / "out")
    assert first["found"] == again["found"] == 10
    # where it is searched itself, what it writes there is passed over; and out/ is then a folder like any
    first, again = diagnose(folder, folder), diagnose(folder, folder)
    files, pictures = len(os.listdir(folder / "out")) - 2, 3 * 6
    assert first["found"] == again["found"] == 10 + files + pictures
    assert first["diagnosed"] == again["diagnosed"] == again["resumed"] == 6 + pictures
    os.symlink(folder, folder / "loop")
    os.symlink(folder / "out", folder / "other name")
    looped = diagnose(folder, folder / "out")
    assert looped["found"] - 1 == 10 + 3 * (6 + pictures) + files and looped["skipped_reasons"][SEARCHED_ALREADY] == 1


def test_a_file_counts_once(folder):
    found = find_images([folder, folder / "a.png", folder / "deep/../a.png", folder / "deep", folder / "readme.txt"])
    assert (
        len(found.images) == len(set(found.images)) == 10 == len(found)
    )  # a file that is named is taken whatever its name


def test_names_that_are_not_unicode(tmp_path):
    name = os.fsdecode(b"caf\xe9 <b>.png")
    try:
        save(tmp_path / "in" / "x.png", 255)
        os.rename(tmp_path / "in" / "x.png", tmp_path / "in" / name)
    except OSError:
        pytest.skip("this file system has Unicode names only")
    assert diagnose(tmp_path / "in", tmp_path / "out")["diagnosed"] == 1
    assert diagnose(tmp_path / "in", tmp_path / "out")["resumed"] == 1
    assert rows(tmp_path / "out/diagnosis.jsonl")[0]["path"].endswith(name)
    assert "<b>" not in (tmp_path / "out/report.html").read_text(encoding="utf-8")


def test_wrong_use_is_said_clearly(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="nowhere is neither a file nor a folder"):
        diagnose(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ValueError, match=r"No image found in .*empty"):
        diagnose(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ValueError, match="No path was given"):
        find_images([])
    with pytest.raises(OSError, match=r"output folder .* cannot be written"):
        diagnose(folder, tmp_path / "file" / "out")
    for options, message in (
        ({"threshold": 0.0}, "threshold"),
        ({"batch_size": 0}, "batch_size"),
        ({"top_k": -1}, "top_k"),
        ({"report_images": -1}, "report_images"),
    ):
        with pytest.raises(ValueError, match=f"`{message}`"):
            diagnose(folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_tiles_find_more(tmp_path):
    save(tmp_path / "in/large.png", 255, size=(64, 48))
    detector = RedDetector()
    diagnose(tmp_path / "in", tmp_path / "out", detector, tile=True)
    assert detector.shapes[0] == (1, 3, 48, 64)
    assert detector.shapes[1:] == [(6, 3, 32, 32)]  # 3 x 2 tiles, in one call
