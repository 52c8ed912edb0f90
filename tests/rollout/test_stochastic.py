# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Steps with noise against the schedulers of diffusers, the marginals that they must keep, and loops written by hand."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from fixtures.by_hand import BY_HAND
from fixtures.pipelines import PIPELINES, add_lora, tiny_flux, tiny_lcm, tiny_sd3, tiny_sdxl
from torch.distributions import Normal

from diffusers_diffdoctor.rollout.stochastic import (
    Gaussian,
    StochasticRollout,
    first_order,
    flow_transition,
    transition,
)


def make(pipeline, **changes):
    settings = {"height": 32, "width": 32, "num_inference_steps": 3, "max_sequence_length": 16}
    if "max_sequence_length" not in type(pipeline).__call__.__wrapped__.__annotations__:
        del settings["max_sequence_length"]
    return StochasticRollout(pipeline, **(settings | changes))


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- one step ----------------------------------------------------------------------------------------------------------------


def test_the_log_probability_is_the_mean_of_a_normal_ones():
    mean, value = noise(2, 3, 4), noise(2, 3, 4, seed=1)
    expected = Normal(mean, 0.3).log_prob(value).mean(dim=(1, 2))
    torch.testing.assert_close(Gaussian(mean, 0.3).log_prob(value), expected)
    other = noise(2, 3, 4, seed=2)
    expected = torch.distributions.kl_divergence(Normal(mean, 0.3), Normal(other, 0.3)).mean(dim=(1, 2))
    torch.testing.assert_close(Gaussian(mean, 0.3).divergence(other), expected)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_a_step_of_diffusion_is_that_of_ddim(kind, eta):
    scheduler = DDIMScheduler(clip_sample=False, prediction_type=kind)
    scheduler.set_timesteps(5)
    output, sample, z = (noise(2, 4, 4, 4, seed=i) for i in range(3))
    for index, t in enumerate(scheduler.timesteps[:-1]):
        found = transition(scheduler, t, index, output, sample, eta)
        expected = scheduler.step(output, t, sample, eta=eta, variance_noise=z).prev_sample
        torch.testing.assert_close(found.mean + found.std * z, expected, rtol=1e-4, atol=1e-4)
        assert found.std == pytest.approx(eta * scheduler._get_variance(t, t - 200).item() ** 0.5, rel=1e-4)


def test_where_noise_is_added_a_step_is_the_ancestral_one_of_euler(monkeypatch):
    scheduler = EulerAncestralDiscreteScheduler(beta_schedule="scaled_linear")
    scheduler.set_timesteps(6)
    output, z = noise(2, 4, 4, 4), noise(2, 4, 4, 4, seed=1)
    sample = 3 * noise(2, 4, 4, 4, seed=2)
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor", lambda *args, **kwargs: z
    )
    for index, t in enumerate(scheduler.timesteps[:-1]):
        scheduler.scale_model_input(sample, t)
        found = transition(scheduler, t, index, output, sample, 1.0)
        expected = scheduler.step(output, t, sample).prev_sample
        torch.testing.assert_close(found.mean + found.std * z, expected, rtol=1e-4, atol=1e-4)


def test_a_step_of_a_flow_without_noise_is_that_of_euler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(5)
    velocity, sample = noise(2, 8, 4), noise(2, 8, 4, seed=1)
    for index, t in enumerate(scheduler.timesteps):
        found = transition(scheduler, t, index, velocity, sample, 1e-9)
        torch.testing.assert_close(found.mean, scheduler.step(velocity, t, sample).prev_sample, rtol=1e-5, atol=1e-5)


