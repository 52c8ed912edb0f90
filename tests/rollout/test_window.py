# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The gradient window counts the scheduler's own steps, whatever the scheduler."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
)
from fixtures.classic_pipelines import CLASSIC, tiny_sana_sprint, tiny_sd
from fixtures.pipelines import add_lora

from diffusers_diffdoctor.rollout import DifferentiableRollout
from diffusers_diffdoctor.rollout.drift import prediction_of
from diffusers_diffdoctor.rollout.placement import window_length


def graphs_of_calls(rollout, prompts=("a cat",), seeds=(0,)):
    """For each call of the denoiser, whether what it says has a graph."""
    graphs = []
    hook = rollout.denoiser.register_forward_hook(lambda m, args, out: graphs.append(prediction_of(out).requires_grad))
    rollout(list(prompts), list(seeds))
    hook.remove()
    return graphs


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [
        (DDIMScheduler, 4),
        (PNDMScheduler, 5),
        (HeunDiscreteScheduler, 7),
        (KDPM2DiscreteScheduler, 7),
        (EulerAncestralDiscreteScheduler, 4),
        (DPMSolverSinglestepScheduler, 4),
    ],
)
@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_the_window_is_a_share_of_the_schedulers_own_steps(scheduler, steps, fraction):
    pipeline = tiny_sd()
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    add_lora(pipeline)
    rollout = DifferentiableRollout(
        pipeline, height=32, width=32, num_inference_steps=4, gradient_fraction=fraction, guidance_scale=1.0
    )
    window = window_length(fraction, steps)
    assert graphs_of_calls(rollout) == [False] * (steps - window) + [True] * window


def test_steps_that_a_pipeline_leaves_out_are_found_by_counting():
    """SanaSprint's scheduler lists one more than is taken; a quarter of them would begin after the last."""
    pipeline = tiny_sana_sprint()
    add_lora(pipeline)
    rollout = DifferentiableRollout(
        pipeline,
        height=32,
        width=32,
        num_inference_steps=2,
        gradient_fraction=0.25,
        pipeline_kwargs={"clean_caption": False},
    )
    rollout(["a cat"], [0]).images.mean().backward()
    assert graphs_of_calls(rollout) == [False, True]
    assert all(weight.grad is not None for weight in rollout.parameters() if weight.requires_grad)


def test_pipelines_inside_a_pipeline_have_their_whole_window():
    """Each of the two inner calls has a `no_grad` of its own."""
    tiny = CLASSIC["KandinskyV22CombinedPipeline"]
    pipeline = tiny.build()
    add_lora(pipeline)
    named = {"guidance_scale": tiny.kwargs["guidance_scale"]} if "guidance_scale" in tiny.kwargs else {}
    rollout = DifferentiableRollout(
        pipeline,
        height=tiny.size,
        width=tiny.size,
        num_inference_steps=2,
        gradient_fraction=1.0,
        pipeline_kwargs={key: value for key, value in tiny.kwargs.items() if key not in named},
        **named,
    )
    assert graphs_of_calls(rollout) == [True, True]
    called = type(pipeline.decoder_pipe).__call__
    assert hasattr(called, "__wrapped__")  # the decorated call is back


def test_a_pipeline_that_switches_gradients_off_is_refused():
    pipeline = tiny_sd()
    add_lora(pipeline)
    rollout = DifferentiableRollout(
        pipeline, height=32, width=32, num_inference_steps=2, gradient_fraction=1.0, guidance_scale=1.0
    )
    scale = pipeline.scheduler.scale_model_input

    def scale_without_gradient(*args, **kwargs):
        torch.set_grad_enabled(False)
        return scale(*args, **kwargs)

    pipeline.scheduler.scale_model_input = scale_without_gradient
    with pytest.raises(ValueError, match="switches gradients off before it calls its UNet2DConditionModel"):
        rollout(["a cat"], [0])
