# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Figures that are counted batch by batch against loops over single pixels and images that hold everything."""

import math
import pickle

import pytest
import torch

from diffusers_diffdoctor.evaluation import DetectorFigures, headline, metrics
from diffusers_diffdoctor.evaluation.detector_figures import (
    BINS,
    GROUPS,
    SHOWN,
    bin_of,
    count_images,
    figure_table,
    from_headline,
)


SIZES = [(6, 9), (5, 7), (6, 9), (12, 4), (5, 7), (6, 9), (5, 7), (3, 3)]
CATEGORIES = [["hand", "face"], ["hand"], [], ["face"], "cat", None, ["hand", "hand"], ["cat"]]
GENERATORS = ["flux", "sdxl", "flux", None, None, "sdxl", "flux", "flux"]
SOURCES = ["human", "pseudo", "injected", "photo", "photo", "rendered", None, "human"]


@pytest.fixture
def images():
    """(confidence, truth) of images of several sizes: soft, binary and empty maps, some pixels that do not count."""
    generator = torch.Generator().manual_seed(0)
    images = []
    for number, size in enumerate(SIZES):
        truth = torch.rand(1, *size, generator=generator)
        truth = truth if number == 1 else (truth > 0.8).float()
        truth = truth * 0 if number in (3, 4, 6) else truth
        noise = torch.randn(truth.shape, generator=generator)
        confidence = torch.sigmoid(3 * truth - 2 + 1.5 * noise) * (0.4 if number in (4, 7) else 1)
        if number in (0, 3):
            truth[:, :2, 1:4] = -1
            confidence[:, 0, 2] = 0.999  # would be a false alarm if it counted
        images.append((confidence, truth))
    return images


def count(images, numbers, figures=None, batch=1):
    figures = DetectorFigures() if figures is None else figures
    by_size = {}
    for number in numbers:
        by_size.setdefault(SIZES[number], []).append(number)
    for members in by_size.values():
        for start in range(0, len(members), batch):
            part = members[start : start + batch]
            figures.update(
                torch.stack([images[i][0] for i in part]),
                torch.stack([images[i][1] for i in part]),
                [CATEGORIES[i] for i in part],
                [GENERATORS[i] for i in part],
                [SOURCES[i] for i in part],
            )
    return figures


def by_hand(images, threshold=0.5):
    """All figures of a list of images, from lists of pixels."""
    lists = []
    for confidence, truth in images:
        lists.append([(q, p) for q, p in zip(confidence.flatten().tolist(), truth.flatten().tolist()) if p != -1])
    pixels = [pair for pairs in lists for pair in pairs]
    figures = {"images": len(lists)}

    def kl(q, p):
        q = min(max(q, 1e-6), 1 - 1e-6)
        return (p * math.log(p / q) if p else 0) + ((1 - p) * math.log((1 - p) / (1 - q)) if p < 1 else 0)

    def mean(values):
        return sum(values) / len(values) if values else math.nan

    figures["mse"] = mean([mean([(q - p) ** 2 for q, p in pairs]) for pairs in lists])
    figures["kl_misses"] = mean([mean([kl(q, p) if q < p else 0 for q, p in pairs]) for pairs in lists])
    figures["kl_false_alarms"] = mean([mean([kl(q, p) if q > p else 0 for q, p in pairs]) for pairs in lists])

    positives = sum(p >= threshold for _, p in pixels)
    precision, recall, area = 0.0, 0.0, 0.0
    for cut in sorted({q for q, _ in pixels}, reverse=True):
        called = [p for q, p in pixels if q >= cut]
        found = sum(p >= threshold for p in called)
        precision, before, recall = found / len(called), recall, found / positives if positives else math.nan
        area += (recall - before) * precision
    figures["pixel_ap"] = area

    both = sum(q >= threshold and p >= threshold for q, p in pixels)
    either = sum(q >= threshold or p >= threshold for q, p in pixels)
    figures["iou"] = both / either if either else math.nan
    bins = [[pair for pair in pixels if min(14, int(pair[0] * 15)) == number] for number in range(15)]
    figures["calibration_error"] = sum(
        abs(sum(q for q, _ in members) - sum(p for _, p in members)) for members in bins
    ) / len(pixels)

    scores = [(max(q for q, _ in pairs), max(p for _, p in pairs) >= threshold) for pairs in lists]
    wrong, sound = [s for s, broken in scores if broken], [s for s, broken in scores if not broken]
    figures["images_with_artifacts"] = len(wrong)
    figures["image_auroc"] = mean([(a > b) + (a == b) / 2 for a in wrong for b in sound])
    figures["misses"] = mean([score < threshold for score in wrong])
    figures["false_alarms"] = mean([score >= threshold for score in sound])
    figures["artifact_frequency"] = mean([score >= threshold for score, _ in scores])
    return figures


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # the bins of the average precision are the only ones that round
        tolerance = {"abs": 0.01} if name == "pixel_ap" else {"rel": 1e-5, "abs": 1e-9}
        assert found[name] == pytest.approx(value, nan_ok=True, **tolerance), name


