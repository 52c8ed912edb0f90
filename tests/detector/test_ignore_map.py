# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What does not count: from the column `ignore_map` to losses and figures that were worked out by hand."""

import math

import numpy as np
import pytest
import torch
from fixtures.segformer import tiny_detector
from PIL import Image

from diffusers_diffdoctor.detector import (
    ArtifactDetectorCollator,
    ArtifactDetectorConfig,
    ArtifactDetectorTrainer,
    ArtifactDetectorTrainingArguments,
)
from diffusers_diffdoctor.detector.augmentation import PRESETS, Augmentation, moved, reduced_map, without_ignored
from diffusers_diffdoctor.detector.losses import LOSSES
from diffusers_diffdoctor.detector.training_data import HighestOfMap
from diffusers_diffdoctor.evaluation import DetectorFigures
from diffusers_diffdoctor.images import to_image_tensor


CONFIG = ArtifactDetectorConfig(image_size=64)


def gray(values) -> Image.Image:
    return Image.fromarray(np.asarray(values, np.uint8))


def row(side=64, ignored=((10, 20), (30, 50)), artifact=((0, 32), (0, 40)), seed=0):
    """Noise with an artifact and a part that does not count, each ((top, bottom), (left, right)); they overlap."""
    maps = {name: np.zeros((side, side), np.uint8) for name in ("artifact_map", "ignore_map")}
    for name, ((top, bottom), (left, right)) in (("artifact_map", artifact), ("ignore_map", ignored)):
        maps[name][top:bottom, left:right] = 255
    noise = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return {"image": Image.fromarray(noise)} | {name: gray(values) for name, values in maps.items()}


@pytest.mark.parametrize("for_evaluation", [False, True])
def test_labels_are_minus_one_where_the_ignore_map_says_so(for_evaluation):
    given = row()
    labels = ArtifactDetectorCollator(CONFIG, for_evaluation=for_evaluation)([given])["labels"][0, 0].numpy()
    expected = np.where(np.asarray(given["ignore_map"]) > 0, -1, np.asarray(given["artifact_map"]) / 255)
    assert np.array_equal(labels, expected.astype(np.float32)) and set(np.unique(labels)) == {-1, 0, 1}
    without = ArtifactDetectorCollator(CONFIG)([given | {"ignore_map": None}])["labels"]
    assert (without >= 0).all()


def test_an_ignore_map_of_a_quarter_covers_what_it_stands_for():
    given = row() | {"ignore_map": gray(np.pad([[9]], ((3, 12), (5, 10))))}
    labels = ArtifactDetectorCollator(CONFIG)([given])["labels"][0, 0]
    expected = torch.zeros(64, 64, dtype=torch.bool)
    expected[12:16, 20:24] = True
    assert torch.equal(labels < 0, expected)


def test_other_ignore_maps_are_refused():
    for ignore_map, error, words in (
        (gray(np.zeros((17, 16))), ValueError, "an ignore_map of 16 x 17"),
        (Image.new("RGB", (64, 64)), ValueError, "one channel"),
        ("x.png", TypeError, "`ignore_map` must hold images"),
    ):
        with pytest.raises(error, match=words):
            ArtifactDetectorCollator(CONFIG)([row() | {"ignore_map": ignore_map}])


def test_a_smaller_map_hides_no_doubt_and_loses_no_artifact():
    nan = -1.0
    values = torch.tensor([[0, 0, 0, nan, nan, nan, 1, nan], [0, 0.5, 0, 0, nan, nan, 0, 0]])[None]
    assert reduced_map(values, (1, 4)).tolist() == [[[0.5, nan, nan, 1]]]
    assert without_ignored(torch.ones(1, 2, 2), gray(np.pad([[1]], ((0, 3), (3, 0))))).tolist() == [[[1, nan], [1, 1]]]


def test_augmentation_moves_what_does_not_count_with_the_image():
    """The image is white exactly where it does not count: so it is after any geometry, away from the borders."""
    ignored = torch.zeros(1, 60, 60)
    ignored[:, 15:40, 20:50] = 1
    image, artifact_map = ignored.expand(3, 60, 60).contiguous(), -ignored
    rng, most = np.random.default_rng(0), 0
    for _ in range(60):
        scale, angle, shift = rng.uniform(0.4, 2), rng.uniform(-180, 180), tuple(rng.uniform(-9, 9, 2))
        flip = bool(rng.integers(2))
        turned, labels = moved(image, artifact_map, scale, angle, shift, flip, reflect=False)
        inside = moved(image, torch.zeros_like(artifact_map), scale, angle, shift, flip, reflect=False)[1] == 0
        clear = inside & ((turned[:1] < 0.05) | (turned[:1] > 0.95))
        wrong = (labels < 0) != (turned[:1] > 0.5)
        assert (wrong & clear).sum() <= 0.01 * clear.sum()
        most = max(most, int((labels[inside] < 0).sum()))
    assert most > 1000
    flipped = ArtifactDetectorCollator(CONFIG, Augmentation(flip_probability=1.0))([row()])["labels"]
    assert torch.equal(flipped, ArtifactDetectorCollator(CONFIG)([row()])["labels"].flip(-1))
    for seed in range(20):
        torch.manual_seed(seed)
        labels = ArtifactDetectorCollator(CONFIG, PRESETS["strong"])([row(artifact=((0, 0), (0, 0)))])["labels"]
        assert set(labels.unique().tolist()) <= {-1.0, 0.0}


