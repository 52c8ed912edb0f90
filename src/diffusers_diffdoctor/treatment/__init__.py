# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""TREAT: score the images of a rollout, and train a LoRA against the score.

Names are loaded on first use: `losses` stands below the rewards, the trainer above them.
"""

import importlib


_PUBLIC = {
    "DDPOConfig": "ddpo",
    "DDPOTrainer": "ddpo",
    "DiffusionDPOConfig": "dpo",
    "DiffusionDPOTrainer": "dpo",
    "PixelRewardConfig": "config",
    "PixelRewardTrainer": "trainer",
    "TreatmentConfig": "config",
    "TreatmentTrainer": "base",
    "write_preferences": "preferences",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name):
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return __all__