def test_the_noise_of_a_flow_keeps_its_marginals():
    """x_0 ~ N(2, 0.5^2), whose velocity is known: small steps with much noise end at the variance that the flow has there."""
    steps, mean, spread = 400, 2.0, 0.5
    sigmas = torch.linspace(0.98, 0.3, steps + 1).tolist()

    def moments(s):
        return (1 - s) * mean, ((1 - s) ** 2 * spread**2 + s**2) ** 0.5

    generator = torch.Generator().manual_seed(0)
    centre, width = moments(sigmas[0])
    x = centre + width * torch.randn(20_000, 1, generator=generator)
    for index, s in enumerate(sigmas[:-1]):
        centre, width = moments(s)
        clean = mean + (1 - s) * spread**2 / width**2 * (x - centre)  # E[x_0 | x_s]
        step = flow_transition(clean, x, sigmas, index, noise_level=0.7)
        x = step.mean + step.std * torch.randn(x.shape, generator=generator)
    centre, width = moments(sigmas[-1])
    assert x.mean().item() == pytest.approx(centre, abs=0.02)
    assert x.std().item() == pytest.approx(width, rel=0.02)


def test_the_noise_of_a_flow_is_that_of_flow_grpo():
    """Its values for two levels, by hand; at s = 1 it has the 1 - s of the next level."""
    sigmas = [1.0, 0.75, 0.5, 0.25, 0.0]
    x, v = noise(1, 4), noise(1, 4, seed=1)
    first = flow_transition(x - v, x, sigmas, 0, 0.7)
    assert first.std == pytest.approx(0.7 * math.sqrt(1 / 0.25) * math.sqrt(0.25))
    second = flow_transition(x - 0.75 * v, x, sigmas, 1, 0.7)
    g = 0.7 * math.sqrt(3)
    assert second.std == pytest.approx(g / 2)
    torch.testing.assert_close(second.mean, x + (v + g**2 / 1.5 * (x + 0.25 * v)) * -0.25)


# --- the pipeline's call -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["flux", "sd3", "sdxl", "qwen", "ddim", "dpm"])
def test_with_next_to_no_noise_the_images_are_the_pipelines_own(family):
    """Of those whose own step is of first order; DPM-Solver's are those of DDIM at its levels."""
    pipeline = tiny_sdxl() if family in ("ddim", "dpm") else PIPELINES[family]()
    if family in ("ddim", "dpm"):
        plain = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False, timestep_spacing="trailing")
        multi = DPMSolverMultistepScheduler.from_config(plain.config)
        pipeline.scheduler = plain if family == "ddim" else multi
    rollout = make(pipeline, noise_level=1e-7)
    if family == "dpm":
        pipeline.scheduler = plain
        expected = rollout.generate(["a cat", "two dogs"], [3, 4])
        pipeline.scheduler = multi
    else:
        expected = rollout.generate(["a cat", "two dogs"], [3, 4])
    (trajectory,) = rollout.sample(["a cat", "two dogs"], [3, 4])
    torch.testing.assert_close(trajectory.images, expected, rtol=0, atol=2e-4)
    assert trajectory.rows == [0, 1] and trajectory.noisy_steps == [0, 1]
    assert vars(pipeline.scheduler).get("step") is None and "forward" not in vars(rollout.denoiser)


@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_a_seed_decides_its_image_whatever_the_batch(family):
    rollout = make(PIPELINES[family]())
    (both,) = rollout.sample(["a cat", "two dogs"], [3, 4])
    (alone,) = rollout.sample(["two dogs"], [4])
    (other,) = rollout.sample(["two dogs"], [5])
    torch.testing.assert_close(both.images[1:], alone.images, rtol=0, atol=1e-4)
    torch.testing.assert_close(both.log_probs[:, 1:], alone.log_probs, rtol=0, atol=1e-4)
    assert (other.images - alone.images).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["flux", "sd3", "sdxl", "pixart"])
def test_recorded_steps_are_as_likely_as_they_were_and_ask_the_denoiser_once(family):
    pipeline = PIPELINES[family]()
    add_lora(pipeline)
    settings = {"pipeline_kwargs": {"clean_caption": False}} if family == "pixart" else {}
    rollout = make(pipeline, **settings)
    (trajectory,) = rollout.sample(["a cat", "two dogs"], [3, 4])
    block = next(m for m in rollout.denoiser.modules() if isinstance(m, torch.nn.Linear))
    calls = []
    block.register_forward_hook(lambda *_: calls.append(1))
    for step in trajectory.noisy_steps:
        calls.clear()
        likelihood = rollout([trajectory], step=step)
        assert torch.equal(likelihood.log_probs.detach(), trajectory.log_probs[step])
        assert len(calls) == 1 and likelihood.log_probs.requires_grad and likelihood.divergence is None


