# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What a detector is good for without training: guide sampling, choose the best of several images, repair one."""

from .guidance import DiagnosticGuidance
from .inpainting import Repaired, artifact_regions, check_repair, repair
from .ranking import Ranked, rank


__all__ = ["DiagnosticGuidance", "Ranked", "Repaired", "artifact_regions", "check_repair", "rank", "repair"]
