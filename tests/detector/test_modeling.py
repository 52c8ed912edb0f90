# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fixtures.segformer import TINY, old_state_dict, tiny_detector
from safetensors.torch import save_file
from transformers import AutoModelForSemanticSegmentation, SegformerConfig, SegformerForSemanticSegmentation

from diffusers_diffdoctor.detector import ArtifactDetectorConfig, ArtifactDetectorForSemanticSegmentation
from diffusers_diffdoctor.detector.configuration_artifact_detector import detector_input_size


@pytest.fixture
def model():
    return tiny_detector()


def test_default_is_segformer_b5():
    with torch.device("meta"):
        model = ArtifactDetectorForSemanticSegmentation(ArtifactDetectorConfig())
        reference = SegformerForSemanticSegmentation(
            SegformerConfig(
                depths=[3, 6, 40, 3], hidden_sizes=[64, 128, 320, 512], decoder_hidden_size=768, num_labels=1
            )
        )
    assert model.num_parameters() == reference.num_parameters()
    assert round(model.num_parameters() / 1e6, 1) == 84.6
    assert model.state_dict().keys() == reference.state_dict().keys()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"image_size": 100}, "multiple of 32, got 100"),
        ({"image_size": 0}, "multiple of 32, got 0"),
        ({"image_mean": [0.5]}, "image_mean must have one number per channel"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std must be positive"),
    ],
)
def test_bad_configurations_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ArtifactDetectorConfig(**kwargs)


def test_two_channels_are_refused(tmp_path):
    with pytest.raises(ValueError, match="one output channel, this configuration has 2 labels"):
        ArtifactDetectorForSemanticSegmentation(ArtifactDetectorConfig(**TINY, num_labels=2))
    native = SegformerForSemanticSegmentation(
        SegformerConfig(**{k: v for k, v in TINY.items() if k != "image_size"}, num_labels=3)
    )
    native.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="one output channel, this configuration has 3 labels"):
        ArtifactDetectorForSemanticSegmentation.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (512, 512, (512, 512)),
        (1024, 768, (672, 512)),
        (64, 64, (512, 512)),
        (300, 1000, (512, 1696)),
        (1, 16, (512, 8192)),
    ],
)
def test_input_size(height, width, expected):
    assert detector_input_size(height, width, 512) == expected


def test_input_size_refuses_strips():
    with pytest.raises(ValueError, match="at most 16 times"):
        detector_input_size(10, 1000, 512)
    with pytest.raises(ValueError, match="at least 1"):
        detector_input_size(0, 10, 512)


def test_loss_is_the_squared_error_of_the_confidence(model):
    pixels, labels = torch.randn(2, 3, 64, 96), torch.rand(2, 1, 50, 70)
    outputs = model(pixels, labels=labels)
    assert outputs.logits.shape == (2, 1, 16, 24)
    up = F.interpolate(outputs.logits, size=(50, 70), mode="bilinear", align_corners=False)
    by_hand = sum(
        (1 / (1 + np.exp(-c)) - t) ** 2
        for c, t in zip(up.detach().double().flatten().tolist(), labels.flatten().tolist())
    )
    assert outputs.loss.item() == pytest.approx(by_hand / labels.numel(), rel=1e-5)
    assert model(pixels, labels=labels, return_dict=False)[0].item() == outputs.loss.item()
    wrong_range = [(255 * labels, ValueError), (labels - 2, ValueError), (labels * float("nan"), ValueError)]
    for bad, error in [(labels[:, 0], ValueError), (labels[:1], ValueError), (labels.byte(), TypeError), *wrong_range]:
        with pytest.raises(error, match="labels must"):
            model(pixels, labels=bad)


def test_confidence_step_by_step(model):
    """What confidence does, written out with the native network."""
    images = torch.rand(2, 3, 80, 128)
    native = SegformerForSemanticSegmentation(model.config).eval()
    native.load_state_dict(model.state_dict())
    small = F.interpolate(images, size=(64, 96), mode="bilinear", antialias=True)  # 102.4 -> 3 x 32
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    logits = native((small - mean.view(3, 1, 1)) / std.view(3, 1, 1)).logits
    expected = torch.sigmoid(F.interpolate(logits, size=(80, 128), mode="bilinear"))
    found = model.confidence(images)
    torch.testing.assert_close(found, expected)
    assert found.shape == (2, 1, 80, 128) and found.std() > 1e-3


