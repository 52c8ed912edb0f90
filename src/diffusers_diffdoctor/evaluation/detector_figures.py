# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The figures of a detector over any number of images, counted while they pass by and added up over processes.

What is kept of an image is a row of counts of one length, whatever its size, and what is kept of a set of images is the sum of
their rows. So the figures do not depend on batches, on their order or on processes, and no map has to be held.

Figures that need an order of the pixels or images (average precision, area under the ROC curve) are those of confidences in bins
of equal width in log-odds: two confidences are told apart if their odds differ by more than about 3 %, near 0 and near 1 as well as
between. The bins are ours; [`~metrics.average_precision_bounds`] and [`~metrics.roc_auc`] say how far that can be off.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch

from . import metrics


BINS = 1024
HIGHEST_LOGIT = 16.0  # of the bins, and lowest but for its sign: float32 has no confidence closer to 1 than 6e-8
CALIBRATION_BINS = 15  # of equal width in confidence, as Guo et al. (2017)
PHOTO = "photo"

# the columns of an image's row, in this order
COLUMNS = {
    "images": 1,
    "mse": 1,
    "kl_misses": 1,
    "kl_false_alarms": 1,
    "wrong": 1,  # it has an artifact
    "claimed": 1,  # the detector sees one
    "found": 1,  # both
    "intersection": 1,  # pixels
    "union": 1,
    "calibration_counts": CALIBRATION_BINS,
    "calibration_confidences": CALIBRATION_BINS,
    "calibration_truths": CALIBRATION_BINS,
    "sound_pixels": BINS,
    "wrong_pixels": BINS,
    "sound_images": BINS,
    "wrong_images": BINS,
}
GROUPS = ("all", "with_artifacts", "without_artifacts", "photographs")
# figure -> how people read its name, and its value
SHOWN = {
    "images": ("images", "{}"),
    "mse": ("MSE", "{:.4f}"),
    "kl_misses": ("KL (misses)", "{:.4f}"),
    "kl_false_alarms": ("KL(1-) (false alarms)", "{:.4f}"),
    "pixel_ap": ("pixel AP", "{:.3f}"),
    "iou": ("IoU", "{:.3f}"),
    "image_auroc": ("image AUROC", "{:.3f}"),
    "calibration_error": ("calibration error", "{:.4f}"),
    "misses": ("missed", "{:.1%}"),
    "false_alarms": ("false alarms", "{:.1%}"),
}
START = dict(zip(COLUMNS, accumulate(COLUMNS.values(), initial=0)))  # number of each one's first column


def bin_of(confidence: torch.Tensor) -> torch.Tensor:
    """Confidences in [0, 1] -> int64 in [0, BINS): the bin of their log-odds."""
    scaled = (torch.logit(confidence.double()) / HIGHEST_LOGIT + 1) * (BINS / 2)
    return scaled.clamp(0, BINS - 1).long()  # infinities too


