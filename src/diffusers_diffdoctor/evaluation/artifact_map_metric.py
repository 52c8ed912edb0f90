# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The metrics of a detector as a module of the `evaluate` library, which gathers batches and processes.

`evaluate` copies this file into its own cache before it imports it, so it imports the package by its full name.
"""

import datasets
import evaluate
import torch

from diffusers_diffdoctor.evaluation import metrics


CITATION = "DiffDoctor: Diagnosing Image Diffusion Models Before Treating, arXiv 2501.12382"
INPUTS = """
Args:
    predictions: artifact maps of a detector, each (1, H, W) with floats in [0, 1], 1 = artifact. Sizes may differ.
    references: the true maps, each of the size of its prediction.
    threshold: maximum confidence from which an image has an artifact, 0.5 by default.
Returns:
    mse, kl_misses, kl_false_alarms: means over the images (the paper's MSE, KL and KL(1-); the formulas are ours).
    misses, false_alarms: shares of the images with and without a true artifact that are judged wrongly; nan without any.
    artifact_frequency: share of the images in which the predictions see an artifact.
"""


class ArtifactMapMetric(evaluate.Metric):
    """Compares predicted with true artifact maps: `evaluate.load(ARTIFACT_MAP_METRIC).compute(predictions=, references=)`."""

    def _info(self) -> evaluate.MetricInfo:
        artifact_map = datasets.Sequence(datasets.Sequence(datasets.Sequence(datasets.Value("float32"))))
        return evaluate.MetricInfo(
            description="How far a detector's artifact maps are from the truth.",
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": artifact_map, "references": artifact_map}),
            reference_urls=["https://arxiv.org/abs/2501.12382"],
        )

    def _compute(self, predictions, references, threshold: float = 0.5) -> dict[str, float]:
        pairs = [
            tuple(torch.tensor(artifact_map)[None] for artifact_map in pair) for pair in zip(predictions, references)
        ]
        scores, truth = (torch.cat([metrics.max_confidence(maps) for maps in side]) for side in zip(*pairs))
        compared = {
            function.__name__.removeprefix("map_"): torch.cat([function(*pair) for pair in pairs]).mean().item()
            for function in (metrics.map_mse, metrics.kl_misses, metrics.kl_false_alarms)
        }
        rates = metrics.error_rates(scores, truth >= threshold, threshold)
        return compared | rates | {"artifact_frequency": (scores >= threshold).double().mean().item()}
