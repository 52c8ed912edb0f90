# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Generation with gradient: a pipeline's own `__call__`, differentiated through denoising steps of one's choice.

One idea a file: `call` runs a pipeline without its `no_grad`; `prompts` remembers what it encodes; `placement` says which steps
carry gradient, and `window` has them do so; `output` brings its images to [0, 1]; `latents`, `noise` and `training_loss` ask it for the loss that it was
trained with; `drift` compares it with itself without its adapter; `switching` draws with the adapter in some steps; `module` puts them together.
"""

from .drift import without_adapter
from .module import DifferentiableRollout, RolloutOutput
from .placement import PLACEMENTS, Placement, Steps, placement_of
from .switching import adapter_until


__all__ = [
    "PLACEMENTS",
    "DifferentiableRollout",
    "Placement",
    "RolloutOutput",
    "Steps",
    "adapter_until",
    "placement_of",
    "without_adapter",
]
