# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Each metric against a loop written by hand, pixel by pixel."""

import math

import pytest
import torch

from diffusers_diffdoctor.evaluation import metrics


@pytest.fixture
def maps():
    maps = torch.rand(3, 1, 5, 7, generator=torch.Generator().manual_seed(0)) * 0.45
    maps[0, 0, 2, 3] = 0.9
    maps[1, 0, 4, 6] = 0.5  # exactly at the threshold counts
    return maps


def pixels(image):
    return [value for row in image[0].tolist() for value in row]


def test_max_area_and_frequency(maps):
    worst = [max(pixels(image)) for image in maps]
    assert metrics.max_confidence(maps).tolist() == pytest.approx(worst)
    areas = [sum(value >= 0.3 for value in pixels(image)) / 35 for image in maps]
    assert 0 < min(areas)
    assert metrics.area_ratio(maps, threshold=0.3).tolist() == pytest.approx(areas)
    assert metrics.area_ratio(maps).tolist() == pytest.approx([1 / 35, 1 / 35, 0])
    assert metrics.artifact_frequency(maps) == pytest.approx(2 / 3)
    assert metrics.artifact_frequency(maps, threshold=0.51) == pytest.approx(1 / 3)


@pytest.mark.parametrize("target", ["soft", "binary"])
def test_mse_and_divergences(maps, target):
    wanted = torch.rand(maps.shape, generator=torch.Generator().manual_seed(1))
    if target == "binary":
        wanted = (wanted > 0.5).float()
    mse, misses, alarms = [], [], []
    for predicted, true in zip(maps, wanted):
        pairs = list(zip(pixels(predicted), pixels(true)))
        mse.append(sum((q - p) ** 2 for q, p in pairs) / len(pairs))
        sums = [0.0, 0.0]
        for q, p in pairs:
            kl = (p * math.log(p / q) if p else 0.0) + ((1 - p) * math.log((1 - p) / (1 - q)) if p < 1 else 0.0)
            sums[q > p] += kl
        misses.append(sums[0] / len(pairs))
        alarms.append(sums[1] / len(pairs))
    assert metrics.map_mse(maps, wanted).tolist() == pytest.approx(mse, rel=1e-4)
    assert metrics.kl_misses(maps, wanted).tolist() == pytest.approx(misses, rel=1e-4)
    assert metrics.kl_false_alarms(maps, wanted).tolist() == pytest.approx(alarms, rel=1e-4)


def test_the_divergences_say_which_way_a_detector_errs():
    truth = torch.zeros(1, 1, 4, 4)
    truth[..., :2] = 1
    blind, nervous = torch.full_like(truth, 0.05), torch.full_like(truth, 0.95)
    assert metrics.kl_misses(blind, truth) > 10 * metrics.kl_false_alarms(blind, truth)
    assert metrics.kl_false_alarms(nervous, truth) > 10 * metrics.kl_misses(nervous, truth)
    assert metrics.kl_misses(truth, truth).item() == 0 == metrics.kl_false_alarms(truth, truth).item()
    certain = metrics.kl_misses(torch.zeros_like(truth), truth)  # infinite but for eps
    assert certain.item() == pytest.approx(0.5 * -math.log(1e-6), rel=1e-4)


