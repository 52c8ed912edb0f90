# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What scores a generated image: the artifact penalty per pixel, and image-level scorers."""

from .artifact import ArtifactReward, pixel_penalty
from .base import RewardOutput
from .clip import ClipScore
from .combined import CombinedReward, as_reward
from .endpoint import EndpointReward


__all__ = [
    "ArtifactReward",
    "ClipScore",
    "CombinedReward",
    "EndpointReward",
    "RewardOutput",
    "as_reward",
    "pixel_penalty",
]
