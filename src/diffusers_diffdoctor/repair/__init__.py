# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What a detector is good for without training: choose the best of several images, and repair a single one."""

from .inpainting import Repaired, artifact_regions, check_repair, repair
from .ranking import Ranked, rank


__all__ = ["Ranked", "Repaired", "artifact_regions", "check_repair", "rank", "repair"]
