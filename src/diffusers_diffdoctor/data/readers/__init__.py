# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Readers of annotations that exist, a file for each format: `diffdoctor data import`."""

from .folders import Folders
from .pal4vst import Pal4vst
from .reader import Reader
from .richhf import RichHF


# by the names of `diffdoctor data import`
READERS: dict[str, type[Reader]] = {
    "richhf": RichHF,
    "pal4vst": Pal4vst,
    "folders": Folders,
}

__all__ = ["READERS", "Folders", "Pal4vst", "Reader", "RichHF"]
