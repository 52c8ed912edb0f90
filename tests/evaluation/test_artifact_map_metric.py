# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The module of the `evaluate` library against the figures that it wraps, whose own tests are by hand."""

import json
import math
import os
import subprocess
import sys

import evaluate
import pytest
import torch

from diffusers_diffdoctor.evaluation import ARTIFACT_MAP_METRIC, DetectorFigures


GROUPS = {
    "categories": [["hand"], [], ["hand", "face"]],
    "generators": ["flux", None, "sdxl"],
    "sources": ["human", "photo", "human"],
}

PROCESS = """
import sys, json, torch, evaluate
path, cache, maps = sys.argv[1:]
metric = evaluate.load(path, cache_dir=cache, experiment_id="two", num_process=2, process_id=1)
predictions, references = ([torch.tensor(one) for one in side] for side in json.loads(maps))
metric.add_batch(predictions=predictions, references=references, categories=[["hand", "face"]], generators=["sdxl"])
assert metric.compute() is None
"""


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    return evaluate.load(ARTIFACT_MAP_METRIC, cache_dir=str(tmp_path_factory.mktemp("evaluate")))


@pytest.fixture
def pairs():
    """Predicted and true maps of three images of two sizes, one of them without a true artifact."""
    generator = torch.Generator().manual_seed(0)
    predicted = [torch.rand(1, *size, generator=generator) * 0.6 for size in ((4, 6), (4, 6), (5, 3))]
    truth = [(torch.rand(maps.shape, generator=generator) > 0.7).float() for maps in predicted]
    truth[0][:, 0] = -1
    return predicted, [truth[0], torch.zeros(1, 4, 6), truth[2]]


def expected(pairs, threshold=0.5, **groups):
    figures = DetectorFigures(threshold)
    for number, pair in enumerate(zip(*pairs)):
        figures.update(*(maps[None] for maps in pair), *([values[number]] for values in groups.values()))
    computed = figures.compute()
    return computed.pop("all") | computed


def assert_equal(found, figures):
    assert found.keys() == figures.keys()
    for name, value in figures.items():
        if isinstance(value, dict):
            assert_equal(found[name], value)
        else:
            assert found[name] == pytest.approx(value, nan_ok=True), name


def test_it_says_what_the_figures_say(metric, pairs):
    for predicted, true in zip(*pairs):  # image by image, and the maps may be tensors, arrays or lists
        metric.add(prediction=predicted, reference=true.numpy())
    found = metric.compute()
    assert_equal(found, expected(pairs))
    wanted = {"mse", "kl_misses", "kl_false_alarms", "pixel_ap", "iou", "image_auroc", "calibration_error", "misses"}
    assert wanted < found.keys() and not any(math.isnan(found[name]) for name in wanted)


def test_groups_are_optional_inputs(metric, pairs):
    rows = zip(*pairs, *GROUPS.values())
    for predicted, true, category, generator, source in rows:
        metric.add(prediction=predicted, reference=true, category=category, generator=generator, source=source)
    found = metric.compute()
    assert_equal(found, expected(pairs, **GROUPS))
    assert found["categories"].keys() == {"face", "hand"} and found["generators"].keys() == {"flux", "sdxl"}
    assert found["photographs"]["images"] == 1
    assert_equal(metric.compute(predictions=pairs[0], references=pairs[1], **GROUPS), found)


def test_the_threshold_is_chosen_on_loading(tmp_path, pairs):
    metric = evaluate.load(ARTIFACT_MAP_METRIC, cache_dir=str(tmp_path), threshold=0.59)
    metric.add_batch(predictions=pairs[0], references=pairs[1])
    found = metric.compute()
    assert_equal(found, expected(pairs, threshold=0.59))
    assert found["artifact_frequency"] < expected(pairs)["artifact_frequency"]


def test_a_batch_is_a_tensor(metric, pairs):
    predicted, true = (torch.stack(maps[:2]) for maps in pairs)
    assert_equal(metric.compute(predictions=predicted, references=true), expected([predicted, true]))


def test_what_is_stored_does_not_grow_with_the_image(tmp_path):
    metric = evaluate.load(ARTIFACT_MAP_METRIC, cache_dir=str(tmp_path))
    metric.add(prediction=torch.rand(1, 900, 1000), reference=torch.zeros(1, 900, 1000))
    metric.writer.finalize()
    assert os.path.getsize(metric.cache_file_name) < 50_000


@pytest.mark.slow  # a second process imports the package
def test_two_processes_are_gathered(tmp_path, pairs):
    maps = json.dumps([[one.tolist() for one in side[2:]] for side in pairs])
    other = subprocess.Popen([sys.executable, "-c", PROCESS, ARTIFACT_MAP_METRIC, str(tmp_path), maps])
    metric = evaluate.load(
        ARTIFACT_MAP_METRIC, cache_dir=str(tmp_path), experiment_id="two", num_process=2, process_id=0
    )
    metric.add_batch(
        predictions=pairs[0][:2], references=pairs[1][:2], **{name: values[:2] for name, values in GROUPS.items()}
    )
    found = metric.compute()
    assert other.wait(timeout=60) == 0
    assert_equal(found, expected(pairs, **GROUPS | {"sources": ["human", "photo", None]}))


def test_maps_of_two_sizes_and_logits_are_refused(metric):
    with pytest.raises(ValueError, match="must have one shape"):
        metric.add_batch(predictions=torch.rand(1, 1, 4, 4), references=torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        metric.add_batch(predictions=torch.full((1, 1, 4, 4), 3.0), references=torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match="shorter"):
        metric.add_batch(predictions=torch.rand(2, 1, 4, 4), references=torch.zeros(1, 1, 4, 4))
