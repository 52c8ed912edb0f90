# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Where torchvision is, its image processor is the public class, and it does what the one on PIL does.

`make test-torchvision` runs these (see `tests/beside_torchvision`).
"""

import numpy as np
import pytest
import torch
from fixtures.segformer import tiny_detector
from PIL import Image
from transformers import AutoImageProcessor

from diffusers_diffdoctor.detector import (
    ArtifactDetectorConfig,
    ArtifactDetectorImageProcessor,
    ArtifactDetectorImageProcessorPil,
)
from diffusers_diffdoctor.detector.modeling_artifact_detector import normalise_images


pytest.importorskip("torchvision")

CONFIG = ArtifactDetectorConfig(image_size=64, image_mean=[0.4, 0.5, 0.6], image_std=[0.3, 0.25, 0.224])
ROUNDING = 1.01 / 255 / 0.224  # one step of 8 bits, after the division by the smallest standard deviation


@pytest.fixture
def processors():
    return ArtifactDetectorImageProcessor.for_detector(CONFIG), ArtifactDetectorImageProcessorPil.for_detector(CONFIG)


def noise(height, width, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def test_it_is_the_public_class():
    assert ArtifactDetectorImageProcessor().backend == "torchvision"
    assert ArtifactDetectorImageProcessorPil().backend == "pil"


@pytest.mark.parametrize("size", [(64, 64), (40, 52), (200, 100), (128, 128), (65, 300)])
def test_both_processors_do_what_the_detector_does(processors, size):
    array = noise(*size)
    expected = normalise_images(torch.from_numpy(array).permute(2, 0, 1)[None] / 255, CONFIG)
    for processor in processors:
        found = processor(array, return_tensors="pt")["pixel_values"]
        assert found.shape == expected.shape and found.dtype == torch.float32
        assert (found - expected).abs().max() < ROUNDING


def kinds():
    array, rgba = noise(96, 72), noise(96, 72, 4)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    picture = Image.fromarray(array)
    return {
        "picture": picture,
        "array": array,
        "channels first": array.transpose(2, 0, 1),
        "tensor": tensor,
        "float array": array / 255,
        "float tensor": tensor / 255,
        "transparent picture": Image.fromarray(rgba),
        "transparent array": rgba,
        "transparent tensor": torch.from_numpy(rgba).permute(2, 0, 1) / 255,
        "gray": picture.convert("L"),
        "float picture": Image.fromarray(array[..., 0].astype(np.float32) / 255),
        "palette": picture.quantize(16),
        "CMYK": picture.convert("CMYK"),
    }


@pytest.mark.parametrize("kind", kinds())
def test_both_processors_read_the_same(processors, kind):
    image = kinds()[kind]
    with_torchvision, with_pil = (processor(image, return_tensors="pt")["pixel_values"] for processor in processors)
    assert with_torchvision.shape == with_pil.shape == (1, 3, 96, 64)
    # Alpha is composited with another rounding: a step more.
    assert (with_torchvision - with_pil).abs().max() < ROUNDING * (2 if "transparent" in kind else 1)


def test_batches_change_nothing(processors):
    images = [noise(64, 64), noise(96, 64), noise(64, 64)[::-1].copy()]
    for processor in processors:
        together = processor(images)["pixel_values"]
        for image, found in zip(images, together):
            assert torch.equal(torch.as_tensor(found), processor(image, return_tensors="pt")["pixel_values"][0])


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (noise(64, 64).astype(np.float32), ValueError, r"must lie in \[0, 1\], found values from 0 to 255"),
        (torch.full((3, 64, 64), 2.0), ValueError, "found values from 2 to 2"),
        (noise(64, 64).astype(np.int64), TypeError, "found int64"),
        (Image.fromarray(noise(64, 64)[..., 0].astype(np.uint16) * 257), TypeError, "found uint16"),
    ],
)
def test_both_processors_refuse_the_same(processors, image, error, message):
    for processor in processors:
        with pytest.raises(error, match=message):
            processor(image)
        with pytest.raises(ValueError, match="`do_rescale` must stay true"):
            processor(noise(64, 64) / 255, do_rescale=False)


def test_one_saves_and_the_other_loads(processors, tmp_path):
    image = noise(100, 150)
    for processor in processors:
        processor.save_pretrained(tmp_path)
        for backend, loaded_class in (
            ("torchvision", ArtifactDetectorImageProcessor),
            ("pil", ArtifactDetectorImageProcessorPil),
        ):
            loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
            assert type(loaded) is loaded_class
            expected = loaded_class.for_detector(CONFIG)(image, return_tensors="pt")["pixel_values"]
            assert torch.equal(loaded(image, return_tensors="pt")["pixel_values"], expected)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is ArtifactDetectorImageProcessor


def test_the_detector_says_the_same_after_both(processors):
    model = tiny_detector(image_mean=CONFIG.image_mean, image_std=CONFIG.image_std)
    array = noise(80, 120)
    with torch.no_grad():
        expected = model.confidence(torch.from_numpy(array).permute(2, 0, 1)[None] / 255)[0, 0]
        for processor in processors:
            outputs = model(**processor(array, return_tensors="pt"))
            (found,) = processor.post_process_artifact_detection(outputs, target_sizes=[(80, 120)])
            assert (found - expected).abs().max() < 0.01 < expected.std()