def test_gradient_of_confidence_by_finite_differences():
    model = tiny_detector().double()
    images = torch.rand(1, 3, 40, 40, dtype=torch.float64) * 0.8 + 0.1  # is resized to 64
    images.requires_grad_()
    weights = torch.randn(1, 1, 40, 40, dtype=torch.float64)

    def value(x):
        return (model.confidence(x) * weights).sum()

    (gradient,) = torch.autograd.grad(value(images), images)
    for seed in range(3):
        direction = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        step = 1e-6
        with torch.no_grad():
            difference = (value(images + step * direction) - value(images - step * direction)) / (2 * step)
        assert difference.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-5)
        assert abs(difference.item()) > 1e-4


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (np.zeros((1, 3, 8, 8)), TypeError, "must be a torch tensor"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, "divide 8-bit by 255"),
        (torch.zeros(3, 8, 8), ValueError, r"shape \(B, 3, H, W\)"),
        (torch.zeros(0, 3, 8, 8), ValueError, "with B > 0"),
        (torch.zeros(1, 4, 8, 8), ValueError, r"shape \(B, 3, H, W\)"),
        (torch.full((1, 3, 8, 8), 255.0), ValueError, "divide 8-bit by 255"),
        (torch.linspace(-3.7, 3.6, 192).view(1, 3, 8, 8), ValueError, "undo their normalisation"),
        (torch.linspace(-1, 1, 192).view(1, 3, 8, 8), ValueError, r"images / 2 \+ 0.5"),
        (torch.full((1, 3, 8, 8), 1.01), ValueError, "clamp them"),
        (torch.full((1, 3, 8, 8), torch.nan), ValueError, "NaN"),
    ],
)
def test_bad_images_are_refused(model, images, error, message):
    with pytest.raises(error, match=message):
        model.confidence(images)
    assert model.confidence(torch.full((1, 3, 8, 8), 1.0005)).shape == (1, 1, 8, 8)  # rounding is forgiven


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(model, dtype):
    images = torch.rand(1, 3, 48, 48)
    expected = model.confidence(images)
    found = model.to(dtype).confidence(images.to(dtype).requires_grad_())
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 0.05
    assert torch.autograd.grad(found.sum(), model.decode_head.classifier.bias)[0].isfinite().all()


def test_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, info = ArtifactDetectorForSemanticSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(loaded.eval().confidence(images), model.confidence(images))
    assert "artifact-detection" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_keys_of_transformers_4_are_converted(model, tmp_path):
    """safetensors of the earlier names under our configuration: no weight may stay random."""
    model.save_pretrained(tmp_path)
    save_file(old_state_dict(model), tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = AutoModelForSemanticSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_folder_works_without_the_package(model, tmp_path):
    """A machine that has transformers alone: our package is hidden, the code in the folder does the work."""
    model.save_pretrained(tmp_path / "detector")
    images = torch.rand(1, 3, 40, 64)
    torch.save(images, tmp_path / "images.pt")
    code = """
import sys, json
sys.modules["diffusers_diffdoctor"] = None
import torch
from transformers import AutoModelForSemanticSegmentation
folder = sys.argv[1]
model = AutoModelForSemanticSegmentation.from_pretrained(folder + "/detector", trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules")
with torch.no_grad():
    print("MAP", json.dumps(model.confidence(torch.load(folder + "/images.pt")).tolist()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("MAP ")]
    torch.testing.assert_close(torch.tensor(json.loads(line[4:])), model.confidence(images))


def test_checkpointing_does_not_change_gradients():
    model = tiny_detector(drop_path_rate=0.0, classifier_dropout_prob=0.0).train()
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    (expected,) = torch.autograd.grad(model.confidence(images).sum(), images)
    model.gradient_checkpointing_enable()
    (found,) = torch.autograd.grad(model.confidence(images).sum(), images)
    assert torch.equal(found, expected) and expected.abs().sum() > 0
