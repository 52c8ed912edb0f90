# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The weights that come with the package: small, and as good as a treatment needs them."""

import json

import numpy as np
import pytest
import torch
import transformers
from diffusers import DiffusionPipeline
from PIL import Image
from transformers import AutoImageProcessor

from diffdoctor import main
from diffusers_diffdoctor import ArtifactDetectorForSemanticSegmentation, ArtifactDetectorImageProcessor, miniature
from diffusers_diffdoctor.images import to_image_tensor
from diffusers_diffdoctor.miniature import check
from diffusers_diffdoctor.miniature.renderer import PLAIN_CATEGORIES, PRONE_CATEGORIES, render, sample_scene


def test_they_are_small():
    files = [path for path in miniature.WEIGHTS.rglob("*") if path.is_file()]
    assert {path.relative_to(miniature.WEIGHTS).parts[0] for path in files} >= set(miniature.PARTS)
    assert sum(path.stat().st_size for path in files) <= 12 * 2**20


def test_they_say_nothing_of_where_they_were_made():
    for path in miniature.WEIGHTS.rglob("*.json"):
        assert "_name_or_path" not in path.read_text(), path
    assert not list(miniature.WEIGHTS.rglob("*.py"))


def test_the_pipeline_loads_and_draws_without_a_type_asked_for():
    """Its files hold half precision; parts of two types would not fit together."""
    pipeline = DiffusionPipeline.from_pretrained(miniature.load("pipeline"))
    assert {part.dtype for part in pipeline.components.values() if isinstance(part, torch.nn.Module)} == {
        torch.float32
    }
    images = pipeline("a person waving", height=64, width=64, num_inference_steps=1, output_type="pt").images
    assert images.shape == (1, 3, 64, 64) and images.std() > 0.01


def test_the_detector_diagnoses_as_any_detector_of_the_hub_does():
    """By its folder alone, which says how images are prepared."""
    folder = miniature.load("detector")
    detector = ArtifactDetectorForSemanticSegmentation.from_pretrained(folder, dtype=torch.float32)
    processor = AutoImageProcessor.from_pretrained(folder)
    assert processor.to_dict() == ArtifactDetectorImageProcessor.for_detector(detector.config).to_dict()
    scene = Image.fromarray(render(sample_scene(np.random.default_rng(1), wrong_share=1.0, category="hand"))[0])
    found = transformers.pipeline("artifact-detection", model=str(folder), dtype=torch.float32)(scene)
    with torch.no_grad():
        expected = detector.confidence(to_image_tensor(scene)[None]).max().item()
    assert found["max_confidence"] == pytest.approx(expected, abs=1e-3) and expected > 0.5


@pytest.fixture(scope="module")
def figures():
    return check.check(seeds=1, scenes=200)


def test_the_pipeline_draws_what_the_prompt_says(figures):
    assert figures["recognised"]["category"] >= 0.9 and figures["recognised"]["color"] >= 0.9
    assert figures["vae_psnr"] > 28


@pytest.mark.parametrize("name", ["judge", "detector"])
def test_the_pipeline_is_ill_and_judge_and_detector_see_it(figures, name):
    rates, frequency = figures[name]["on_scenes"], figures[name]["artifact_frequency"]
    assert rates["true_positive_rate"] > 0.85 and rates["false_positive_rate"] < 0.2
    assert sum(frequency[category] for category in PRONE_CATEGORIES) / len(PRONE_CATEGORIES) > 0.7
    assert max(frequency[category] for category in PLAIN_CATEGORIES) < 0.3


def test_the_judge_comes_with_its_error_rates(figures):
    published = json.loads((miniature.WEIGHTS / "judge" / "error_rates.json").read_text())
    assert set(published) == {"on_scenes", "on_samples"}
    for name, tolerance in (("on_scenes", 0.06), ("on_samples", 0.05)):  # 200 of the 2,000 scenes; the same samples
        for rate in ("true_positive_rate", "false_positive_rate"):
            assert figures["judge"][name][rate] == pytest.approx(published[name][rate], abs=tolerance), (name, rate)
    for count in ("samples", "wrong"):
        assert figures["judge"]["on_samples"][count] == published["on_samples"][count]


def test_check_prints_its_figures(figures, monkeypatch, capsys, tmp_path):
    asked = []

    def measured(folder):
        print("Loading weights from local directory")  # as huggingface_hub does
        asked.append(folder)
        return figures

    monkeypatch.setattr(check, "check", measured)
    assert main(["miniature", "check", "--folder", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out) == figures and asked == [str(tmp_path)]