def count_images(confidence: torch.Tensor, truth: torch.Tensor, threshold: float = 0.5) -> torch.Tensor:
    """What [`DetectorFigures`] adds up: a row for each image, on the device of the maps.

    Args:
        confidence: (B, 1, H, W) in [0, 1].
        truth: (B, 1, H, W) in [0, 1], or -1 where a pixel does not count.
        threshold: confidence, and truth, from which a pixel is an artifact.

    Returns:
        float64 (B, sum(COLUMNS.values())). The row of an image of which no pixel counts is zero.
    """
    if confidence.device.type == "mps":  # which has no float64
        confidence, truth = confidence.cpu(), truth.cpu()
    confidence, truth = confidence.float(), truth.float()
    images = {
        "mse": metrics.map_mse(confidence, truth),
        "kl_misses": metrics.kl_misses(confidence, truth),
        "kl_false_alarms": metrics.kl_false_alarms(confidence, truth),
    }
    size, (confidence, truth) = len(truth), (maps.flatten(1) for maps in (confidence, truth))
    counted = truth != metrics.IGNORED
    row = torch.arange(size, device=truth.device)[:, None].expand_as(truth)[counted]
    highest, highest_truth = (values.where(counted, 0).amax(dim=1) for values in (confidence, truth))
    wrong, claimed = highest_truth >= threshold, highest >= threshold
    images |= {"images": counted.any(dim=1), "wrong": wrong, "claimed": claimed, "found": wrong & claimed}
    score = torch.nn.functional.one_hot(bin_of(highest), BINS)
    images |= {"sound_images": score * ~wrong[:, None], "wrong_images": score * wrong[:, None]}

    confidence, truth = confidence[counted], truth[counted]
    claimed, wrong = confidence >= threshold, truth >= threshold
    images["intersection"] = _sums(row[claimed & wrong], size)
    images["union"] = _sums(row[claimed | wrong], size)
    cell = row * CALIBRATION_BINS + (confidence * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    for name, values in (("counts", None), ("confidences", confidence), ("truths", truth)):
        images[f"calibration_{name}"] = _sums(cell, size * CALIBRATION_BINS, values)
    cell = row * BINS + bin_of(confidence)
    images["sound_pixels"], images["wrong_pixels"] = _sums(cell[~wrong], size * BINS), _sums(cell[wrong], size * BINS)

    rows = torch.cat([images[name].double().reshape(size, width) for name, width in COLUMNS.items()], dim=1)
    return torch.where(counted.any(dim=1)[:, None], rows, 0)


def _sums(cell: torch.Tensor, size: int, values: torch.Tensor | None = None) -> torch.Tensor:
    """How often each of `size` cells occurs, or the sums of their values."""
    if values is None:
        return torch.bincount(cell, minlength=size)
    return torch.zeros(size, dtype=torch.float64, device=cell.device).scatter_add_(0, cell, values.double())


class DetectorFigures:
    """Figures of a detector: over all images, those with and without artifacts, photographs, each category and each generator.

    ```python
    figures = DetectorFigures()
    for rows in batches:
        figures.update(confidence, truth, rows["category"], rows["generator"], rows["source"])
    for other in gather_object([figures])[1:]:  # of accelerate, on several processes
        figures.merge(other)
    figures.compute()
    ```

    Args:
        threshold: confidence, and truth, in (0, 1] from which a pixel is an artifact, and an image with such a pixel has one.
    """

    def __init__(self, threshold: float = 0.5):
        if not 0 < threshold <= 1:
            raise ValueError(f"`threshold` must be in (0, 1], found {threshold}.")
        self.threshold = threshold
        self._sums: dict[
            tuple[str, str], torch.Tensor
        ] = {}  # (kind of group, its name) -> the sum of its images' rows

    def update(
        self,
        confidence: torch.Tensor,
        truth: torch.Tensor,
        category: Sequence[Iterable[str] | str | None] | None = None,
        generator: Sequence[str | None] | None = None,
        source: Sequence[str | None] | None = None,
    ) -> None:
        """Count a batch of images of one size.

        Args:
            confidence: (B, 1, H, W) in [0, 1], what the detector says.
            truth: (B, 1, H, W) in [0, 1], or -1 where a pixel does not count.
            category: for each image the names of what is in it; it counts in each of them.
            generator: for each image what made it; None is in no generator's figures.
            source: for each image where it is from; "photo" is a photograph.

        Raises:
            ValueError: maps of another shape or range, or a list of another length.
        """
        self.add(count_images(confidence, truth, self.threshold), category, generator, source)

    def add(
        self,
        rows: torch.Tensor,
        category: Sequence[Iterable[str] | str | None] | None = None,
        generator: Sequence[str | None] | None = None,
        source: Sequence[str | None] | None = None,
    ) -> None:
        """Count images of which [`count_images`] gave the rows, (B, columns), with the same threshold."""
        columns = {"category": category, "generator": generator, "source": source}
        for name, values in columns.items():
            if values is not None and len(values) != len(rows):
                raise ValueError(
                    f"`{name}` must have an entry for each of the {len(rows)} images, found {len(values)}."
                )
        category, generator, source = (values or [None] * len(rows) for values in columns.values())
        rows = rows.detach().to("cpu", torch.float64)
        members: dict[tuple[str, str], list[int]] = {}
        for number, (categories, made_by, origin) in enumerate(zip(category, generator, source)):
            if not rows[number, START["images"]]:
                continue
            groups = [("all", ""), ("with_artifacts" if rows[number, START["wrong"]] else "without_artifacts", "")]
            groups += [("photographs", "")] if origin == PHOTO else []
            names = [categories] if isinstance(categories, str) else categories or ()
            groups += [("categories", name) for name in dict.fromkeys(names)]
            groups += [("generators", made_by)] if made_by is not None else []
            for group in groups:
                members.setdefault(group, []).append(number)
        for group, numbers in members.items():
            self._sums[group] = rows[numbers].sum(dim=0) + self._sums.get(group, 0)

    def merge(self, other: "DetectorFigures") -> "DetectorFigures":
        """Add the images that another process, or shard, has counted. Returns itself."""
        if other.threshold != self.threshold:
            raise ValueError(f"The thresholds differ: {self.threshold} and {other.threshold}.")
        for group, sums in other._sums.items():
            self._sums[group] = self._sums.get(group, 0) + sums
        return self

    def compute(self) -> dict[str, Any]:
        """The figures of each group.

        Returns:
            `all`, `with_artifacts`, `without_artifacts` and `photographs`, each a dictionary of figures; `categories` and
            `generators`, each name -> figures, in the order of names. A group's figures:

            - `images`, and how many of them have an artifact: `images_with_artifacts`;
            - means over the images: `mse`, `kl_misses`, `kl_false_alarms`;
            - over all their pixels: `pixel_ap`, the average precision; `iou` of what reaches the threshold, in the detector's maps
              and in the true ones; `calibration_error`, expected, in 15 bins;
            - `image_auroc`, of the highest confidence as a sign of an artifact;
            - `misses`, the share of images with artifacts in which none is seen; `false_alarms`, the share of the others in which
              one is; `artifact_frequency`, the share of all in which one is seen.

            A figure over no image or pixel is nan, such as `misses` of photographs.
        """
        nobody = torch.zeros(sum(COLUMNS.values()), dtype=torch.float64)
        groups = {kind: _figures(self._sums.get((kind, ""), nobody)) for kind in GROUPS}
        for kind in ("categories", "generators"):
            names = sorted(name for group, name in self._sums if group == kind)
            groups[kind] = {name: _figures(self._sums[kind, name]) for name in names}
        return groups


def headline(figures: dict[str, Any]) -> dict[str, float]:
    """The figures of [`DetectorFigures.compute`] for a log, as one level: `mse`, `photographs_mse`, `without_artifacts_mse`, ...

    Those of all images keep their names, and are there even if they are nan; of the other groups what is defined. Categories
    and generators are left out.
    """
    flat = dict(figures["all"])
    for kind in GROUPS[1:]:
        flat |= {f"{kind}_{name}": value for name, value in figures[kind].items() if value == value}
    return flat


def figure_table(figures: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) of a table for people: a row for each group that has images, then for each generator and category.

    Args:
        figures: of [`DetectorFigures.compute`]; what is missing, nan, or None as in JSON is left empty.
    """
    lines = [(name.replace("_", " "), figures[name]) for name in GROUPS if figures.get(name, {}).get("images")]
    for kind, what in (("generators", "generator"), ("categories", "category")):
        lines += [(f"{what} {name}", group) for name, group in figures.get(kind, {}).items()]
    rows = []
    for name, group in lines:
        values = [(group.get(key), style) for key, (_, style) in SHOWN.items()]
        rows.append(
            [name, *("" if value is None or value != value else style.format(value) for value, style in values)]
        )
    return ["", *(heading for heading, _ in SHOWN.values())], rows


def from_headline(flat: Mapping[str, float], prefix: str = "") -> dict[str, dict[str, dict[str, float]]]:
    """What [`headline`] made for a log, back in groups: the name of a set of images -> group -> figures.

    Args:
        flat: an entry of a log; what is no figure is passed over. A set's name stands before the figures': `faces_mse`.
        prefix: of the names, such as `eval_`.
    """
    sets: dict[str, dict[str, dict[str, float]]] = {}
    for key, value in flat.items():
        # the longest, because `kl_misses` ends in `misses` as well
        ends = [figure for figure in SHOWN if f"_{key.removeprefix(prefix)}".endswith(f"_{figure}")]
        if not key.startswith(prefix) or not ends:
            continue
        figure = max(ends, key=len)
        rest = f"_{key.removeprefix(prefix)}".removesuffix(f"_{figure}")
        group = next((name for name in GROUPS[1:] if rest.endswith(f"_{name}")), None)
        name = rest if group is None else rest.removesuffix(f"_{group}")
        sets.setdefault(name.removeprefix("_"), {}).setdefault(group or "all", {})[figure] = value
    return sets


def _figures(sums: torch.Tensor) -> dict[str, float]:
    """Sum of rows -> figures."""
    total = dict(zip(COLUMNS, sums.split(list(COLUMNS.values()))))
    images, wrong, claimed, found = (total[name].item() for name in ("images", "wrong", "claimed", "found"))
    return {
        "images": int(images),
        "images_with_artifacts": int(wrong),
        "mse": _ratio(total["mse"].item(), images),
        "kl_misses": _ratio(total["kl_misses"].item(), images),
        "kl_false_alarms": _ratio(total["kl_false_alarms"].item(), images),
        "pixel_ap": metrics.average_precision(total["wrong_pixels"], total["sound_pixels"]),
        "iou": _ratio(total["intersection"].item(), total["union"].item()),
        "calibration_error": metrics.calibration_error(
            *(total[f"calibration_{name}"] for name in ("counts", "confidences", "truths"))
        ),
        "image_auroc": metrics.roc_auc(total["wrong_images"], total["sound_images"]),
        "misses": _ratio(wrong - found, wrong),
        "false_alarms": _ratio(claimed - found, images - wrong),
        "artifact_frequency": _ratio(claimed, images),
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
