# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Drift: whether a new generator's images look like what a detector has learned from, or whether some should be labelled first.

A detector grows stale: the release of the paper's authors finds little in images of generators that came after it. What can be known
without a label is whether the new images look different to it. The rule is ours.

An image is what the detector's encoder makes of it. Two questions are asked of these descriptions. Do they differ from those of
the known images, more than chance explains ([`permutation_test`])? And are they far from all of them ([`far_share`])? Only if both
are answered with yes, for the known images as a whole and for those of each known generator, the new ones are called unknown:
more images of one known generator differ from the mixture that it is a part of, but they are not far from it.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from datasets import Features, List, Value

from ..detector.modeling_artifact_detector import normalise_images
from ..evaluation.metrics import sharpness, wilson_interval
from ..evaluation.report import Figure, Picture, Section, Table, html_report
from ..files import write_atomically
from ..images import to_image_tensor
from ..names import shortened
from ..pictures import histograms, image_grid
from .by_detector import DetectorStage
from .schema import Row, decode_image, row_seed
from .shards import Shard, rows_at
from .stage import DATA, LEFT_OUT, MARKERS, Result, row_name, run_stage


PERMUTATIONS = 999
LEVEL = 0.01  # of the test: so often images of the known kind are called different by chance, at most
FAR = 0.05  # of the known images lie so far from the others
FAR_CUTOFF = 0.1  # the share of the new ones that do must be higher than this, and not by chance
ENOUGH = 50  # images: with fewer, that nothing was found says little
LEAST = {"known": 40, "new": 10}  # images: with fewer nothing is said
STATISTICS = {
    "brightness": "mean, in [0, 1]",
    "contrast": "standard deviation of the brightness",
    "saturation": "mean difference of the highest and the lowest channel",
    "sharpness": "mean absolute Laplacian of the brightness",
    "megapixels": "of the image",
    "aspect": "width by height",
}
PHOTOGRAPHS, UNKNOWN = "photographs", "not said"


# --- comparing ----------------------------------------------------------------------------------------------------------------


def distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(N, F) and (M, F) -> (N, M): Euclidean distances between the rows."""
    first, second = (torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float64)) for rows in (first, second))
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist").numpy()


def permutation_test(known: np.ndarray, new: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Do two samples come from one distribution? By their energy distance (Szekely and Rizzo 2013) and exchanges of their labels.

    `E = 2 mean |x - y| - mean |x - x'| - mean |y - y'|`, which is 0 for equal distributions only.

    Each feature is divided by its standard deviation over both samples.

    Args:
        known, new: (N, F) and (M, F).
        seed: of the exchanges.

    Returns:
        `energy`, E divided by `2 mean |x - y|`, in [0, 1]; `p`, the share of label exchanges (the given labels among them) with at
        least this E: below any level at most so often where the distributions are equal, whatever they are and however few members.
    """
    both = np.concatenate([known, new]).astype(np.float64)
    both = both / np.where(both.std(axis=0) > 0, both.std(axis=0), 1)
    between, is_new = distances(both, both), np.arange(len(both)) >= len(known)
    rng = np.random.default_rng(seed)
    labels = np.stack([is_new, *(rng.permutation(is_new) for _ in range(PERMUTATIONS))]).astype(np.float64)
    inside, count, others = labels @ between, len(new), len(known)
    total = between.sum()
    new_new = (inside * labels).sum(axis=1)
    across = labels @ between.sum(axis=1) - new_new
    known_known = total - new_new - 2 * across
    mean_across = across / (count * others)
    energy = 2 * mean_across - new_new / count**2 - known_known / others**2
    # exchanges that give the same division differ by rounding
    p = (energy >= energy[0] - 1e-9 * abs(energy[0])).mean()
    return {"energy": float(energy[0] / (2 * mean_across[0])) if mean_across[0] else 0.0, "p": float(p)}