def test_every_group_is_as_by_hand(images):
    figures = count(images, range(len(images)), batch=2).compute()
    everything = by_hand(images)
    assert 0 < everything["false_alarms"] < 1 and 0 < everything["pixel_ap"] < 1 and 0 < everything["iou"] < 1
    assert_close(figures["all"], everything)
    assert_close(figures["with_artifacts"], by_hand([images[i] for i in (0, 1, 2, 5, 7)]))
    assert_close(figures["without_artifacts"], by_hand([images[i] for i in (3, 4, 6)]))
    assert_close(figures["photographs"], by_hand([images[i] for i in (3, 4)]))
    assert list(figures["categories"]) == ["cat", "face", "hand"] and list(figures["generators"]) == ["flux", "sdxl"]
    assert_close(figures["categories"]["hand"], by_hand([images[i] for i in (0, 1, 6)]))
    assert_close(figures["categories"]["face"], by_hand([images[i] for i in (0, 3)]))
    assert_close(figures["categories"]["cat"], by_hand([images[i] for i in (4, 7)]))
    assert_close(figures["generators"]["flux"], by_hand([images[i] for i in (0, 2, 6, 7)]))


def test_the_threshold_is_that_of_pixels_images_and_truth(images):
    figures = count(images, range(len(images)), DetectorFigures(threshold=0.8)).compute()
    assert_close(figures["all"], by_hand(images, threshold=0.8))


def test_batches_order_and_processes_make_no_difference(images):
    numbers = range(len(images))
    expected = count(images, numbers).compute()
    halves = [pickle.loads(pickle.dumps(count(images, part, batch=3))) for part in (numbers[5:], numbers[:5])]
    found = halves[0].merge(halves[1]).compute()
    for group in ("all", "with_artifacts", "without_artifacts", "photographs"):
        assert found[group] == pytest.approx(expected[group], rel=1e-6, nan_ok=True)
    for kind in ("categories", "generators"):
        assert found[kind].keys() == expected[kind].keys()
        for name in expected[kind]:
            assert found[kind][name] == pytest.approx(expected[kind][name], rel=1e-6, nan_ok=True)


def test_rows_that_were_gathered_are_counted_as_they_are(images):
    rows = [count_images(confidence[None], truth[None]) for confidence, truth in images]
    figures = DetectorFigures()
    figures.add(torch.cat(rows), CATEGORIES, GENERATORS, SOURCES)
    assert figures.compute()["all"] == pytest.approx(count(images, range(len(images))).compute()["all"])


