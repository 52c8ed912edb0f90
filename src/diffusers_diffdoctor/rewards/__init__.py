# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What scores a generated image: the artifact penalty per pixel, and image-level scorers."""

from .aesthetic import AestheticReward
from .artifact import ArtifactReward, pixel_penalty
from .artifact_scorer import ArtifactScorerReward
from .base import RewardOutput
from .clip import CLIPReward
from .combined import CombinedReward, as_reward
from .endpoint import EndpointReward
from .hpsv2 import HPSv2Reward
from .image_reward import ImageRewardReward
from .pickscore import PickScoreReward
from .registry import named_reward


__all__ = [
    "AestheticReward",
    "ArtifactReward",
    "ArtifactScorerReward",
    "CLIPReward",
    "CombinedReward",
    "EndpointReward",
    "HPSv2Reward",
    "ImageRewardReward",
    "PickScoreReward",
    "RewardOutput",
    "as_reward",
    "named_reward",
    "pixel_penalty",
]
