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


@pytest.mark.skipif(not is_torchvision_available(), reason="needs torchvision")
def test_torchvision_backend_is_chosen():
    assert ArtifactDetectorImageProcessor().backend == "torchvision"


def test_torchvision_is_optional():
    assert is_torchvision_available() or ArtifactDetectorImageProcessor is ArtifactDetectorImageProcessorPil


def test_maps_become_labels():
    processor = ArtifactDetectorImageProcessor.for_detector(ArtifactDetectorConfig(image_size=64))
    artifact_map = np.zeros((128, 128), np.uint8)
    artifact_map[:64, 32:96] = 255
    artifact_map[64:] = 51
    batch = processor(
        [Image.fromarray(noise(128, 128))] * 2,
        artifact_maps=[Image.fromarray(artifact_map), artifact_map],
        return_tensors="pt",
    )
    labels = batch["labels"]
    assert labels.shape == (2, 1, 64, 64) and labels.is_floating_point() and torch.equal(labels[0], labels[1])
    assert labels[0, 0, 8, 32] == 1 and labels[0, 0, 8, 4] == 0
    assert labels[0, 0, 60, 4].item() == pytest.approx(0.2)
    with pytest.raises(ValueError, match="Artifact map 0 has the shape"):
        processor(Image.fromarray(noise(128, 128)), artifact_maps=Image.fromarray(artifact_map[:64]))
    with pytest.raises(ValueError, match="Got 2 images and 1 artifact maps"):
        processor([noise(64, 64)] * 2, artifact_maps=[artifact_map[:64, :64]])


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