def test_what_does_not_count_makes_no_difference():
    truth = torch.rand(1, 1, 4, 4).round()
    confidence = torch.rand(1, 1, 4, 4) * 0.4
    padded = torch.full((1, 1, 6, 7), -1.0), torch.full((1, 1, 6, 7), 0.99)
    padded[0][..., :4, :4], padded[1][..., :4, :4] = truth, confidence
    figures = [DetectorFigures(), DetectorFigures()]
    figures[0].update(confidence, truth)
    figures[1].update(padded[1], padded[0])
    figures[1].update(torch.rand(2, 1, 3, 3), torch.full((2, 1, 3, 3), -1.0), [["hand"]] * 2)  # nothing counts at all
    found, expected = figures[1].compute(), figures[0].compute()
    assert found["all"] == pytest.approx(expected["all"], nan_ok=True)
    assert found["categories"] == {}


def test_nothing_counted_is_nan_and_zero_images():
    figures = DetectorFigures().compute()
    assert figures["all"]["images"] == 0
    assert all(math.isnan(value) for name, value in figures["all"].items() if not name.startswith("images"))


def test_the_headline_is_flat(images):
    figures = count(images, range(len(images))).compute()
    flat = headline(figures)
    assert flat["mse"] == figures["all"]["mse"]
    assert flat["photographs_kl_false_alarms"] == figures["photographs"]["kl_false_alarms"]
    assert "photographs_misses" not in flat  # undefined by nature
    assert math.isnan(headline(DetectorFigures().compute())["mse"])  # undefined for want of data


def test_a_headline_becomes_groups_again(images):
    figures = count(images, range(len(images))).compute()
    log = {f"eval_{key}": value for key, value in headline(figures).items()} | {"eval_runtime": 1.0, "mse": 3.0}
    log |= {f"eval_very_small_{key}": 2.0 for key in ("mse", "photographs_kl_misses")}
    found = from_headline(log, "eval_")
    assert found["very_small"] == {"all": {"mse": 2.0}, "photographs": {"kl_misses": 2.0}} and len(found) == 2
    for group in GROUPS:
        expected = {
            key: value for key, value in figures[group].items() if key in SHOWN and (group == "all" or value == value)
        }
        assert found[""][group] == pytest.approx(expected, nan_ok=True)
    columns, rows = figure_table(figures)
    assert [row[0] for row in rows[:4]] == ["all", "with artifacts", "without artifacts", "photographs"]
    assert rows[4][0] == "generator flux" and rows[-1][0] == "category hand"
    assert rows[0][columns.index("MSE")] == f"{figures['all']['mse']:.4f}"
    assert rows[3][columns.index("missed")] == ""  # of photographs
    assert figure_table(found[""])[1] == rows[:4]


# --- scores in bins ------------------------------------------------------------------------------------------------------------


