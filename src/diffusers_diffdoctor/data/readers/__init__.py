# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Readers of annotations that exist, a file for each format: `diffdoctor data import`."""

from .coco import Coco
from .folders import Folders
from .had import Had
from .label_studio import LabelStudio
from .pal4vst import Pal4vst
from .reader import Reader
from .richhf import RichHF
from .synthscars import SynthScars


# by the names of `diffdoctor data import`
READERS: dict[str, type[Reader]] = {
    "richhf": RichHF,
    "pal4vst": Pal4vst,
    "had": Had,
    "synthscars": SynthScars,
    "folders": Folders,
    "coco": Coco,
    "label-studio": LabelStudio,
}

__all__ = [
    "READERS",
    "Coco",
    "Folders",
    "Had",
    "LabelStudio",
    "Pal4vst",
    "Reader",
    "RichHF",
    "SynthScars",
]