def test_losses_and_figures_by_hand():
    """Four pixels: an artifact seen at 0.8, a sound one at 0.1, a sound one at 0.6, and one that does not count at 0.9."""
    confidence = torch.tensor([0.8, 0.1, 0.6, 0.9]).view(1, 1, 2, 2)
    picture = {"artifact_map": gray([[255, 0], [0, 255]]), "ignore_map": gray([[0, 0], [0, 255]])}
    picture["image"] = Image.new("RGB", (2, 2))
    truth = ArtifactDetectorCollator(CONFIG, for_evaluation=True)([picture])["labels"]
    mse = (0.2**2 + 0.1**2 + 0.6**2) / 3
    assert LOSSES["mse"](torch.logit(confidence), truth).item() == pytest.approx(mse)
    entropy = -(math.log(0.8) + math.log(0.9) + math.log(0.4)) / 3
    dice = (0.2 + 0.1 + 0.6) / (1.8 + 0.1 + 0.6)
    assert LOSSES["bce_dice"](torch.logit(confidence), truth).item() == pytest.approx(entropy + 0.2 * dice)
    figures = DetectorFigures()
    figures.update(confidence, truth, [["hand"]], ["flux"], ["human"])
    found = figures.compute()["all"]
    assert found["images"] == found["images_with_artifacts"] == 1
    assert found["mse"] == pytest.approx(mse) and found["iou"] == pytest.approx(1 / 2)
    assert found["kl_misses"] == pytest.approx(-math.log(0.8) / 3, rel=1e-4)
    assert found["kl_false_alarms"] == pytest.approx(-(math.log(0.9) + math.log(0.4)) / 3, rel=1e-4)
    assert found["pixel_ap"] == pytest.approx(1.0)  # the one artifact that counts is above both sound pixels


@pytest.mark.parametrize("loss", ["mse", "bce_dice"])
def test_trainer_and_evaluation_leave_out_what_does_not_count(loss, tmp_path):
    """Whatever the map says below an ignore_map, nothing changes; without the ignore_map something does."""

    sound = row(seed=9) | {"artifact_map": gray(np.zeros((64, 64)))}

    def results(rows):
        trainer = ArtifactDetectorTrainer(
            tiny_detector(image_size=64),
            ArtifactDetectorTrainingArguments(
                str(tmp_path), loss=loss, use_cpu=True, max_steps=1, report_to="none", disable_tqdm=True,
                save_strategy="no", per_device_train_batch_size=2, per_device_eval_batch_size=2, overwrite_output_dir=True,
            ),
            train_dataset=rows,
            eval_dataset=[*rows, sound],
            compute_metrics=lambda prediction: {"highest": float(prediction.predictions[:, 1].sum())},
        )  # fmt: skip
        before = {key: value for key, value in trainer.evaluate().items() if "time" not in key and "_per_" not in key}
        trainer.train()
        return before, {name: weights.clone() for name, weights in trainer.model.state_dict().items()}

    rows = [row(seed=seed) for seed in range(2)]
    other = [one | {"artifact_map": gray(np.maximum(one["artifact_map"], one["ignore_map"]))} for one in rows]
    zero = [one | {"artifact_map": gray(np.where(one["ignore_map"], 0, one["artifact_map"]))} for one in rows]
    counted = [{name: value for name, value in one.items() if name != "ignore_map"} for one in rows]
    first = results(rows)
    for same in (other, zero):
        again = results(same)
        assert again[0] == pytest.approx(first[0], nan_ok=True)
        assert all(torch.equal(again[1][name], weights) for name, weights in first[1].items())
    different = results(counted)
    assert different[0]["eval_mse"] != pytest.approx(first[0]["eval_mse"])
    assert not all(torch.equal(different[1][name], weights) for name, weights in first[1].items())


def test_an_artifact_that_does_not_count_makes_no_image_one_with_artifacts():
    everything = gray(np.full((64, 64), 255))
    rows = [row(), row() | {"ignore_map": everything}, row(ignored=((0, 32), (0, 40)))]
    assert [HighestOfMap(rows, None)[i] for i in range(3)] == [1, -1, 0]


def test_the_highest_confidence_is_one_that_counts(tmp_path):
    model, given = tiny_detector(image_size=64), row()
    with torch.no_grad():
        confidence = model.confidence(to_image_tensor(given["image"])[None])[0, 0]
    ignored = confidence > confidence.median()
    args = ArtifactDetectorTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    metrics = ArtifactDetectorTrainer(
        model,
        args,
        eval_dataset=[
            given | {"ignore_map": gray(ignored.numpy() * 255)},
            row(seed=9) | {"artifact_map": gray(np.zeros((64, 64)))},
        ],
        compute_metrics=lambda prediction: {"highest": float(prediction.predictions[0, 1])},
    ).evaluate()
    assert metrics["eval_highest"] == pytest.approx(confidence[~ignored].max().item(), rel=1e-5)
    assert metrics["eval_highest"] < confidence.max().item() - 1e-4