def scores(count, shift, seed=0):
    """(confidences, truth): sigmoids of overlapping normal distributions, an artifact in one of ten."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.rand(count, generator=generator) < 0.1
    return torch.sigmoid(1.5 * torch.randn(count, generator=generator) + 2.5 * truth + shift), truth


def binned(confidence, truth):
    return tuple(torch.bincount(bin_of(confidence[truth == which]), minlength=BINS) for which in (True, False))


def exact(confidence, truth):
    """Average precision and area under the ROC curve of the scores themselves, which have no ties."""
    order = truth[confidence.double().argsort(descending=True)].double()
    found, rank = order.cumsum(0), torch.arange(1, len(order) + 1, dtype=torch.float64)
    before = (1 - order).cumsum(0)  # sound ones that score higher
    ap = ((found / rank) * order).sum() / order.sum()
    return ap.item(), 1 - ((before * order).sum() / (order.sum() * (1 - order).sum())).item()


@pytest.mark.parametrize(
    "shift", [-9, -2, 0, 6]
)  # a timid detector, whose highest confidence is below 0.1, to a bold one
def test_bins_know_the_average_precision_of_any_detector(shift):
    confidence, truth = scores(100_000, shift)
    ap, auroc = exact(confidence.double(), truth)
    assert metrics.average_precision(*binned(confidence, truth)) == pytest.approx(ap, abs=1e-4)
    low, high = metrics.average_precision_bounds(*binned(confidence, truth))
    assert low <= ap <= high and high - low < 0.02
    assert metrics.roc_auc(*binned(confidence, truth)) == pytest.approx(auroc, abs=1e-4)


def test_the_bounds_hold_for_few_and_for_equal_scores():
    for seed in range(50):
        confidence, truth = scores(40, 0, seed)
        truth[:1] = True
        ap, _ = exact(confidence, truth)
        low, high = metrics.average_precision_bounds(*binned(confidence, truth))
        assert low - 1e-9 <= ap <= high + 1e-9
        assert low - 1e-9 <= metrics.average_precision(*binned(confidence, truth)) <= high + 1e-9
    # one bin for all: as good as any order of them
    same = torch.full((10,), 0.3)
    truth = torch.arange(10) < 4
    assert metrics.average_precision(*binned(same, truth)) == pytest.approx(2.5 / 5.5)
    assert metrics.average_precision_bounds(*binned(same, truth)) == pytest.approx((1 / 7, 1))
    assert metrics.roc_auc(*binned(same, truth)) == 0.5


def test_bins_reach_from_zero_to_one():
    assert bin_of(torch.tensor([0.0, 1e-9, 0.5, 1 - 2**-24, 1.0])).tolist() == [0, 0, BINS // 2, BINS - 1, BINS - 1]
    close = torch.tensor([1e-4, 1.1e-4, 0.5, 0.52, 1 - 1.1e-4, 1 - 1e-4], dtype=torch.float64)
    assert len(set(bin_of(close).tolist())) == 6 and (bin_of(close).diff() > 0).all()


def test_scikit_learn_says_the_same():
    """Where it is installed; the loops above are the reference everywhere."""
    sklearn = pytest.importorskip("sklearn.metrics")
    confidence, truth = scores(100_000, 0)
    bins = binned(confidence, truth)
    expected = sklearn.average_precision_score(truth, confidence)
    assert metrics.average_precision(*bins) == pytest.approx(expected, abs=1e-4)
    assert metrics.roc_auc(*bins) == pytest.approx(sklearn.roc_auc_score(truth, bin_of(confidence)), abs=1e-12)


def test_scipy_says_the_same_of_both_divergences(images):
    stats = pytest.importorskip("scipy.stats")
    for predicted, true in images:
        counted = true != -1
        q, p = (torch.stack([maps, 1 - maps])[:, counted].double().numpy() for maps in (predicted, true))
        both = metrics.kl_misses(predicted[None], true[None]) + metrics.kl_false_alarms(predicted[None], true[None])
        assert both.item() == pytest.approx(stats.entropy(p, q).mean(), rel=1e-5)


# --- wrong input ---------------------------------------------------------------------------------------------------------------


def test_wrong_input_is_named():
    figures, maps = DetectorFigures(), torch.rand(2, 1, 4, 4)
    with pytest.raises(ValueError, match=r"`predicted` \(2, 1, 4, 4\), `target` \(2, 1, 2, 2\)"):
        figures.update(maps, torch.zeros(2, 1, 2, 2))
    with pytest.raises(ValueError, match=r"`predicted` must be artifact maps in \[0, 1\]"):
        figures.update(maps * 5, maps)
    with pytest.raises(ValueError, match=r"`target` must be artifact maps in \[0, 1\]"):
        figures.update(maps, maps - 0.5)
    with pytest.raises(ValueError, match="`generator` must have an entry for each of the 2 images, found 1"):
        figures.update(maps, maps, generator=["flux"])
    with pytest.raises(ValueError, match=r"thresholds differ: 0\.5 and 0\.4"):
        figures.merge(DetectorFigures(threshold=0.4))
    with pytest.raises(ValueError, match=r"`threshold` must be in \(0, 1\], found 0"):
        DetectorFigures(threshold=0)
    assert figures.compute()["all"]["images"] == 0  # what was refused left nothing behind
