# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The benchmark runs, and what it would measure on a GPU is FLUX.1-schnell."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel

from diffusers_diffdoctor import ArtifactDetectorConfig, ArtifactDetectorForSemanticSegmentation


SCRIPT = Path(__file__).parents[2] / "benchmarks/flux_treat_step.py"


@pytest.fixture(scope="module")
def benchmark():
    return runpy.run_path(str(SCRIPT))


@pytest.mark.parametrize(
    "options", [[], ["--no_offline", "--no_vae_checkpointing", "--batch_size", "2", "--autocast"]]
)
def test_it_runs_and_writes_its_figures(benchmark, tmp_path, options):
    path = tmp_path / "results.json"
    argv = ["--tiny", "--device", "cpu", "--steps", "2", "--warmup", "1", "--output", str(path), *options]
    result = benchmark["main"](argv)
    assert json.loads(path.read_text()) == result
    assert [(row["resolution"], row["denoiser_checkpointing"]) for row in result["rows"]] == [(64, True), (64, False)]
    assert all(0 < row["seconds_fastest"] <= row["seconds_per_step"] for row in result["rows"])
    assert result["matmul_tflop_per_second"] > 0


def test_the_models_have_the_size_of_the_released_ones(benchmark):
    with torch.device("meta"):
        models = (
            FluxTransformer2DModel(**benchmark["SCHNELL"]),
            AutoencoderKL(**benchmark["VAE"]),
            ArtifactDetectorForSemanticSegmentation(ArtifactDetectorConfig()),
        )
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in models]
    assert counts == [11_891_178_560, 83_819_683, 84_594_113]


def test_models_are_built_in_place_and_finite(benchmark):
    model = benchmark["build"](AutoencoderKL, benchmark["TINY_VAE"], "cpu", torch.float32)
    assert torch.isfinite(model.decode(torch.randn(1, 16, 4, 4)).sample).all()
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("resolution", "offline", "expected"), [(512, 0, 95), (1024, 0, 383), (512, 1, 133), (1024, 1, 541)]
)
def test_the_arithmetic_of_a_step(benchmark, resolution, offline, expected):
    assert benchmark["model_tflop"](resolution, 1, offline) == pytest.approx(expected, rel=0.02)
    assert benchmark["model_tflop"](64, 1, offline) is None
