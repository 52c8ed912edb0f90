# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The loop that makes a detector robust: what it is told, its rounds, what people painted, and what a round taught."""

from .rounds import Loop, Waiting
from .settings import LoopSettings, read_settings


__all__ = ["Loop", "LoopSettings", "Waiting", "read_settings"]
