# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
import torch
from fixtures.segformer import tiny_detector
from PIL import Image
from transformers import AutoImageProcessor
from transformers.utils import is_torchvision_available

from diffusers_diffdoctor.detector import (
    ArtifactDetectorConfig,
    ArtifactDetectorImageProcessor,
    ArtifactDetectorImageProcessorPil,
)
from diffusers_diffdoctor.detector.modeling_artifact_detector import normalise_images
from diffusers_diffdoctor.images import read_image


ROUNDING = 1.01 / 255 / 0.224  # one step of 8 bits, after the division by the smallest standard deviation

PROCESSORS = {ArtifactDetectorImageProcessorPil, ArtifactDetectorImageProcessor}


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("processor_class", sorted(PROCESSORS, key=lambda c: c.__name__))
@pytest.mark.parametrize("size", [(64, 64), (40, 52), (200, 100), (128, 128)])
def test_processor_agrees_with_confidence(processor_class, size):
    """Shrinking, enlarging, other aspect: noise shows every difference in filter, alignment or size."""
    config = ArtifactDetectorConfig(image_size=64, image_mean=[0.4, 0.5, 0.6], image_std=[0.3, 0.25, 0.224])
    array = noise(*size)
    expected = normalise_images(torch.from_numpy(array).permute(2, 0, 1)[None] / 255, config)
    processor = processor_class.for_detector(config)
    for image in (Image.fromarray(array), array):
        found = processor(image, return_tensors="pt")["pixel_values"]
        assert found.shape == expected.shape
        assert (found - expected).abs().max() < ROUNDING


def test_torchvision_is_optional():
    assert is_torchvision_available() or ArtifactDetectorImageProcessor is ArtifactDetectorImageProcessorPil


def test_all_kinds_of_input_are_the_same_image():
    processor = ArtifactDetectorImageProcessorPil.for_detector(ArtifactDetectorConfig(image_size=64))
    array = noise(64, 96)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    expected = processor(array, return_tensors="pt")["pixel_values"]
    for same in (Image.fromarray(array), tensor, array / 255, tensor / 255, (tensor / 255).double(), [array / 255]):
        assert torch.equal(processor(same, return_tensors="pt")["pixel_values"], expected)
    gray = Image.fromarray(array[..., 0])
    expected = processor(gray.convert("RGB"), return_tensors="pt")["pixel_values"]
    floats = Image.fromarray(array[..., 0].astype(np.float32) / 255)
    for same in (gray, floats, tensor[:1] / 255):
        assert torch.equal(processor(same, return_tensors="pt")["pixel_values"], expected)


def test_floats_are_rounded_to_the_nearest_level():
    processor = ArtifactDetectorImageProcessorPil.for_detector(ArtifactDetectorConfig(image_size=64))
    expected = processor(np.full((64, 64, 3), 128, np.uint8), return_tensors="pt")["pixel_values"]
    for same in (np.full((64, 64, 3), 127.6 / 255), torch.full((3, 64, 64), 127.6 / 255)):
        assert torch.equal(processor(same, return_tensors="pt")["pixel_values"], expected)


def test_transparent_parts_lie_on_white():
    processor = ArtifactDetectorImageProcessorPil.for_detector(ArtifactDetectorConfig(image_size=64))
    rgba = np.concatenate([noise(64, 96), np.full((64, 96, 1), 255, np.uint8)], axis=2)
    rgba[:, :40, 3] = 0
    expected = processor(read_image(rgba), return_tensors="pt")["pixel_values"]
    tensor = torch.from_numpy(rgba).permute(2, 0, 1)
    for same in (Image.fromarray(rgba), rgba, tensor, tensor / 255):
        assert torch.equal(processor(same, return_tensors="pt")["pixel_values"], expected)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (noise(64, 64).astype(np.float32), ValueError, r"must lie in \[0, 1\], found values from 0 to 255"),
        (torch.full((3, 64, 64), float("nan")), ValueError, "from nan to nan"),
        (noise(64, 64).astype(np.int64), TypeError, "found int64"),
        (Image.fromarray(noise(64, 64)[..., 0].astype(np.uint16) * 257), TypeError, "found uint16.*read_image"),
    ],
)
def test_other_ranges_are_refused(image, error, message):
    processor = ArtifactDetectorImageProcessorPil.for_detector(ArtifactDetectorConfig(image_size=64))
    with pytest.raises(error, match=message):
        processor(image)
    with pytest.raises(ValueError, match="`do_rescale` must stay true"):
        processor(noise(64, 64) / 255, do_rescale=False)


def test_post_processing_is_the_end_of_confidence():
    model = tiny_detector()
    processor = ArtifactDetectorImageProcessor.for_detector(model.config)
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        outputs = model(normalise_images(images, model.config))
        expected = model.confidence(images)
    maps = processor.post_process_artifact_detection(outputs, target_sizes=[(64, 96), (30, 40)])
    torch.testing.assert_close(maps[0], expected[0, 0])
    assert maps[1].shape == (30, 40)
    assert processor.post_process_artifact_detection(outputs)[0].shape == outputs.logits.shape[-2:]
    with pytest.raises(ValueError, match="Got 1 target_sizes for 2 maps"):
        processor.post_process_artifact_detection(outputs, target_sizes=[(64, 96)])


def test_saved_and_loaded(tmp_path):
    processor = ArtifactDetectorImageProcessor.for_detector(ArtifactDetectorConfig(image_size=96))
    processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is ArtifactDetectorImageProcessor and loaded.size["shortest_edge"] == 96
    image = noise(100, 150)
    assert torch.equal(*(one(image, return_tensors="pt")["pixel_values"] for one in (processor, loaded)))
    foreign = AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=True)  # ours, registered, is preferred
    assert type(foreign) is ArtifactDetectorImageProcessor
