# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What a treatment did, in figures: the same prompts and seeds before and after it, judged and compared."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from tqdm.auto import tqdm

from . import metrics


CHANGE_THRESHOLD = 0.1  # a pixel belongs to the diagnosed region above this confidence, as in the pixel loss


class Judge(Protocol):
    """Anything that diagnoses images: an `ArtifactDetectorForSemanticSegmentation`, or a model of your own."""

    def confidence(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 1, H, W) in [0, 1], 1 = artifact."""


@dataclass
class ImagePairs:
    """N images from before a treatment, and those of the same prompts and seeds from after it.

    Attributes:
        before: (N, 3, H, W) in [0, 1], images of the untreated pipeline.
        after: (N, 3, H, W) in [0, 1], images of the treated pipeline.
        prompts: N texts.
        seeds: N seeds, only recorded.
        categories: N names; the artifact frequency is then also measured for each category.

    Raises:
        ValueError: the images are no such pairs, or a column has another length than they; the message names it.
    """

    before: torch.Tensor
    after: torch.Tensor
    prompts: Sequence[str]
    seeds: Sequence[int] | None = None
    categories: Sequence[str] | None = None

    def __post_init__(self):
        before, after = self.before, self.after
        if before.ndim != 4 or before.shape[1] != 3 or before.shape != after.shape or len(before) == 0:
            raise ValueError(
                "`before` and `after` must be images (N, 3, H, W) of the same prompts and seeds, at least one, found "
                f"{tuple(before.shape)} and {tuple(after.shape)}."
            )
        for side, images in self.sides().items():
            if not images.is_floating_point() or not (0 <= images.min() and images.max() <= 1):
                raise ValueError(
                    f"`{side}` must be floats in [0, 1], found {images.dtype} in "
                    f'[{images.min():.3g}, {images.max():.3g}]; a pipeline gives them with output_type="pt".'
                )
        for name in ("prompts", "seeds", "categories"):
            column = getattr(self, name)
            if column is not None and (isinstance(column, str) or len(column) != len(self)):
                raise ValueError(
                    f"`{name}` must have one entry per image, found {len(column)} for {len(self)} images."
                )

    def __len__(self) -> int:
        return len(self.before)

    def sides(self) -> dict[str, torch.Tensor]:
        """The images by the name of their side, "before" and "after"."""
        return {"before": self.before, "after": self.after}


def measure(
    pairs: ImagePairs,
    judges: Mapping[str, Judge],
    *,
    fidelity: Callable[[torch.Tensor, Sequence[str]], torch.Tensor] | None = None,
    features: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] | None = None,
    diversity_pairs: ImagePairs | None = None,
    threshold: float = 0.5,
    batch_size: int = 8,
    show_progress: bool = True,
) -> dict:
    """Judge and compare images of the same prompts and seeds from before and after a treatment.

    Args:
        pairs: the images.
        judges: name -> judge; the first one is the one that counts: `change` is measured around its diagnosis. Put a judge
            there that the treatment never saw, and the detector that was trained against after it, for example
            `{"judge": judge, "detector": detector}`.
        fidelity: callable(images, prompts) -> (N,) scores, higher is better, for example `CLIPReward`.
        features: name -> callable(images) -> (N, F), for the diversity: the Euclidean distance between images of one prompt.
            The first one counts. Normalise embeddings whose length means nothing. Without it the diversity is not measured.
        diversity_pairs: images made for the diversity, with several seeds per prompt, when `pairs` have one.
        threshold: an image has an artifact if its maximum confidence is at least this.
        batch_size: images per call of judges, fidelity and features.

    Returns:
        Figures that JSON can hold. Shares and confidences are in [0, 1]; a figure that was not measured is None:

        - `artifact_frequency[judge]`: `before`, `after` (lower is better), their `before_interval`, `after_interval`
          (95 %, Wilson), and the numbers of images `healed` and `harmed` (artifact before and none after, and the reverse)
        - `max_confidence[judge]`, `area_ratio[judge]`: means `before`, `after`
        - `fidelity`: `before`, `after`, and `difference_interval`, 95 % for the mean difference over the pairs
        - `diversity`: `before`, `after` by the first of the `features`; `diversity_by[name]`: the same by each of them
        - `sharpness`: `before`, `after`
        - `change`: `inside`, `outside` the region that the first judge diagnosed before the treatment
        - `categories[name][judge]`: as `artifact_frequency`
        - `counts`, `thresholds`
        - `images`: one row per image with prompt, seed and category, and for each judge the maximum confidences `before` and
          `after` and the `harm`, the mean confidence of the pixels after minus that before, in [-1, 1]: above 0 it became worse

    Raises:
        ValueError, TypeError: an argument that cannot be measured; the message names it.
    """
    groups = diversity_pairs if diversity_pairs is not None else pairs
    _check(judges, features, groups, batch_size)
    main = next(iter(judges))
    worst, area, mean = ({name: {} for name in judges} for _ in range(3))
    scores, main_maps = {}, None
    diversity = {name: {} for name in features or ()}
    steps = 2 * math.ceil(len(pairs) / batch_size) * (len(judges) + (fidelity is not None))
    steps += 2 * math.ceil(len(groups) / batch_size) * len(diversity)
    with tqdm(total=steps, desc="judging", unit="batch", disable=None if show_progress else True) as progress:
        for side, images in pairs.sides().items():
            for name, judge in judges.items():
                maps = _in_batches(lambda x, judge=judge: diagnose(judge, x), images, batch_size, progress)
                worst[name][side] = metrics.max_confidence(maps)
                area[name][side] = metrics.area_ratio(maps, threshold).mean().item()
                mean[name][side] = maps.mean(dim=(1, 2, 3), dtype=torch.float64)
                if (name, side) == (main, "before"):
                    main_maps = maps
            if fidelity is not None:
                scores[side] = _in_batches(fidelity, images, batch_size, progress, pairs.prompts)
        for side, images in groups.sides().items():
            for name in diversity:
                rows = _in_batches(features[name], images, batch_size, progress)
                diversity[name][side] = metrics.pairwise_diversity(rows, groups.prompts, distance="euclidean")

    everyone = torch.ones(len(pairs), dtype=torch.bool)
    members = {
        category: torch.tensor([name == category for name in pairs.categories])
        for category in sorted(set(pairs.categories or ()))
    }
    change = metrics.pixel_change(pairs.before, pairs.after, main_maps, CHANGE_THRESHOLD)
    figures = {
        "artifact_frequency": {name: _frequency(worst[name], everyone, threshold) for name in judges},
        "max_confidence": {name: {side: x.mean().item() for side, x in worst[name].items()} for name in judges},
        "area_ratio": area,
        "fidelity": _paired(scores) | {"name": "prompt fidelity"},
        "diversity": next(iter(diversity.values()), {"before": None, "after": None}),
        "diversity_by": diversity,
        "sharpness": {side: metrics.sharpness(images).mean().item() for side, images in pairs.sides().items()},
        "change": change | {"region_of": main},
        "categories": {
            category: {name: _frequency(worst[name], chosen, threshold) for name in judges}
            for category, chosen in members.items()
        },
        "counts": {
            "images": len(pairs),
            "prompts": len(set(pairs.prompts)),
            "diversity_images": len(groups) if diversity else 0,
            "height": pairs.before.shape[2],
            "width": pairs.before.shape[3],
        },
        "thresholds": {"artifact": threshold, "change": CHANGE_THRESHOLD},
        "images": [
            {
                "prompt": prompt,
                "seed": int(pairs.seeds[i]) if pairs.seeds is not None else None,
                "category": pairs.categories[i] if pairs.categories is not None else None,
                **{
                    name: {side: x[i].item() for side, x in worst[name].items()}
                    | {"harm": (mean[name]["after"][i] - mean[name]["before"][i]).item()}
                    for name in judges
                },
            }
            for i, prompt in enumerate(pairs.prompts)
        ],
    }
    return json_ready(figures)


def verdict(before: float, after: float, threshold: float) -> str:
    """What became of an image by its maximum confidences: "healed", "harmed", "both wrong" or "both sound"."""
    names = {(True, False): "healed", (False, True): "harmed", (True, True): "both wrong"}
    return names.get((before >= threshold, after >= threshold), "both sound")


@torch.no_grad()
def diagnose(judge: Judge, images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) -> (B, 1, H, W), both in [0, 1]: where the judge's weights lie, without dropout or gradient."""
    if not isinstance(judge, torch.nn.Module):
        return judge.confidence(images)
    weight, training = next(judge.parameters(), None), judge.training
    judge.eval()
    try:
        return judge.confidence(images if weight is None else images.to(weight.device))
    finally:
        judge.train(training)


