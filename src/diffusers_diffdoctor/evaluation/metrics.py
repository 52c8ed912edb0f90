# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Figures of merit as small pure functions.

Shapes: images (B, 3, H, W) and artifact maps (B, 1, H, W), both floats in [0, 1]; 1 = artifact. A true map may also hold
-1, where a pixel does not count: padding, or what an annotator left open. Maps of another shape or range, and none at all, are a
`ValueError`. A figure that is undefined, because it is over no image or pixel, is nan. Functions that return (B,) give one figure
per image, so that images of different sizes can be averaged with equal weight.

"The paper" is DiffDoctor, arXiv 2501.12382. It gives neither the formulas of its KL columns nor the rule behind
"artifact frequency"; where a choice is ours, the docstring says so.
"""

import math
from collections.abc import Hashable, Sequence

import torch
import torch.nn.functional as F


IGNORED = -1  # of a true map: the pixel does not count
Z_95 = 1.959964  # standard deviations on either side that hold 95 % of a normal distribution


def max_confidence(maps: torch.Tensor) -> torch.Tensor:
    """(B, 1, H, W) -> (B,) in [0, 1]: the confidence of the worst pixel of each image."""
    _check_maps(maps=maps)
    return maps.flatten(1).amax(dim=1)


def area_ratio(maps: torch.Tensor, threshold: float = 0.5) -> torch.Tensor:
    """(B, 1, H, W) -> (B,) in [0, 1]: the share of each image's pixels whose confidence is at least `threshold`."""
    _check_maps(maps=maps)
    return (maps >= threshold).flatten(1).float().mean(dim=1)


def artifact_frequency(maps: torch.Tensor, threshold: float = 0.5) -> float:
    """(B, 1, H, W) -> share in [0, 1] of the images with an artifact: maximum confidence of at least `threshold`.

    The rule and the 0.5 are what others who report this figure use; the paper leaves them open. Measured with the
    detector that was trained against, the figure is circular: use a judge that treatment never saw.
    """
    return (max_confidence(maps) >= threshold).double().mean().item()


