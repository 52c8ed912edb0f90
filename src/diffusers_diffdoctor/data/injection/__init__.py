# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Artifacts without annotators: sound images are spoiled where it is known."""

from .composition import COUNTS, DIFFERENCE, KINDS, WEIGHTS, Injected, inject, visible
from .decoys import retouch
from .parts import NoChange
from .regions import blob, saliency
from .repainting import Repainter, load_repainter


__all__ = [
    "COUNTS",
    "DIFFERENCE",
    "KINDS",
    "WEIGHTS",
    "Injected",
    "NoChange",
    "Repainter",
    "blob",
    "inject",
    "load_repainter",
    "retouch",
    "saliency",
    "visible",
]