def json_ready(value):
    """What JSON can hold: tuples as lists, numbers as Python's own, nan and infinity as None."""
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    if isinstance(value, torch.Tensor) or hasattr(value, "tolist"):
        return json_ready(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _frequency(worst: Mapping[str, torch.Tensor], chosen: torch.Tensor, threshold: float) -> dict:
    """Maximum confidences (N,) of each side -> frequencies over the chosen images, and those that changed sides."""
    broken, still_broken = (worst[side][chosen] >= threshold for side in ("before", "after"))
    count = len(broken)
    return {
        "before": broken.double().mean().item(),
        "after": still_broken.double().mean().item(),
        "before_interval": metrics.wilson_interval(int(broken.sum()), count),
        "after_interval": metrics.wilson_interval(int(still_broken.sum()), count),
        "images": count,
        "healed": int((broken & ~still_broken).sum()),
        "harmed": int((~broken & still_broken).sum()),
    }


def _paired(scores: Mapping[str, torch.Tensor]) -> dict:
    if not scores:
        return {"before": None, "after": None, "difference_interval": None}
    before, after = scores["before"].double(), scores["after"].double()
    interval, difference = None, after - before
    if len(difference) > 1:
        half = metrics.Z_95 * difference.std().item() / math.sqrt(len(difference))
        interval = (difference.mean().item() - half, difference.mean().item() + half)
    return {"before": before.mean().item(), "after": after.mean().item(), "difference_interval": interval}


@torch.no_grad()
def _in_batches(function, images: torch.Tensor, batch_size: int, progress, *columns: Sequence) -> torch.Tensor:
    results = []
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        result = torch.as_tensor(function(images[part], *(column[part] for column in columns))).detach().float().cpu()
        if len(result) != len(images[part]):
            raise ValueError(
                f"{function!r} returned {len(result)} rows for {len(images[part])} images; expected one per image."
            )
        results.append(result)
        progress.update()
    return torch.cat(results)


def _check(judges, features, groups: ImagePairs, batch_size: int) -> None:
    if not judges:
        raise ValueError('`judges` is empty; give at least one, for example {"judge": judge, "detector": detector}.')
    for name, judge in judges.items():
        if not callable(getattr(judge, "confidence", None)):
            raise TypeError(f"`judges[{name!r}]` has no method `confidence(images)`, found {type(judge).__name__}.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, found {batch_size}.")
    if features and len(set(groups.prompts)) == len(groups):
        raise ValueError(
            "Diversity is a distance between images of one prompt, but every image has a prompt of its own: give "
            "`diversity_pairs` with several seeds per prompt, or leave out `features`."
        )
