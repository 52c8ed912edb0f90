# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor diagnose` with a tiny detector of the real class, saved to a folder."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from diffdoctor import main
from diffusers_diffdoctor.cli.diagnose import load_detector
from diffusers_diffdoctor.detector import ArtifactDetectorConfig, ArtifactDetectorForSemanticSegmentation


TINY = {
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 8, 16, 16],
    "decoder_hidden_size": 16,
    "num_attention_heads": [1, 1, 2, 2],
}


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector")
    torch.manual_seed(0)
    model = ArtifactDetectorForSemanticSegmentation(ArtifactDetectorConfig(**TINY, image_size=64)).eval()
    with torch.no_grad():  # a fresh head says 0.5 everywhere; this one has opinions
        model.decode_head.classifier.weight.mul_(30)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(7):
        size = (64, 64) if index < 5 else (96, 64)
        coarse = generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    (folder / "bad.jpg").write_bytes(b"\xff\xd8\xff not much of a JPEG")
    return folder


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def command(images, output, detector, *options):
    return ["diagnose", str(images), "--output", str(output), "--detector", str(detector), "--device", "cpu", *options]


def test_what_the_model_says_is_what_is_written(images, tmp_path, detector, capsys):
    assert main(command(images, tmp_path / "out", detector, "--top-k", "2", "--threshold", "0.6")) == 0
    model = ArtifactDetectorForSemanticSegmentation.from_pretrained(detector).eval()
    expected = {}
    for path in sorted(images.glob("*.png")):
        image = torch.tensor(np.array(Image.open(path))).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            expected[path.name] = model.confidence(image)
    table = {os.path.basename(row["path"]): row for row in rows(tmp_path / "out/diagnosis.jsonl")}
    assert list(table) == list(expected)
    for name, row in table.items():
        assert row["max_confidence"] == pytest.approx(expected[name].max().item(), abs=1e-5)
        assert row["area_ratio"] == pytest.approx((expected[name] >= 0.6).float().mean().item(), abs=1e-3)
        assert row["artifact"] == (expected[name].max().item() >= 0.6)
    worst = {name: maps.max().item() for name, maps in expected.items()}
    assert len({round(value, 3) for value in worst.values()}) > 3
    cleanest = sorted(worst, key=worst.get)[:2]
    assert [os.path.basename(row["path"]) for row in rows(tmp_path / "out/best.jsonl")] == cleanest
    printed = capsys.readouterr().out
    assert "8 found = 7 diagnosed + 1 quarantined + 0 skipped\n" in printed
    assert printed.index(cleanest[0]) < printed.index(cleanest[1]) < printed.index("report.html")


def test_batches_change_nothing(images, tmp_path, detector):
    for size in ("1", "4"):
        assert main(command(images, tmp_path / size, detector, "--batch-size", size)) == 0
    for one, four in zip(rows(tmp_path / "1/diagnosis.jsonl"), rows(tmp_path / "4/diagnosis.jsonl")):
        assert one["path"] == four["path"]
        assert one["max_confidence"] == pytest.approx(four["max_confidence"], abs=1e-5)


def test_a_killed_run_goes_on(images, tmp_path, detector):
    """SIGKILL in the middle, then the same command: nothing is lost, nothing is done twice."""
    picture = (images / "0.png").read_bytes()
    for index in range(200):
        (images / f"more{index:03}.png").write_bytes(picture)
    argv = command(images, tmp_path / "out", detector, "--batch-size", "1")
    code = f"import torch; torch.set_num_threads(1); from diffdoctor import main; main({argv})"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal, deadline = tmp_path / "out/diagnosis.jsonl", time.monotonic() + 120
    while not journal.exists() or journal.read_bytes().count(b"\n") < 20:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {row["path"]: row for row in map(json.loads, journal.read_text().splitlines(keepends=True)[:-1])}
    assert 19 <= len(done) < 207
    times = {path: os.stat(tmp_path / "out" / row["overlay"]).st_mtime_ns for path, row in done.items()}
    assert main(argv) == 0
    table = {row["path"]: row for row in rows(journal)}
    assert len(table) == 207
    assert len(rows(tmp_path / "out/quarantine.jsonl")) == 1
    for path, row in done.items():
        assert table[path] == row
        assert os.stat(tmp_path / "out" / row["overlay"]).st_mtime_ns == times[path]


