# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from fixtures.segformer import tiny_detector
from PIL import Image
from transformers import pipeline

import diffusers_diffdoctor  # noqa: F401
from diffusers_diffdoctor import miniature
from diffusers_diffdoctor.detector import pipeline_artifact_detection
from diffusers_diffdoctor.detector.tiling import tile_starts, tiled_confidence


@pytest.fixture(scope="module")
def detect(tmp_path_factory):
    path = tmp_path_factory.mktemp("detector")
    tiny_detector().save_pretrained(path)  # no image processor beside it: none is needed
    return pipeline("artifact-detection", model=str(path))


@pytest.fixture
def picture(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    path = tmp_path / "picture.png"
    Image.fromarray(array).save(path)
    return path


def as_tensor(path):
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None] / 255


def test_figures_are_those_of_the_map(detect, picture):
    with torch.no_grad():
        expected = detect.model.confidence(as_tensor(picture))[0, 0]
    threshold = expected.median().item()
    found = detect(str(picture), threshold=threshold)
    assert found.keys() == {"artifact_map", "max_confidence", "area_ratio"}
    assert found["artifact_map"].mode == "L" and found["artifact_map"].size == (90, 70)
    assert np.abs(np.array(found["artifact_map"]) / 255 - expected.numpy()).max() < 0.5 / 255 + 1e-5
    assert found["max_confidence"] == pytest.approx(expected.max().item(), abs=1e-6)
    assert found["area_ratio"] == pytest.approx((expected >= threshold).float().mean().item())
    assert 0.4 < found["area_ratio"] < 0.6
    assert detect(str(picture), threshold=1.0)["area_ratio"] == 0


def test_all_kinds_of_input_agree(detect, picture):
    handler = partial(SimpleHTTPRequestHandler, directory=str(picture.parent))
    handler.log_message = lambda *args: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_port}"
        results = detect([str(picture), picture, Image.open(picture), f"{root}/{picture.name}"])
        with pytest.raises(OSError, match=r"Cannot read .*404"):
            detect(f"{root}/nothing.png")
        server.shutdown()
    single = detect(str(picture))
    assert isinstance(single, dict) and len(results) == 4
    for result in results:
        assert result["max_confidence"] == single["max_confidence"]
        assert result["artifact_map"].tobytes() == single["artifact_map"].tobytes()


def test_weights_stored_in_half_precision_run_on_a_cpu(detect, picture, tmp_path):
    tiny_detector().half().save_pretrained(tmp_path / "half")
    half = pipeline("artifact-detection", model=str(tmp_path / "half"), device="cpu")
    assert half.model.dtype == torch.float32
    rounded = tiny_detector().half().float()
    with torch.no_grad():
        expected = rounded.confidence(as_tensor(picture)).max().item()
    assert half(str(picture))["max_confidence"] == pytest.approx(expected, abs=1e-6)
    bundled = pipeline(
        "artifact-detection", model=str(miniature.load("detector")), device="cpu"
    )  # float16 in its file
    assert 0 <= bundled(str(picture))["max_confidence"] <= 1


def test_images_turn_as_exif_says(detect, picture):
    image = Image.open(picture)
    exif = Image.Exif()
    exif[0x0112] = 6  # was taken with the camera turned: shown rotated by 90 degrees clockwise
    image.save(picture.parent / "turned.png", exif=exif)
    turned = detect(str(picture.parent / "turned.png"))
    assert turned["artifact_map"].size == (70, 90)
    assert turned["max_confidence"] == detect(image.rotate(-90, expand=True))["max_confidence"]


def test_bad_input_is_named(detect, picture, monkeypatch):
    (picture.parent / "page.png").write_text("<html>")
    with pytest.raises(ValueError, match=r"page.png' is not an image"):
        detect(str(picture.parent / "page.png"))
    picture.with_suffix(".png.cut").write_bytes(picture.read_bytes()[:3000])
    with pytest.raises(OSError, match="truncated"):
        detect(str(picture.with_suffix(".png.cut")))
    Image.open(picture).save(picture.with_suffix(".gif"))  # a decoder that strangers' files shall not reach
    with pytest.raises(ValueError, match="formats PNG, JPEG"):
        detect(str(picture.with_suffix(".gif")))
    with pytest.raises(FileNotFoundError):
        detect("nowhere.png")
    with pytest.raises(TypeError, match="found int"):
        detect(3)
    for options, error, message in [
        ({"threshold": 2}, ValueError, "threshold must lie in"),
        ({"overlap": 8}, ValueError, "pass tile as well"),
        ({"tile": 32, "overlap": 32}, ValueError, "overlap lie in"),
        ({"tiles": 32}, TypeError, "Unknown options tiles"),
    ]:
        with pytest.raises(error, match=message):
            detect(str(picture), **options)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="too large to be opened safely"):
        detect(str(picture))


def test_other_models_are_refused():
    from transformers import SegformerForSemanticSegmentation

    native = SegformerForSemanticSegmentation(tiny_detector().config)
    with pytest.raises(TypeError, match="needs an artifact detector"):
        pipeline_artifact_detection.ArtifactDetectionPipeline(model=native)


@pytest.mark.parametrize(
    ("length", "tile", "overlap", "expected"),
    [(64, 64, 16, [0]), (10, 64, 16, [0]), (100, 64, 16, [0, 36]), (112, 64, 16, [0, 48]), (160, 64, 16, [0, 48, 96])],
)
def test_tiles_cover_the_image(length, tile, overlap, expected):
    assert tile_starts(length, tile, overlap) == expected


def test_tiles_by_hand(detect, picture):
    """70 x 90 in tiles of 64 with an overlap of 16: rows at 0 and 6, columns at 0 and 26."""
    model, images = detect.model, as_tensor(picture)
    with torch.no_grad():
        whole = model.confidence(images)[0, 0].double()
        parts = {(y, x): model.confidence(images[..., y : y + 64, x : x + 64])[0, 0] for y in (0, 6) for x in (0, 26)}
        found = tiled_confidence(model, images, tile=64, overlap=16)[0, 0]
    for y, x in [(0, 0), (69, 89), (3, 30), (35, 45), (6, 26), (63, 63), (40, 20)]:
        total = weights = 0.0
        for (top, left), part in parts.items():
            i, j = y - top, x - left
            if 0 <= i < 64 and 0 <= j < 64:
                weight = min(i + 1, 64 - i, 17) * min(j + 1, 64 - j, 17)
                total, weights = total + weight * part[i, j].item(), weights + weight
        assert found[y, x].item() == pytest.approx(max(whole[y, x].item(), total / weights), abs=1e-5)
    assert not torch.allclose(found.double(), whole, atol=1e-3)
    result = detect(str(picture), tile=64, overlap=16)
    assert result["max_confidence"] == pytest.approx(found.max().item(), abs=1e-5)


def test_tiles_show_what_is_small():
    """A detector of 32 pixels that sees only full white: the dot of a large image is grey to it, but not in a tile."""

    class Spot:
        def confidence(self, images):
            small = torch.nn.functional.interpolate(images, size=(32, 32), mode="area")
            return torch.nn.functional.interpolate((small.amin(1, keepdim=True) > 0.9).float(), size=images.shape[-2:])

    images = torch.zeros(2, 3, 128, 128)
    images[1, :, 40:44, 80:82] = 1
    assert Spot().confidence(images).max() == 0
    maps = tiled_confidence(Spot(), images, tile=32, batch_size=3)
    assert maps[0].max() == 0 and maps[1, 0, 40:44, 80:82].min() > 0.5
    assert torch.equal(maps, tiled_confidence(Spot(), images, tile=32, batch_size=100))
