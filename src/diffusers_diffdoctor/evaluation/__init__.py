# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Measure, show and report: metrics of confidence maps, pictures, HTML reports, and what a treatment did."""

from pathlib import Path

from ..pictures import before_after_grid, heatmap_overlay, image_grid, plot_curves, to_pil
from .detector_figures import DetectorFigures, headline
from .diagnosis import diagnose_images
from .metrics import (
    area_ratio,
    artifact_frequency,
    average_precision,
    average_precision_bounds,
    calibration_error,
    error_rates,
    kl_false_alarms,
    kl_misses,
    map_mse,
    max_confidence,
    pairwise_diversity,
    pixel_change,
    roc_auc,
    sharpness,
    wilson_interval,
)
from .pairs import ImagePairs, measure
from .report import html_report
from .spectrum import spectral_growth, spectral_peaks
from .treatment_report import PairPictures, TreatmentRun, draw_pairs, print_summary, render


# for `evaluate.load`
ARTIFACT_MAP_METRIC = str(Path(__file__).with_name("artifact_map_metric.py"))

__all__ = [
    "ARTIFACT_MAP_METRIC",
    "DetectorFigures",
    "ImagePairs",
    "PairPictures",
    "TreatmentRun",
    "area_ratio",
    "artifact_frequency",
    "average_precision",
    "average_precision_bounds",
    "before_after_grid",
    "calibration_error",
    "diagnose_images",
    "draw_pairs",
    "error_rates",
    "headline",
    "heatmap_overlay",
    "html_report",
    "image_grid",
    "kl_false_alarms",
    "kl_misses",
    "map_mse",
    "max_confidence",
    "measure",
    "pairwise_diversity",
    "pixel_change",
    "plot_curves",
    "print_summary",
    "render",
    "roc_auc",
    "sharpness",
    "spectral_growth",
    "spectral_peaks",
    "to_pil",
    "wilson_interval",
]