def test_changed_settings_are_said(images, tmp_path, detector, capsys):
    assert main(command(images, tmp_path / "out", detector)) == 0
    assert main(command(images, tmp_path / "out", detector, "--threshold", "0.4")) == 1
    assert "threshold was 0.5, now 0.4" in capsys.readouterr().err
    assert main(command(images, tmp_path / "out", detector, "--threshold", "0.4", "--restart")) == 0


def test_retrained_weights_at_the_same_place_are_another_detector(images, tmp_path, detector, capsys):
    model = ArtifactDetectorForSemanticSegmentation.from_pretrained(detector)
    model.save_pretrained(tmp_path / "detector")
    assert main(command(images, tmp_path / "out", tmp_path / "detector")) == 0
    with torch.no_grad():
        model.decode_head.classifier.bias.add_(1)
    model.save_pretrained(tmp_path / "detector")
    assert main(command(images, tmp_path / "out", tmp_path / "detector")) == 1
    assert "weights_sha256" in capsys.readouterr().err


def test_strict_fails_if_an_image_may_have_been_missed(images, tmp_path, detector, capsys):
    def status(*options):
        return main(command(images, tmp_path / "out", detector, *options))

    (images / "notes.txt").write_text("")
    (images / "again").symlink_to(images)
    assert status() == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "10 found = 7 diagnosed + 1 quarantined + 2 skipped"
    skipped = "Skipped: name that is no image's: 1, folder that is searched already, under another name: 1"
    assert printed[1] == skipped
    assert status("--strict") == 1
    assert "--strict: 1 that are or may hide images were not read" in capsys.readouterr().err
    (images / "bad.jpg").unlink()
    assert status("--strict") == 0
    for name, make in (
        ("moving.gif", os.mknod),
        ("pipe", os.mkfifo),
        ("nowhere", lambda path: path.symlink_to("missing")),
    ):
        make(images / name)
        assert (status(), status("--strict")) == (0, 1)
        (images / name).unlink()
    assert status("--strict") == 0


def test_names_do_not_command_the_terminal(images, tmp_path, detector, capsys):
    for path in images.glob("?.png"):
        path.rename(images / os.fsdecode(f"{path.stem}\x1b[2J\n".encode() + b"\xff\xe9.png"))
    assert main(command(images, tmp_path / "out", detector, "--top-k", "7")) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and printed.count(r"\x1b[2J\n\udcff\udce9.png" + "\n") == 7
    printed.encode()  # as a terminal does


def test_nothing_diagnosed_is_a_failure(tmp_path, detector):
    (tmp_path / "only.png").write_bytes(b"")
    assert main(command(tmp_path / "only.png", tmp_path / "out", detector)) == 1
    assert len(rows(tmp_path / "out/quarantine.jsonl")) == 1
    assert (tmp_path / "out/report.html").exists()


def test_a_path_is_checked_before_a_detector_is_loaded(tmp_path, capsys):
    assert main(command(tmp_path / "nowhere", tmp_path / "out", tmp_path / "no-detector")) == 1
    assert "nowhere is neither a file nor a folder" in capsys.readouterr().err


def test_other_models_are_refused(images, tmp_path, capsys):
    SegformerForSemanticSegmentation(SegformerConfig(**TINY)).save_pretrained(tmp_path / "segformer")
    assert main(command(images, tmp_path / "out", tmp_path / "segformer")) == 1
    assert "is not an artifact detector: its model type is 'segformer'" in capsys.readouterr().err
    assert main(command(images, tmp_path / "out", tmp_path / "nothing")) == 1
    error = capsys.readouterr().err
    assert "is no folder here, and no id of the Hub either" in error and "convert-detector" in error
    assert not (tmp_path / "out").exists()


def test_the_device_is_checked(detector):
    assert next(load_detector(str(detector), "cpu").parameters()).device.type == "cpu"
    with pytest.raises(ValueError, match="--device nonsense"):
        load_detector(str(detector), "nonsense")


def test_a_detector_saved_in_half_precision_diagnoses_in_float32(tmp_path):
    ArtifactDetectorForSemanticSegmentation(ArtifactDetectorConfig(**TINY)).half().save_pretrained(tmp_path)
    assert ArtifactDetectorForSemanticSegmentation.from_pretrained(tmp_path).dtype == torch.float16
    assert load_detector(str(tmp_path), "cpu").dtype == torch.float32
