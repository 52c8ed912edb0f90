# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Measure a detector on a labelled dataset: figures by group, and pictures of its worst false alarms and misses."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from datasets import Features, List, Value

from ..detector.augmentation import from_picture, without_ignored
from ..detector.modeling_artifact_detector import normalise_images
from ..detector.tiling import tiled_confidence
from ..evaluation.detector_figures import SHOWN, START, DetectorFigures, count_images, figure_table
from ..evaluation.pairs import json_ready
from ..evaluation.report import Figure, Picture, Section, Table, html_report
from ..files import write_atomically
from ..images import to_image_tensor
from ..names import shortened
from ..pictures import heatmap_overlay, image_grid
from .by_detector import DetectorStage
from .schema import Row, decode_ignore_map, decode_image, decode_map
from .shards import Quarantined, Shard, rows_at
from .stage import DATA, LEFT_OUT, MARKERS, Result, row_name, run_stage


COMPARED = "compared"
FIGURES, REPORT = "figures.json", "report.html"
ROWS_AT_A_TIME = 256


@dataclass(frozen=True)
class Compare(DetectorStage):
    """The detector's map beside the true one, a row for each labelled image: what [`count_images`] counts, at the size of the true
    map. Rows that are not labelled are left out; images and maps that cannot be read are quarantined.

    Args:
        tile: also look at large images piece by piece, see [`tiled_confidence`].
        threshold: confidence, and truth, in (0, 1] from which a pixel is an artifact.
    """

    tile: bool = False
    threshold: float = 0.5

    name: ClassVar[str] = "evaluate"

    def __post_init__(self):
        super().__post_init__()
        DetectorFigures(self.threshold)  # which refuses a threshold out of range

    def features(self, shard: Shard) -> Features:
        own = {"position": Value("int64"), "path": Value("string"), "counts": List(Value("float64"))}
        return Features(own | {name: shard.features[name] for name in ("category", "generator", "source")})

    def skips(self, row: Row) -> bool:
        return row["artifact_map"] is None

    def skipped(self, row: Row) -> Result:
        return LEFT_OUT

    def look(self, models: list[torch.nn.Module], images: torch.Tensor) -> np.ndarray:
        """Log-odds (B, h, w) in float32, at the detector's own resolution."""
        (model,) = models
        if self.tile:
            confidence = tiled_confidence(model, images, model.config.image_size)
            logits = torch.logit(confidence.double(), eps=1e-9).float()
        else:
            pixels = normalise_images(images, model.config)
            logits = model(pixels.to(next(model.parameters()).dtype)).logits.float()
        if not logits.isfinite().all():
            raise ValueError("the detector gave confidences that are not numbers")
        return logits[:, 0].cpu().numpy()

    def answer(self, row: Row, seen: np.ndarray, position: int) -> Result:
        try:
            truth = true_map(row)
        except Exception as error:  # decoders raise many types; one bad file must not stop the rest
            return Quarantined(row_name(row), f"artifact_map: {str(error) or type(error).__name__}")
        counts = count_images(confidence_at(seen, truth), truth, self.threshold)[0]
        return {**row, "position": position, "path": row_name(row), "counts": counts.tolist()}


def true_map(row: Row) -> torch.Tensor:
    """The map of a labelled row as float (1, 1, H, W), at its own size: in [0, 1], or -1 where a pixel does not count."""
    size = decode_image(row).size
    return without_ignored(from_picture(decode_map(row, size)), decode_ignore_map(row, size))[None]


def confidence_at(logits: np.ndarray, truth: torch.Tensor) -> torch.Tensor:
    """(h, w) -> (1, 1, H, W): the confidence of the detector at the size of the true map, as `confidence` makes it."""
    logits = torch.from_numpy(np.ascontiguousarray(logits))[None, None]
    return F.interpolate(logits, size=truth.shape[-2:], mode="bilinear", align_corners=False).sigmoid()


