# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What of the drift the images of a rollout do not show: its weights, its untreated side, and the adapter afterwards."""

import pytest
from fixtures.pipelines import add_lora, tiny_flux
from peft.tuners.tuners_utils import BaseTunerLayer

from diffusers_diffdoctor.rollout import DifferentiableRollout
from diffusers_diffdoctor.rollout.drift import drift_step_weight, without_adapter


def test_only_the_first_steps_count():
    weights = [drift_step_weight(step, 20) for step in range(20)]
    assert weights[:6] == pytest.approx([1, 0.95**8, 0.9**8, 0.85**8, 0.8**8, 0.75**8])
    assert weights[6:] == [0] * 14  # below a tenth


def test_the_untreated_side_is_asked_without_a_graph():
    """It is what the treated one is held to, and its activations would cost as much memory again."""
    pipeline = tiny_flux()
    add_lora(pipeline)
    rollout = DifferentiableRollout(pipeline, height=32, width=32, num_inference_steps=4, gradient_fraction=1.0)
    graphs = []
    rollout.denoiser.register_forward_hook(lambda module, args, out: graphs.append(out[0].requires_grad))
    rollout(["a cat"], [0], drift=True)
    assert graphs == [True] * 4 + [False] * 2


def test_the_adapter_is_left_as_it_was():
    pipeline = tiny_flux()
    weights, denoiser = add_lora(pipeline), pipeline.transformer
    frozen = next(iter(weights.values())).requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in denoiser.named_parameters()}
    layers = [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]
    with without_adapter(denoiser):
        assert layers and all(layer.disable_adapters for layer in layers)
    assert not any(layer.disable_adapters for layer in layers)
    assert {name: parameter.requires_grad for name, parameter in denoiser.named_parameters()} == before
    assert not frozen.requires_grad and sum(before.values()) == len(weights) - 1
