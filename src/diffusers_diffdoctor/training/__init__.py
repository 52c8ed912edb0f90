# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What both trainers stand on: whole checkpoints, exact resuming, an orderly stop, one run for each output folder."""

from .arguments import RunArguments
from .trainer import RunTrainer


__all__ = ["RunArguments", "RunTrainer"]
