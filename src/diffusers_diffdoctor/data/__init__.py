# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What detectors learn from: one schema, and stages that turn datasets into datasets.

A stage reads Parquet shards, writes Parquet shards and keeps count: rows in = rows out + left out + quarantined. See `stage` for
what lies in the folder of a dataset.
"""

from .annotate import Annotate, annotate
from .balance import balance, stand_out
from .card import push_dataset
from .drift import Describe, drift
from .evaluate import Compare, evaluate_detector
from .export import export_label_studio
from .inject import Inject
from .label import Label
from .merge import Merge, common_columns, shares_of
from .mine import Score, mine
from .photos import Photos
from .rows import load_rows
from .schema import FEATURES, SOURCES
from .shards import find_or_load_shards, find_shards, group_files
from .stage import Stage, run_stage


__all__ = [
    "FEATURES",
    "SOURCES",
    "Annotate",
    "Compare",
    "Describe",
    "Inject",
    "Label",
    "Merge",
    "Photos",
    "Score",
    "Stage",
    "annotate",
    "balance",
    "common_columns",
    "drift",
    "evaluate_detector",
    "export_label_studio",
    "find_or_load_shards",
    "find_shards",
    "group_files",
    "load_rows",
    "mine",
    "push_dataset",
    "run_stage",
    "shares_of",
    "stand_out",
]