def map_mse(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """(B, 1, H, W) twice -> (B,): mean squared difference over an image's pixels, the paper's L_AD."""
    counted = _check_pair(predicted, target)
    return _mean((predicted - target).square(), counted)


def kl_misses(predicted: torch.Tensor, target: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """(B, 1, H, W) twice -> (B,), nats per pixel, >= 0: how much the prediction says too little.

    The Bernoulli divergence KL(target || predicted) of the pixels where predicted < target, over all pixels of the
    image. With a 0/1 target that is the mean of -log(predicted) over artifact pixels, 0 elsewhere. Together with
    [`kl_false_alarms`] it adds up to the whole divergence. The paper names its columns KL and KL(1-) and leaves the
    formulas open; this one is ours. `eps` keeps predictions away from 0 and 1, where the divergence is infinite.
    """
    return _kl_where(torch.lt, predicted, target, eps)


def kl_false_alarms(predicted: torch.Tensor, target: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """(B, 1, H, W) twice -> (B,), nats per pixel, >= 0: how much the prediction says too much. See [`kl_misses`].

    With a 0/1 target that is the mean of -log(1 - predicted) over sound pixels, 0 elsewhere.
    """
    return _kl_where(torch.gt, predicted, target, eps)


def _kl_where(compare, predicted, target, eps):
    counted = _check_pair(predicted, target)
    predicted, target = predicted.double(), target.double().clamp(min=0)
    q = predicted.clamp(eps, 1 - eps)
    # xlogy(0, 0) = 0, so 0/1 targets need no clamp of their own
    kl = torch.xlogy(target, target / q) + torch.xlogy(1 - target, (1 - target) / (1 - q))
    # The clamp can push a prediction past a target closer to 0 or 1 than eps; what is left is rounding.
    return _mean(kl.clamp(min=0) * compare(predicted, target), counted).float()


def _mean(values: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """(B, ...) twice -> (B,): the mean over what counts of each image, nan where nothing does."""
    return (values * counted).flatten(1).sum(dim=1) / counted.flatten(1).sum(dim=1)


# --- figures of scores in bins -------------------------------------------------------------------------------------------------


def average_precision(positives: torch.Tensor, negatives: torch.Tensor) -> float:
    """Area under precision over recall, in [0, 1]: the mean over the positives of the precision at which each is found.

    `AP = 1/P sum_i (found_i / (found_i + alarms_i))`, without interpolation. The order within a bin is not known: its middle
    positive stands for all of them, and comes with half of the bin's negatives (ours).

    Args:
        positives, negatives: (K,) how many of each have their score in bin 0 ... K - 1; scores rise with the bin.

    Returns:
        nan without a positive. The average precision of the scores themselves lies within [`average_precision_bounds`].
    """
    p, n, found, alarms = _from_the_top(positives, negatives)
    found, alarms = found - (p - 1) / 2, alarms - n / 2
    return _mean_precision(p, found, alarms)


def average_precision_bounds(positives: torch.Tensor, negatives: torch.Tensor) -> tuple[float, float]:
    """The lowest and the highest average precision that scores in these bins can have; see [`average_precision`].

    A positive is found after all of the bins above its own, and before all of the bins below: its precision is least where
    it is the first of its bin's positives and comes with all of its bin's negatives, highest where it is the last and comes
    with none.
    """
    p, n, found, alarms = _from_the_top(positives, negatives)
    return _mean_precision(p, found - p + 1, alarms), _mean_precision(p, found, alarms - n)


def _from_the_top(positives, negatives):
    """Both counts from the highest bin down, and how many there are in each bin and above."""
    p, n = positives.double().flip(0), negatives.double().flip(0)
    return p, n, p.cumsum(0), n.cumsum(0)


def _mean_precision(p, found, alarms):
    return (torch.where(p > 0, p * found / (found + alarms), 0).sum() / p.sum()).item()


def roc_auc(positives: torch.Tensor, negatives: torch.Tensor) -> float:
    """The probability in [0, 1] that a random positive scores higher than a random negative; ties count half.

    Args:
        positives, negatives: (K,) as for [`average_precision`].

    Returns:
        The area under the ROC curve of the bins; nan without a positive or a negative. That of the scores themselves differs by
        at most half the share of pairs that lie in one bin.
    """
    p, n = positives.double(), negatives.double()
    below = n.cumsum(0) - n
    return ((p * (below + n / 2)).sum() / (p.sum() * n.sum())).item()


def calibration_error(counts: torch.Tensor, confidences: torch.Tensor, truths: torch.Tensor) -> float:
    """Expected calibration error, in [0, 1]: how far a confidence is from the share of artifacts among what has it.

    `ECE = sum_b n_b / N |mean confidence_b - mean truth_b|` (Naeini et al. 2015; Guo et al. 2017).

    Args:
        counts, confidences, truths: (K,) how many fell into each bin, and the sums of their confidences and of their truths.

    Returns:
        nan without a count.
    """
    return ((confidences - truths).abs().double().sum() / counts.sum()).item()


def error_rates(scores: torch.Tensor, wrong: torch.Tensor, threshold: float = 0.5) -> dict[str, float]:
    """Error rates of a judge on images whose truth is known.

    Args:
        scores: (N,) maximum confidence of each image, in [0, 1].
        wrong: (N,) bool, whether the image truly has an artifact.
        threshold: the judge says "artifact" from this score on.

    Returns:
        `misses`: share of the wrong images called sound; `false_alarms`: share of the sound images called wrong.
        nan where there is no image of that sort.
    """
    if scores.shape != wrong.shape or scores.ndim != 1:
        raise ValueError(
            "`scores` and `wrong` must be 1-d and of one length, found shapes "
            f"{tuple(scores.shape)} and {tuple(wrong.shape)}."
        )
    wrong, called = wrong.bool(), scores >= threshold
    return {
        "misses": (~called[wrong]).double().mean().item(),
        "false_alarms": called[~wrong].double().mean().item(),
    }


def pairwise_diversity(features: torch.Tensor, groups: Sequence[Hashable], distance: str = "cosine") -> float:
    """How different the images of one group (one prompt, say) are from each other; 0 = all alike, higher is better.

    The mean distance over all pairs within a group, then the mean over groups. Groups of one image have no pair and
    are left out.

    Args:
        features: (N, F), one row per image, for example CLIP image embeddings.
        groups: N labels; images with equal labels form a group.
        distance: "cosine" (1 - cosine similarity, in [0, 2]) or "euclidean" (in units of the features).
    """
    if features.ndim != 2 or len(features) != len(groups):
        raise ValueError(
            f"`features` must be (N, F) with one row per entry of `groups`, found shape {tuple(features.shape)} and "
            f"{len(groups)} groups."
        )
    if distance not in ("cosine", "euclidean"):
        raise ValueError(f'`distance` must be "cosine" or "euclidean", found {distance!r}.')
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    members = {group: indices for group, indices in members.items() if len(indices) > 1}
    if not members:
        raise ValueError(
            "No entry of `groups` occurs twice, so there is no pair to compare: give at least two images per group."
        )
    means = []
    for indices in members.values():
        rows = features[indices].double()
        first, second = torch.triu_indices(len(rows), len(rows), offset=1)
        if distance == "cosine":
            distances = 1 - F.cosine_similarity(rows[first], rows[second], dim=1)
        else:
            distances = (rows[first] - rows[second]).norm(dim=1)
        means.append(distances.mean().item())
    return math.fsum(means) / len(means)


def pixel_change(
    before: torch.Tensor,
    after: torch.Tensor,
    maps: torch.Tensor,
    threshold: float = 0.1,
    dilation: int | None = None,
) -> dict[str, float]:
    """Did the treatment change what was ill and leave the rest? Mean absolute change of the pixels, in [0, 1].

    Args:
        before: (B, 3, H, W) images in [0, 1].
        after: (B, 3, H, W) images of the same prompts and seeds after the treatment.
        maps: (B, 1, H, W) diagnosis of `before`.
        threshold: a pixel belongs to the diagnosed region if its confidence is above this; 0.1 as in the pixel loss.
        dilation: pixels by which the region is grown on each side, because a repair needs room; by default 1/32 of the
            short side (ours).

    Returns:
        `inside` and `outside`: the mean over all such pixels of all images; nan if there is none.
    """
    _check_maps(maps=maps)
    if before.shape != after.shape or before.ndim != 4 or before.shape[0] != maps.shape[0]:
        raise ValueError(
            "`before`, `after` and `maps` must belong to the same images, found shapes "
            f"{tuple(before.shape)}, {tuple(after.shape)} and {tuple(maps.shape)}."
        )
    if before.shape[-2:] != maps.shape[-2:]:
        raise ValueError(
            f"`maps` must be as large as the images, {tuple(before.shape[-2:])}, found {tuple(maps.shape)}."
        )
    if dilation is None:
        dilation = max(1, min(before.shape[-2:]) // 32)
    sums, counts = {True: 0.0, False: 0.0}, {True: 0, False: 0}
    for old, new, confidence in zip(before, after, maps):  # one at a time: as little memory for 1000 images as for one
        region = dilate((confidence > threshold)[None].float(), dilation)[0, 0] > 0
        change = (new.double() - old.double()).abs().mean(dim=0)
        for inside in (True, False):
            pixels = change[region == inside]
            sums[inside] += pixels.sum().item()
            counts[inside] += pixels.numel()
    mean = {inside: sums[inside] / counts[inside] if counts[inside] else math.nan for inside in (True, False)}
    return {"inside": mean[True], "outside": mean[False]}


def dilate(maps: torch.Tensor, radius: int) -> torch.Tensor:
    """(B, 1, H, W) -> same: each pixel becomes the maximum of the square of 2 * `radius` + 1 pixels around it."""
    return F.max_pool2d(maps, kernel_size=2 * radius + 1, stride=1, padding=radius)


def sharpness(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) in [0, 1] -> (B,): mean absolute Laplacian of the brightness (4 neighbours; flat images give 0).

    Reward tuning can collapse into blur, which lowers it, or into grid patterns, which raise it; ours.
    """
    gray = images.float().mean(dim=1, keepdim=True)
    kernel = gray.new_tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]).view(1, 1, 3, 3)
    return F.conv2d(gray, kernel).abs().flatten(1).mean(dim=1)


def wilson_interval(successes: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """Confidence interval of a frequency (Wilson 1927), in [0, 1]; `z` is in standard deviations, 1.96 = 95 %.

    It holds for independent images; images that share a prompt are not quite independent, and then it is too narrow.
    """
    if total < 1 or not 0 <= successes <= total:
        raise ValueError(f"Expected 0 <= successes <= total and total >= 1, found {successes} of {total}.")
    share, squared = successes / total, z * z / total
    center = (share + squared / 2) / (1 + squared)
    half = z * math.sqrt(share * (1 - share) / total + squared / (4 * total)) / (1 + squared)
    return max(0.0, center - half), min(1.0, center + half)


def _check_maps(**maps: torch.Tensor) -> None:
    for name, value in maps.items():
        if value.ndim != 4 or value.shape[1] != 1 or value.numel() == 0:
            raise ValueError(f"`{name}` must be artifact maps of shape (B, 1, H, W), found {tuple(value.shape)}.")
        low, high = value.aminmax()
        if not (0 <= low and high <= 1):  # nan is refused too
            raise ValueError(
                f"`{name}` must be artifact maps in [0, 1], found values in [{low:.3g}, {high:.3g}]. Pass confidences, not "
                "logits; 8-bit maps are divided by 255."
            )


def _check_pair(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Refuse what is no map, or not of one image; True where the target counts."""
    _check_maps(predicted=predicted, target=target.where(target != IGNORED, 0))
    if predicted.shape != target.shape:
        raise ValueError(
            f"The maps must have one shape, found `predicted` {tuple(predicted.shape)}, `target` {tuple(target.shape)}."
        )
    return target != IGNORED