def evaluate_detector(
    stage: Compare,
    shards: Sequence[Shard],
    output_dir: str | os.PathLike,
    *,
    detector_name: str = "",
    dataset_name: str = "",
    pictures: int = 12,
    **options: Any,
) -> dict[str, Any] | None:
    """Measure a detector on a labelled dataset and write the figures and a report. Stopped, it goes on where it was when it is
    called again.

    Args:
        stage: the detector and how it looks.
        shards: of the dataset.
        output_dir: folder for figures.json and report.html.
        detector_name, dataset_name: what to call them there; of local paths the last component is kept.
        pictures: most false alarms, and most misses, to show.
        **options: `rank`, `world_size`, `restart` and `show_progress` of [`run_stage`].

    Returns:
        What figures.json holds: `figures` (see [`DetectorFigures.compute`], nan as None), `detector`, `weights_sha256`, `dataset`,
        `threshold`, `tile`, `precision`, and the counts `labelled`, `left_out` (rows without a map) and `quarantined` (reason ->
        count). None while other ranks have not measured all.

    Raises:
        ValueError: nothing is labelled; and what [`run_stage`] raises.
    """
    output_dir = Path(output_dir)
    folder = output_dir / MARKERS / COMPARED
    counts = run_stage(stage, shards, folder, **options)
    if counts is None:
        return None
    labelled = sum(counts["rows_out"].values())
    if not labelled:
        raise ValueError(
            f"No row of the dataset has both an image and an `artifact_map` that can be read: {counts['left_out']} of "
            f"{counts['rows_in']} have no map. A detector can be measured on labelled images only."
        )
    figures, worst = _reduce(sorted((folder / DATA).glob("*.parquet")), stage.threshold, pictures)
    result = {
        "detector": shortened(detector_name),
        "weights_sha256": stage.weights_sha256[0],
        "dataset": shortened(dataset_name),
        "threshold": stage.threshold,
        "tile": stage.tile,
        "precision": stage.precision,
        "labelled": labelled,
        "left_out": counts["left_out"],
        "quarantined": counts["quarantined"],
        "figures": json_ready(figures),
    }
    drawn = {kind: _draw(stage, shards, rows) for kind, rows in worst.items()}
    _write_report(output_dir, result, drawn)
    write_atomically(output_dir / FIGURES, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


@dataclass(frozen=True)
class _Worst:
    """An image to show: where it is, and how bad."""

    figure: float
    shard: int
    position: int


def _reduce(files: Sequence[Path], threshold: float, pictures: int) -> tuple[dict[str, Any], dict[str, list[_Worst]]]:
    """The figures, and the images with the highest `kl_false_alarms` and `kl_misses`, the worst first."""
    figures, worst = DetectorFigures(threshold), {"kl_false_alarms": [], "kl_misses": []}
    for number, file in enumerate(files):
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(ROWS_AT_A_TIME):
                rows = batch.to_pylist()
                counts = torch.tensor([row["counts"] for row in rows], dtype=torch.float64)
                figures.add(counts, *([row[name] for row in rows] for name in ("category", "generator", "source")))
                for kind, found in worst.items():
                    values = counts[:, START[kind]].tolist()
                    found += [_Worst(v, number, row["position"]) for v, row in zip(values, rows) if v > 0]
                    found.sort(key=lambda image: (-image.figure, image.shard, image.position))
                    del found[pictures:]
    return figures.compute(), worst


def _draw(stage: Compare, shards: Sequence[Shard], worst: Sequence[_Worst]) -> list[Picture]:
    """Image, truth and diagnosis beside each other."""
    rows = rows_at(shards, [(image.shard, image.position) for image in worst])
    return [_picture(stage, rows[image.shard, image.position], image.figure) for image in worst]


def _picture(stage: Compare, row: Row, figure: float) -> Picture:
    truth, image = true_map(row), to_image_tensor(decode_image(row))[None]
    confidence = confidence_at(stage.look(stage.models(), image.to(stage.device))[0], truth)
    maps = [F.interpolate(one, image.shape[-2:], mode="nearest") for one in (truth.clamp(min=0), confidence)]
    tiles = [image[0], *(heatmap_overlay(image, one)[0] for one in maps)]
    names = ", ".join(row["category"])
    note = f"{figure:.3f} nats a pixel; highest confidence {confidence.max():.2f}" + (f"; {names}" if names else "")
    return Picture(image_grid([tiles], margin=0), Path(row_name(row) or "").name, note)


def _write_report(output_dir: Path, result: Mapping[str, Any], drawn: Mapping[str, Sequence[Picture]]) -> None:
    figures = result["figures"]
    everything, bad = figures["all"], sum(result["quarantined"].values())
    head = [
        Figure(
            "Images measured",
            f"{everything['images']}",
            f"{everything['images_with_artifacts']} with artifacts; {result['left_out']} not labelled, {bad} quarantined",
        )
    ]
    for group, name, note in (
        ("all", "pixel_ap", "1 is best; a detector that guesses has the share of artifact pixels"),
        ("all", "misses", "of the images with artifacts, none is seen"),
        ("without_artifacts", "false_alarms", "of the images without artifacts, one is seen"),
    ):
        value, (heading, style) = figures[group][name], SHOWN[name]
        if value is not None:
            head.append(Figure(heading[0].upper() + heading[1:], style.format(value), note))
    sections = [
        Section(
            "Figures",
            "Of all images and of groups. An image with several categories counts in each. MSE and both KL are means over images, "
            "the next figures but AUROC are of all pixels at once.",
            Table(*figure_table(figures)),
        )
    ]
    for kind, heading in (("kl_false_alarms", "The worst false alarms"), ("kl_misses", "The worst misses")):
        if drawn[kind]:
            text = "The image, the truth over it, the diagnosis over it. Yellow is a suspicion, magenta a certainty."
            sections.append(Section(heading, text, pictures=drawn[kind]))
    if bad:
        sections.append(
            Section("Quarantined", table=Table(("", "rows"), [(k, str(n)) for k, n in result["quarantined"].items()]))
        )
    settings = [
        (key, str(result[key])) for key in ("detector", "weights_sha256", "dataset", "threshold", "tile", "precision")
    ]
    sections.append(Section("Settings", table=Table(("", ""), settings)))
    html_report(
        output_dir / REPORT,
        "Figures of a detector",
        head,
        sections,
        f"{result['detector'] or 'The detector'} on {result['dataset'] or 'a dataset'}. What it was trained on measures nothing: "
        "use images that it never saw.",
    )
