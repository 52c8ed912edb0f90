# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The module of the `evaluate` library against the functions that it wraps."""

import math

import evaluate
import pytest
import torch

from diffusers_diffdoctor.evaluation import ARTIFACT_MAP_METRIC, metrics


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    return evaluate.load(ARTIFACT_MAP_METRIC, cache_dir=str(tmp_path_factory.mktemp("evaluate")))


@pytest.fixture
def pairs():
    """Predicted and true maps of three images of two sizes, one of them without a true artifact."""
    generator = torch.Generator().manual_seed(0)
    predicted = [torch.rand(1, *size, generator=generator) * 0.6 for size in ((4, 6), (4, 6), (5, 3))]
    truth = [(torch.rand(maps.shape, generator=generator) > 0.7).float() for maps in predicted]
    return predicted, [truth[0], torch.zeros(1, 4, 6), truth[2]]


def test_it_says_what_the_functions_say(metric, pairs):
    for predicted, true in zip(*pairs):  # image by image, and the batches may be tensors, arrays or lists
        metric.add(prediction=predicted, reference=true.numpy())
    found = metric.compute(threshold=0.55)

    expected = {"mse": metrics.map_mse, "kl_misses": metrics.kl_misses, "kl_false_alarms": metrics.kl_false_alarms}
    for name, function in expected.items():
        figures = [function(predicted[None], true[None]).item() for predicted, true in zip(*pairs)]
        assert found[name] == pytest.approx(sum(figures) / 3, rel=1e-5), name
    highest = [predicted.max().item() for predicted in pairs[0]]
    assert found["artifact_frequency"] == pytest.approx(sum(value >= 0.55 for value in highest) / 3)
    assert found["misses"] == pytest.approx(sum(highest[i] < 0.55 for i in (0, 2)) / 2)
    assert found["false_alarms"] == (highest[1] >= 0.55)
    assert 0 < found["artifact_frequency"]


def test_a_batch_is_a_tensor(metric, pairs):
    predicted, true = (torch.stack(maps[:2]) for maps in pairs)
    assert metric.compute(predictions=predicted, references=true)["mse"] == pytest.approx(
        (predicted - true).square().mean().item()
    )


def test_what_is_undefined_is_said(metric):
    found = metric.compute(predictions=torch.rand(2, 1, 4, 4), references=torch.zeros(2, 1, 4, 4))
    assert math.isnan(found["misses"]) and not math.isnan(found["false_alarms"])


def test_maps_of_two_sizes_and_logits_are_refused(metric):
    with pytest.raises(ValueError, match="must have one shape"):
        metric.compute(predictions=torch.rand(1, 1, 4, 4), references=torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        metric.compute(predictions=torch.full((1, 1, 4, 4), 3.0), references=torch.zeros(1, 1, 4, 4))
