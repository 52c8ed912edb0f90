# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Measure, show and report: metrics of confidence maps, pictures, HTML reports and the report of a treatment."""

from .metrics import (
    area_ratio,
    artifact_frequency,
    error_rates,
    kl_false_alarms,
    kl_misses,
    map_mse,
    max_confidence,
    pairwise_diversity,
    pixel_change,
    wilson_interval,
)
from .pictures import before_after_grid, heatmap_overlay, image_grid, plot_curves, to_pil


__all__ = [
    "area_ratio",
    "artifact_frequency",
    "before_after_grid",
    "error_rates",
    "heatmap_overlay",
    "image_grid",
    "kl_false_alarms",
    "kl_misses",
    "map_mse",
    "max_confidence",
    "pairwise_diversity",
    "pixel_change",
    "plot_curves",
    "to_pil",
    "wilson_interval",
]