@pytest.mark.parametrize("family", ["flux", "sdxl"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_of_a_likelihood_is_that_of_a_step_written_by_hand(family, checkpointing):
    pipeline = PIPELINES[family]()
    weights = list(add_lora(pipeline).values())
    rollout = make(pipeline)
    if checkpointing:
        rollout.enable_gradient_checkpointing()
    trajectories = rollout.sample(["a cat", "two dogs"], [3, 4])
    for step in (0, 1):
        found = rollout(trajectories, step=step).log_probs
        latents, by_hand = trajectories[0].latents, BY_HAND[family][1]
        expected = by_hand(pipeline, ["a cat", "two dogs"], latents[step], step, 3, 32)
        expected = expected.log_prob(latents[step + 1]).flatten(1).mean(1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        weighting = torch.tensor([1.0, -0.5])
        ours = torch.autograd.grad((found * weighting).sum(), weights)
        theirs = torch.autograd.grad((expected * weighting).sum(), weights)
        scale = max(g.abs().max() for g in theirs)
        assert scale > 1e-4
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * scale.item())


def test_the_divergence_from_the_base_is_that_of_two_denoisers():
    pipeline = tiny_flux()
    add_lora(pipeline)
    rollout = make(pipeline)
    (trajectory,) = rollout.sample(["a cat", "two dogs"], [3, 4])
    found = rollout([trajectory], step=1, reference=True)
    plain = make(tiny_flux())
    with torch.no_grad():
        mean, other = rollout._transition(trajectory, 1), plain._transition(trajectory, 1)
    expected = torch.distributions.kl_divergence(Normal(mean.mean, mean.std), Normal(other.mean, mean.std))
    torch.testing.assert_close(found.divergence, expected.mean(dim=(1, 2)))
    assert found.divergence.min() > 1e-6 and found.divergence.requires_grad
    with pytest.raises(ValueError, match=r"`reference` compares .* it has none"):
        plain([trajectory], step=1, reference=True)


# --- what cannot be ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, expected", [(HeunDiscreteScheduler, "EulerDiscreteScheduler"), (PNDMScheduler, "DDIMScheduler")]
)
def test_schedulers_that_ask_twice_are_replaced_by_those_of_first_order(given, expected):
    pipeline = tiny_sdxl()
    pipeline.scheduler = given.from_config(pipeline.scheduler.config, skip_prk_steps=True)
    add_lora(pipeline)
    rollout = make(pipeline)
    assert type(rollout.policy_scheduler).__name__ == expected
    trajectories = rollout.sample(["a cat"], [0])
    assert len(trajectories[0].stds) == 3 and type(pipeline.scheduler) is given
    assert torch.equal(rollout(trajectories, step=0).log_probs.detach(), trajectories[0].log_probs[0])


def test_what_has_no_likelihood_is_refused():
    with pytest.raises(ValueError, match=r"LCMScheduler, whose steps follow other rules .* pipe\.scheduler = DDIM"):
        make(tiny_lcm())
    flow = FlowMatchHeunDiscreteScheduler()
    assert type(first_order(flow, "FluxPipeline")) is FlowMatchEulerDiscreteScheduler
    for level, message in ((0.0, "finite and above 0"), (float("nan"), "finite and above 0")):
        with pytest.raises(ValueError, match=rf"`noise_level` is .*{message}"):
            make(tiny_sd3(), noise_level=level)
    with pytest.raises(ValueError, match=r"`noise_level` is 1\.5, the eta of DDIM .* at most 1"):
        make(tiny_sdxl(), noise_level=1.5)
    rollout = make(tiny_flux())
    with pytest.raises(ValueError, match=r"`step` is 2, but must be one that adds noise: \[0, 1\]"):
        rollout(rollout.sample(["a cat"], [0]), step=2)
