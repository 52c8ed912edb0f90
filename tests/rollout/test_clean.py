# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from diffusers_diffdoctor.rollout.clean import clean_prediction


def tensors():
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(3))


SCHEDULERS = [
    *(DDIMScheduler(clip_sample=False, prediction_type=kind) for kind in ("epsilon", "v_prediction", "sample")),
    DDPMScheduler(clip_sample=False),
    EulerDiscreteScheduler(),
    EulerDiscreteScheduler(prediction_type="v_prediction"),
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda one: f"{type(one).__name__}-{one.config.prediction_type}")
def test_the_clean_sample_is_the_one_that_the_scheduler_computes(scheduler):
    output, sample, change = tensors()
    scheduler.set_timesteps(7)
    for number in (3, 4):  # the second time the scheduler knows where it is
        timestep = scheduler.timesteps[number]
        scheduler.scale_model_input(sample, timestep)
        prediction = clean_prediction(scheduler, timestep)
        moved = prediction.moved(output, change)
        kept = scheduler._step_index if hasattr(scheduler, "_step_index") else None
        believed = scheduler.step(output, timestep, sample).pred_original_sample
        assert torch.allclose(prediction.clean(output, sample), believed, atol=1e-4)
        if kept is not None:
            scheduler._step_index = kept
        after = scheduler.step(moved, timestep, sample).pred_original_sample
        assert torch.allclose(after, believed + change, atol=1e-4)


def test_the_last_step_of_flow_matching_ends_at_the_clean_sample():
    output, sample, change = tensors()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    timestep = scheduler.timesteps[-1]
    prediction = clean_prediction(scheduler, timestep)
    clean = prediction.clean(output, sample)
    assert torch.allclose(scheduler.step(output, timestep, sample).prev_sample, clean, atol=1e-5)
    scheduler.set_timesteps(4)
    moved = scheduler.step(prediction.moved(output, change), timestep, sample).prev_sample
    assert torch.allclose(moved, clean + change, atol=1e-5)


def test_noise_of_flow_matching_is_taken_away():
    clean, noise, _ = tensors()
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    sigma = scheduler.sigmas[2]
    found = clean_prediction(scheduler, scheduler.timesteps[2]).clean(
        noise - clean, (1 - sigma) * clean + sigma * noise
    )
    assert torch.allclose(found, clean, atol=1e-5)


def test_an_unknown_kind_of_prediction_is_named():
    scheduler = DDIMScheduler()
    scheduler.register_to_config(prediction_type="noise squared")
    with pytest.raises(ValueError, match="'noise squared'"):
        clean_prediction(scheduler, 3)