def test_no_divergence_is_negative():
    """Between neighbouring numbers nothing but rounding is left."""
    truth = torch.rand(1000, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    for direction, function in ((0.0, metrics.kl_misses), (1.0, metrics.kl_false_alarms)):
        assert function(truth.nextafter(torch.tensor(direction, dtype=torch.float64)), truth).min() >= 0


def test_error_rates():
    scores, wrong = torch.tensor([0.9, 0.2, 0.5, 0.1, 0.7]), torch.tensor([True, True, True, False, False])
    assert metrics.error_rates(scores, wrong) == {"misses": pytest.approx(1 / 3), "false_alarms": 0.5}
    assert math.isnan(metrics.error_rates(scores[:3], wrong[:3])["false_alarms"])


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_diversity(distance):
    features = torch.randn(7, 4, generator=torch.Generator().manual_seed(2))
    groups = ["a", "b", "a", "b", "a", "alone", "b"]

    def between(x, y):
        if distance == "euclidean":
            return math.dist(x, y)
        return 1 - sum(i * j for i, j in zip(x, y)) / (math.hypot(*x) * math.hypot(*y))

    means = []
    for group in ("a", "b"):
        rows = [row for row, label in zip(features.tolist(), groups) if label == group]
        pairs = [between(rows[i], rows[j]) for i in range(len(rows)) for j in range(i)]
        means.append(sum(pairs) / len(pairs))
    assert metrics.pairwise_diversity(features, groups, distance) == pytest.approx(sum(means) / 2, rel=1e-6)
    assert metrics.pairwise_diversity(features[:1].repeat(3, 1), [0, 0, 0], distance) == pytest.approx(0, abs=1e-7)


def test_diversity_needs_pairs():
    with pytest.raises(ValueError, match="no pair"):
        metrics.pairwise_diversity(torch.eye(3), [0, 1, 2])
    with pytest.raises(ValueError, match="2 groups"):
        metrics.pairwise_diversity(torch.eye(3), [0, 0])
    with pytest.raises(ValueError, match="distance"):
        metrics.pairwise_diversity(torch.eye(3), [0, 0, 0], "manhattan")


def test_pixel_change_inside_and_outside():
    generator = torch.Generator().manual_seed(3)
    before, after = torch.rand(2, 3, 9, 8, generator=generator), torch.rand(2, 3, 9, 8, generator=generator)
    maps = torch.zeros(2, 1, 9, 8)
    maps[0, 0, 2, 3], maps[0, 0, 8, 0], maps[1, 0, 5, 7] = 0.4, 0.11, 0.1  # the last one is not above the threshold
    sums, counts = {True: 0.0, False: 0.0}, {True: 0, False: 0}
    for i in range(2):
        for y in range(9):
            for x in range(8):
                inside = any(
                    maps[i, 0, v, u] > 0.1
                    for v in range(max(0, y - 2), min(9, y + 3))
                    for u in range(max(0, x - 2), min(8, x + 3))
                )
                sums[inside] += sum(abs(after[i, c, y, x].item() - before[i, c, y, x].item()) for c in range(3)) / 3
                counts[inside] += 1
    assert counts[True] == 25 + 9
    change = metrics.pixel_change(before, after, maps, dilation=2)
    assert change == {
        "inside": pytest.approx(sums[True] / counts[True]),
        "outside": pytest.approx(sums[False] / counts[False]),
    }


@pytest.mark.parametrize(("side", "dilation"), [(16, 1), (64, 2), (100, 3)])
def test_the_region_grows_with_the_image(side, dilation):
    generator = torch.Generator().manual_seed(5)
    before, after = torch.rand(2, 1, 3, side, side + 9, generator=generator)
    maps = torch.zeros(1, 1, side, side + 9)
    maps[..., 8, 8] = 1
    change = metrics.pixel_change(before, after, maps)
    assert change == metrics.pixel_change(before, after, maps, dilation=dilation)
    assert change != metrics.pixel_change(before, after, maps, dilation=dilation + 1)
    assert change != metrics.pixel_change(before, after, maps, dilation=dilation - 1)


def test_pixel_change_without_a_region():
    images = torch.rand(1, 3, 8, 8)
    change = metrics.pixel_change(images, images, torch.zeros(1, 1, 8, 8))
    assert math.isnan(change["inside"])
    assert change["outside"] == 0


def test_sharpness():
    image = torch.rand(1, 3, 6, 5, generator=torch.Generator().manual_seed(4))
    gray = image[0].mean(dim=0).tolist()
    total = 0.0
    for y in range(1, 5):
        for x in range(1, 4):
            total += abs(gray[y - 1][x] + gray[y + 1][x] + gray[y][x - 1] + gray[y][x + 1] - 4 * gray[y][x])
    assert metrics.sharpness(image).item() == pytest.approx(total / 12, rel=1e-5)
    blurred = torch.nn.functional.avg_pool2d(image, 3, 1, 1)
    assert metrics.sharpness(blurred) < metrics.sharpness(image)


def test_wilson_interval():
    # the textbook example: 10 of 50
    assert metrics.wilson_interval(10, 50) == pytest.approx((0.1124, 0.3304), abs=1e-4)
    # it solves |share - p| = z * sqrt(p (1 - p) / n)
    for low_or_high in metrics.wilson_interval(3, 17):
        assert abs(3 / 17 - low_or_high) == pytest.approx(1.959964 * math.sqrt(low_or_high * (1 - low_or_high) / 17))
    assert metrics.wilson_interval(0, 20)[0] == 0
    assert metrics.wilson_interval(20, 20)[1] == 1
    with pytest.raises(ValueError, match="21 of 20"):
        metrics.wilson_interval(21, 20)


@pytest.mark.parametrize("function", [metrics.max_confidence, metrics.area_ratio, metrics.artifact_frequency])
def test_wrong_shapes_are_named(function):
    with pytest.raises(ValueError, match=r"\(B, 1, H, W\), found \(2, 3, 4, 4\)"):
        function(torch.zeros(2, 3, 4, 4))


@pytest.mark.parametrize("function", [metrics.map_mse, metrics.kl_misses, metrics.kl_false_alarms])
def test_maps_of_two_sizes_are_refused(function):
    with pytest.raises(ValueError, match=r"`predicted` \(1, 1, 4, 4\), `target` \(1, 1, 8, 8\)"):
        function(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize(
    "wrong", [torch.full((1, 1, 4, 4), 1.5), -torch.rand(1, 1, 4, 4), torch.full((1, 1, 4, 4), math.nan)]
)
@pytest.mark.parametrize("function", [metrics.max_confidence, metrics.area_ratio, metrics.artifact_frequency])
def test_logits_are_no_maps(function, wrong):
    with pytest.raises(ValueError, match=r"`maps` must be artifact maps in \[0, 1\]"):
        function(wrong)


def test_no_map_is_no_average():
    with pytest.raises(ValueError, match=r"found \(0, 1, 4, 4\)"):
        metrics.artifact_frequency(torch.zeros(0, 1, 4, 4))
