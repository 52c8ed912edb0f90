# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The figures of a detector as a module of the `evaluate` library, which gathers batches and processes.

Maps are counted as they come, and the library stores and gathers the counts: 33 kB an image, whatever its size.

`evaluate` copies this file into its own cache before it imports it, so it imports the package by its full name.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import datasets
import evaluate
import torch

from diffusers_diffdoctor.evaluation.detector_figures import DetectorFigures, count_images


CITATION = "DiffDoctor: Diagnosing Image Diffusion Models Before Treating, arXiv 2501.12382"
INPUTS = """
Args:
    predictions: artifact maps of a detector, each (1, H, W) with floats in [0, 1], 1 = artifact. Sizes may differ.
    references: the true maps, each of the size of its prediction; -1 where a pixel does not count.
    categories: optional, for each image the names of what is in it.
    generators: optional, for each image what made it, or None.
    sources: optional, for each image where it is from; "photo" is a photograph.
Returns:
    mse, kl_misses, kl_false_alarms: means over the images (the paper's MSE, KL and KL(1-); the formulas are ours).
    pixel_ap, iou, calibration_error: average precision, intersection over union and expected calibration error of all pixels.
    image_auroc: area under the ROC curve of each image's highest confidence.
    misses, false_alarms: shares of the images with and without a true artifact that are judged wrongly.
    artifact_frequency: share of the images in which the predictions see an artifact.
    images, images_with_artifacts: how many there are.
    with_artifacts, without_artifacts, photographs: the same figures over these images.
    categories, generators: name -> the same figures.
    A figure over no image or pixel is nan.
"""


class ArtifactMapMetric(evaluate.Metric):
    """Compares predicted with true artifact maps: `evaluate.load(ARTIFACT_MAP_METRIC).compute(predictions=, references=)`.

    Args:
        threshold: confidence, and truth, in (0, 1] from which a pixel is an artifact, and an image with such a pixel has one:
            `evaluate.load(ARTIFACT_MAP_METRIC, threshold=0.3)`.
        *args, **kwargs: what [`~evaluate.Metric`] takes.
    """

    def __init__(self, *args, threshold: float = 0.5, **kwargs):
        super().__init__(*args, **kwargs)
        self.threshold = threshold

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="How far a detector's artifact maps are from the truth.",
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    "counts": datasets.Sequence(datasets.Value("float64")),
                    "category": datasets.Sequence(datasets.Value("string")),
                    "generator": datasets.Value("string"),
                    "source": datasets.Value("string"),
                }
            ),
            reference_urls=["https://arxiv.org/abs/2501.12382"],
        )

    def add_batch(
        self,
        *,
        predictions: Any = None,
        references: Any = None,
        categories: Sequence[Iterable[str]] | None = None,
        generators: Sequence[str | None] | None = None,
        sources: Sequence[str | None] | None = None,
    ) -> None:
        """Count a batch of images."""
        pairs = list(zip(predictions, references, strict=True))
        counts = [
            count_images(*(torch.as_tensor(maps)[None] for maps in pair), self.threshold)[0].tolist() for pair in pairs
        ]
        super().add_batch(
            counts=counts,
            category=[list(names or ()) for names in categories or [None] * len(pairs)],
            generator=[name or "" for name in generators or [None] * len(pairs)],  # the library has no optional texts
            source=[name or "" for name in sources or [None] * len(pairs)],
        )

    def add(
        self,
        *,
        prediction: Any = None,
        reference: Any = None,
        category: Iterable[str] | None = None,
        generator: str | None = None,
        source: str | None = None,
    ) -> None:
        """Count an image."""
        self.add_batch(
            predictions=[prediction],
            references=[reference],
            categories=[category],
            generators=[generator],
            sources=[source],
        )

    def compute(self, *, predictions: Any = None, references: Any = None, **groups) -> dict[str, Any] | None:
        """The figures of all images that were added, those given here among them; on process 0 only."""
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references, **groups)
        return super().compute()

    def _compute(self, counts, category, generator, source) -> dict[str, Any]:
        figures = DetectorFigures(self.threshold)
        names = ([name or None for name in column] for column in (generator, source))
        figures.add(torch.tensor(counts, dtype=torch.float64), category, *names)
        computed = figures.compute()
        return computed.pop("all") | computed