def far_share(known: np.ndarray, new: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """How far images lie from the known ones: the Mahalanobis distance, in units of the one that 5 % of the known images exceed.

    One half of the known images gives mean and covariance (shrunk after Ledoit and Wolf 2004, for there may be fewer images than
    features), the other half gives the unit, and the same with the halves exchanged. So no known image is measured by what it was
    itself a part of.

    Args:
        known, new: (N, F) and (M, F).
        seed: of the halves.

    Returns:
        (N,) and (M,); of a new image the mean of the two. Above 1 is far.
    """
    scale = np.where(known.std(axis=0) > 0, known.std(axis=0), 1)
    known, new = known / scale, new / scale
    order = np.random.default_rng(seed).permutation(len(known))
    halves = np.array_split(order, 2)
    own, others = np.empty(len(known)), np.zeros(len(new))
    for fitted, measured in (halves, halves[::-1]):
        mean, factor = known[fitted].mean(axis=0), np.linalg.cholesky(shrunk_covariance(known[fitted]))
        distance = [
            np.linalg.norm(np.linalg.solve(factor, (rows - mean).T), axis=0) for rows in (known[measured], new)
        ]
        # of so many and one more, a share of 5 % at most exceeds it on average
        place = min(len(measured), math.ceil((len(measured) + 1) * (1 - FAR)))
        radius = max(np.sort(distance[0])[place - 1], np.finfo(float).tiny)  # 0 where all is constant
        own[measured] = distance[0] / radius
        others += distance[1] / radius / 2
    return own, others


def shrunk_covariance(rows: np.ndarray) -> np.ndarray:
    """(N, F) -> (F, F): the covariance, drawn towards a multiple of the identity by as much as its own errors ask for.

    Ledoit and Wolf (2004), "A well-conditioned estimator for large-dimensional covariance matrices".
    """
    count, size = rows.shape
    rows = rows - rows.mean(axis=0)
    sample = rows.T @ rows / count
    level = np.trace(sample) / size
    spread = ((sample - level * np.eye(size)) ** 2).sum()
    error = (((rows**2).sum(axis=1) ** 2).sum() / count - (sample**2).sum()) / count
    share = min(1.0, max(0.0, error / spread)) if spread > 0 else 1.0
    # the last term only where all features are constant
    return (1 - share) * sample + (share * level + (level == 0)) * np.eye(size)


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Values of p corrected for their number (Holm 1979)."""
    corrected, highest = {}, 0.0
    for rank, (name, value) in enumerate(sorted(p.items(), key=lambda item: item[1])):
        highest = max(highest, min(1.0, value * (len(p) - rank)))
        corrected[name] = highest
    return {name: corrected[name] for name in p}


def compare(known: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray], groups: Sequence[str]) -> dict[str, Any]:
    """Compare described images; see the module.

    Args:
        known, new: `features` (N, F), `max_confidence` (N,), and each of `STATISTICS` (N,).
        groups: for each known image its generator, or what stands for it.

    Returns:
        `verdict`, "known", "unknown" or "unclear"; `test` of all known images and `generators`, the same for each group that has ten:
        `images`, `energy` and `p`; `far`: `share` of the new images with its 95 % `interval`, and the distances `known` and `new`
        of [`far_share`]; `max_confidence` and each of the statistics: `known` and `new` (medians), `energy`, `p` and the `p_corrected` of all of them.

    Raises:
        ValueError: there are fewer than 40 known or 10 new images.
    """
    counts = {"known": len(known["features"]), "new": len(new["features"])}
    for side, count in counts.items():
        if count < LEAST[side]:
            raise ValueError(
                f"Of the {side} images {count} can be compared; with fewer than {LEAST[side]} nothing is said."
            )
    whole, generators = permutation_test(known["features"], new["features"]), {}
    for group in sorted(set(groups)):
        chosen = np.array([name == group for name in groups])
        if chosen.sum() >= LEAST["new"]:
            test = permutation_test(known["features"][chosen], new["features"])
            generators[group] = {"images": int(chosen.sum()), **test}
    own, others = far_share(known["features"], new["features"])
    far = int((others > 1).sum())
    low, high = wilson_interval(far, counts["new"])
    differs = all(test["p"] <= LEVEL for test in (whole, *generators.values()))
    scalars = {}
    for name in ("max_confidence", *STATISTICS):
        test = permutation_test(known[name][:, None], new[name][:, None])
        scalars[name] = {"known": float(np.median(known[name])), "new": float(np.median(new[name])), **test}
    corrected = holm({name: row["p"] for name, row in scalars.items()})
    if differs and low > FAR_CUTOFF:
        verdict = "unknown"
    else:
        verdict = "known" if counts["new"] >= ENOUGH else "unclear"
    return {
        "verdict": verdict,
        "test": {"images": counts["known"], **whole},
        "generators": generators,
        "far": {
            "share": far / counts["new"],
            "interval": [low, high],
            "known": own.tolist(),
            "new": others.tolist(),
        },
        **{name: row | {"p_corrected": corrected[name]} for name, row in scalars.items()},
    }


# --- describing ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Describe(DetectorStage):
    """Images as a detector sees them, a row for each: `features` (of each stage of its encoder the mean and the standard deviation of
    each channel over the image: what there is, and how it changes), `max_confidence`, and the numbers of `STATISTICS`.

    Args:
        share: of the images, in (0, 1], chosen by a digest of each; the others are left out.
        seed: of that choice.
    """

    share: float = 1.0
    seed: int = 0

    name: ClassVar[str] = "describe"

    def features(self, shard: Shard) -> Features:
        numbers = dict.fromkeys(("max_confidence", *STATISTICS), Value("float32"))
        own = {"position": Value("int64"), "path": Value("string"), "features": List(Value("float32"))} | numbers
        return Features(own | {name: shard.features[name] for name in ("category", "generator", "source")})

    def skips(self, row: Row) -> bool:
        return row_seed(self.seed, row) >= self.share * 2**31

    def skipped(self, row: Row) -> Result:
        return LEFT_OUT

    def look(self, models: list[torch.nn.Module], images: torch.Tensor) -> np.ndarray:
        (model,) = models
        pixels = normalise_images(images, model.config)
        with _encoded(model) as stages:
            outputs = model(pixels.to(next(model.parameters()).dtype))
        stages = [stage.float().flatten(2) for stage in stages]
        features = torch.cat([f(stage, dim=2) for stage in stages for f in (torch.mean, torch.std)], dim=1)
        # as in `confidence`, whose highest value is a little below that of the detector's own resolution
        logits = F.interpolate(outputs.logits.float(), images.shape[-2:], mode="bilinear", align_corners=False)
        brightness = images.mean(dim=1).flatten(1)
        height, width = images.shape[-2:]
        size = torch.tensor([height * width / 1e6, width / height], device=images.device).expand(len(images), 2)
        scalars = [
            logits.sigmoid().flatten(1).amax(dim=1),
            brightness.mean(dim=1),
            brightness.std(dim=1),
            (images.amax(dim=1) - images.amin(dim=1)).mean(dim=(1, 2)),
            sharpness(images),
        ]
        seen = torch.cat([features, torch.stack(scalars, dim=1), size], dim=1)
        if not seen.isfinite().all():
            raise ValueError("the detector gave features that are not numbers")
        return seen.cpu().numpy()

    def answer(self, row: Row, seen: np.ndarray, position: int) -> Result:
        names = ("max_confidence", *STATISTICS)
        scalars = dict(zip(names, seen[-len(names) :].tolist()))
        features = seen[: -len(names)].tolist()
        return {**row, **scalars, "features": features, "position": position, "path": row_name(row)}


@contextmanager
def _encoded(model: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """What the encoder gives to the decode head in a call of the detector, whichever encoder that is: maps (B, C, h, w)."""
    stages: list[torch.Tensor] = []
    hook = model.decode_head.register_forward_pre_hook(lambda head, given: stages.extend(given[0]))
    try:
        yield stages
    finally:
        hook.remove()


def drift(
    new: Sequence[Shard],
    known: Sequence[Shard],
    describe: Describe,
    output_dir: str | os.PathLike,
    *,
    images: int = 1000,
    threshold: float = 0.5,
    pictures: int = 12,
    names: Mapping[str, str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Compare a new generator's images with what a detector knows, and write a report. Stopped, it goes on where it was when it is
    called again.

    Args:
        new: shards of the new images; no label is needed.
        known: shards of what the detector has learned from, or of the same kinds of images.
        describe: the detector and how it looks.
        output_dir: folder for drift.json, drift.png and report.html.
        images: about how many of each side are looked at, chosen by digests of their files.
        threshold: highest confidence in (0, 1] from which an image has an artifact.
        pictures: most of the new images that lie farthest from what is known, to show.
        names: what to call `new`, `known` and `detector` in the report.
        **options: `restart` and `show_progress` of [`run_stage`].

    Returns:
        What drift.json holds: of [`compare`], without single distances, `images` of each side, `artifacts` of each side (`share`
        with its 95 % `interval`), `farthest` (paths of new images, the farthest first, at most 100: label these), `says` (the verdict
        in words), `quarantined`, and the settings.

    Raises:
        ValueError: an argument is out of range, there are too few images; and what [`run_stage`] raises.
    """
    if images < LEAST["known"]:
        raise ValueError(f"`images` must be at least {LEAST['known']}, found {images}.")
    if not 0 < threshold <= 1:
        raise ValueError(f"`threshold` must be in (0, 1], found {threshold}.")
    output_dir = Path(output_dir)
    sides, rows, quarantined = {"known": known, "new": new}, {}, {}
    for side, shards in sides.items():
        total = sum(shard.rows for shard in shards)
        stage = dataclasses.replace(describe, share=min(1.0, images / total))
        folder = output_dir / MARKERS / side
        counts = run_stage(stage, shards, folder, **options)
        quarantined[side] = counts["quarantined"]
        rows[side] = list(_described(folder))
    arrays = {side: _arrays(found) for side, found in rows.items()}
    found = compare(arrays["known"], arrays["new"], [_group(row) for row in rows["known"]])
    far = found["far"]
    own, others = far.pop("known"), far.pop("new")
    order = sorted(range(len(others)), key=lambda i: (-others[i], rows["new"][i]["path"] or ""))
    result = {
        "verdict": found["verdict"],
        "says": "",
        "images": {side: len(found) for side, found in rows.items()},
        "artifacts": {side: _artifacts(arrays[side]["max_confidence"], threshold) for side in rows},
        **{key: value for key, value in found.items() if key != "verdict"},
        "farthest": [rows["new"][i]["path"] for i in order[:100]],
        "quarantined": quarantined,
        "settings": {
            **{key: shortened(name) for key, name in (names or {}).items()},
            "weights_sha256": describe.weights_sha256[0],
            "images": images,
            "threshold": threshold,
            "level": LEVEL,
            "permutations": PERMUTATIONS,
        },
    }
    result["says"] = in_words(result)
    panels = [
        ("distance to what it knows", {"known": own, "new": others}, 1.0),
        ("highest confidence", {side: arrays[side]["max_confidence"].tolist() for side in rows}, threshold),
    ]
    picture = histograms(panels, output_dir / "drift.png")
    shown = [(rows["new"][i], others[i]) for i in order[:pictures]]
    _write_report(output_dir, result, picture, _pictures(new, shown))
    write_atomically(output_dir / "drift.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def _described(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of [`Describe`], each with the number of its `shard`."""
    for number, file in enumerate(sorted((folder / DATA).glob("*.parquet"))):
        for row in pq.read_table(file).to_pylist():
            yield row | {"shard": number}


def _arrays(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    names = ("features", "max_confidence", *STATISTICS)
    return {name: np.array([row[name] for row in rows], np.float64) for name in names}


def _group(row: Mapping[str, Any]) -> str:
    return row["generator"] or (PHOTOGRAPHS if row["source"] == "photo" else UNKNOWN)


def _artifacts(confidence: np.ndarray, threshold: float) -> dict[str, Any]:
    count = int((confidence >= threshold).sum())
    return {"share": count / len(confidence), "interval": list(wilson_interval(count, len(confidence)))}


# --- telling ------------------------------------------------------------------------------------------------------------------


def in_words(result: Mapping[str, Any]) -> str:
    """The verdict of [`drift`], why, and what to do."""
    far, test, count = result["far"], result["test"], result["images"]["new"]
    low, high = (f"{100 * end:.0f}" for end in far["interval"])
    share = f"{100 * far['share']:.0f} % ({low} to {high} %) lie farther from what it knows than {1 - FAR:.0%} of the known"
    different = test["p"] <= LEVEL
    if result["verdict"] == "unknown":
        text = f"These images do not look like what the detector knows: {share} images do. Label some, the farthest first."
    elif result["verdict"] == "unclear":
        text = (
            f"Nothing shows that these {count} images are unlike what the detector knows ({share} images), but with fewer than "
            f"{ENOUGH} images only a large difference would show. Compare more."
        )
    elif different:
        tests = result["generators"].values()
        what = (
            "are another mixture" if any(test["p"] > LEVEL for test in tests) else "differ from every known generator"
        )
        text = f"These images look like what the detector knows. They {what}, but only {share} images do."
    else:
        text = f"These images look like what the detector knows: {share} images do, and no difference beyond chance was found."
    found, before = (result["artifacts"][side] for side in ("new", "known"))
    text += f" It sees an artifact in {found['share']:.0%} of the new images and in {before['share']:.0%} of the known ones."
    if found["interval"][1] < before["interval"][0]:
        text += " Fewer can mean a better generator, or a detector that is blind to its mistakes: only labels tell."
    return text


def _pictures(shards: Sequence[Shard], shown: Sequence[tuple[Mapping[str, Any], float]]) -> list[Picture]:
    found = rows_at(shards, [(row["shard"], row["position"]) for row, _ in shown])
    pictures = []
    for row, distance in shown:
        image = to_image_tensor(decode_image(found[row["shard"], row["position"]]))
        note = f"distance {distance:.2f}, highest confidence {row['max_confidence']:.2f}"
        pictures.append(Picture(image_grid([[image]], margin=0, tile_size=345), Path(row["path"] or "").name, note))
    return pictures


def _write_report(output_dir: Path, result: Mapping[str, Any], picture: Path, shown: Sequence[Picture]) -> None:
    tone = {"known": "good", "unknown": "bad", "unclear": "plain"}[result["verdict"]]
    far, artifacts = result["far"], result["artifacts"]
    figures = [
        Figure(
            "The new images are",
            result["verdict"],
            f"{result['images']['new']} beside {result['images']['known']}",
            tone,
        ),
        Figure("Far from what it knows", f"{far['share']:.0%}", f"of the new images; {FAR:.0%} of the known ones"),
        Figure(
            "With an artifact",
            f"{artifacts['new']['share']:.0%}",
            f"of the new images, as the detector sees it; {artifacts['known']['share']:.0%} of the known ones",
        ),
    ]
    tests = {"all known images": result["test"], **result["generators"]}
    rows = [(name, str(t["images"]), f"{t['energy']:.3f}", f"{t['p']:.3f}") for name, t in tests.items()]
    numbers = [
        (
            name.replace("_", " "),
            f"{row['known']:.3f}",
            f"{row['new']:.3f}",
            f"{row['energy']:.3f}",
            f"{row['p_corrected']:.3f}",
        )
        for name, row in ((name, result[name]) for name in ("max_confidence", *STATISTICS))
    ]
    sections = [
        Section("Distributions", pictures=[Picture(picture)], wide=True),
        Section(
            "Beside what the detector knows",
            "Energy distance of the encoder's features: 0 for equal distributions, 1 at most. p is the share of exchanges of new and "
            f"known images with at least this distance; at most {LEVEL:g} for all of them counts as different.",
            Table(("", "images", "energy", "p"), rows),
        ),
        Section(
            "Simple numbers",
            "Medians; p is corrected for the number of lines. They explain a difference, and decide nothing.",
            Table(("", "known", "new", "energy", "p"), numbers),
        ),
    ]
    if shown:
        sections.append(Section("The farthest new images", "Label such ones first.", pictures=shown))
    bad = [(f"{side}: {reason}", str(n)) for side, all_ in result["quarantined"].items() for reason, n in all_.items()]
    if bad:
        sections.append(Section("Quarantined", table=Table(("", "images"), bad)))
    settings = [(key.replace("_", " "), str(value)) for key, value in result["settings"].items()]
    sections.append(Section("Settings", table=Table(("", ""), settings)))
    html_report(output_dir / "report.html", "Drift", figures, sections, result["says"])
