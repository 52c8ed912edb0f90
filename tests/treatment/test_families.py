# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The rows of the families, and the offline loss of FLUX against what its scheduler, its VAE and its own call do."""

import inspect
import logging

import diffusers
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from fixtures.pipelines import add_lora, tiny_flux, tiny_sdxl

from diffusers_diffdoctor.treatment.families import FAMILIES, draw_flow_sigmas, family_of
from diffusers_diffdoctor.treatment.losses import offline_loss
from diffusers_diffdoctor.treatment.rollout import DifferentiableRollout


def make(pipeline, **kwargs):
    settings = {
        "height": 32,
        "width": 32,
        "num_inference_steps": 2,
        "gradient_fraction": 0.5,
        "max_sequence_length": 16,
    }
    return DifferentiableRollout(pipeline, **(settings | kwargs))


def photos(count=2, height=32, width=32):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(7))


def record_calls(denoiser):
    """The keyword arguments of every call of the denoiser."""
    calls = []
    denoiser.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    return calls


def generators(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# --- rows ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_names_arguments_of_its_pipeline(name):
    pipeline = getattr(diffusers, name)
    accepted = set(inspect.signature(pipeline.__call__).parameters)
    fields = {field for field in FAMILIES[name].prompt_fields if field is not None}
    assert "prompt_embeds" in fields
    # LCM has no negative embeddings: what no argument takes is left out
    assert {field for field in fields if not field.startswith("negative_")} <= accepted
    assert set(FAMILIES[name].call_defaults) <= accepted
    annotated = inspect.getsource(pipeline.encode_prompt).rstrip().rsplit("return ", 1)[1].strip("()\n ")
    returned = [result.strip() for result in annotated.split(",") if result.strip()]
    assert len(returned) == len(FAMILIES[name].prompt_fields)
    for field, result in zip(FAMILIES[name].prompt_fields, returned):
        assert field is None or field == result


def test_a_derived_pipeline_is_of_its_parents_family(flux):
    class MyFluxPipeline(diffusers.FluxPipeline):
        pass

    assert family_of(MyFluxPipeline(**flux.components)) is FAMILIES["FluxPipeline"]


def test_a_pipeline_without_a_row_gets_its_prompts_as_text(flux, monkeypatch, caplog):
    expected = make(flux).generate(["a cat"], [0])
    monkeypatch.delitem(FAMILIES, "FluxPipeline")
    weights = add_lora(flux)
    rollout = make(flux)
    caplog.set_level(logging.WARNING, logger="diffusers_diffdoctor")
    rollout.cache_prompts(["a cat"])
    rollout.free_text_encoders()
    assert "FluxPipeline is no known family" in caplog.text
    images = rollout(["a cat"], [0]).images
    images.sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in weights.values())
    flux.transformer.disable_adapters()
    torch.testing.assert_close(rollout.generate(["a cat"], [0]), expected, rtol=0, atol=1e-6)


# --- offline loss of FLUX --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dev", [False, True])
def test_flux_is_asked_for_the_velocity_of_its_own_latents(dev):
    pipeline = tiny_flux(guidance_embeds=dev, dynamic_shifting=dev)
    add_lora(pipeline)
    rollout = make(pipeline)
    calls = record_calls(pipeline.transformer)
    images = photos()
    output = rollout(["a cat"], [0], images, ["two dogs", "hand"], [5, 6])
    sampling, offline = calls[0], calls[-1]
    assert len(calls) == 3
    assert output.prediction.shape == output.target.shape == (2, 64, 16)
    assert output.prediction.requires_grad
    assert not output.target.requires_grad

    # x_s = (1 - s) x + s e and v = e - x, so that x = x_s - s v and e = x_s + (1 - s) v
    sigma = offline["timestep"][:, None, None]
    assert ((sigma > 0) & (sigma < 1)).all()
    clean, noise = (offline["hidden_states"] + factor * output.target for factor in (-sigma, 1 - sigma))
    drawn = torch.stack([torch.randn(4, 16, 16, generator=generator) for generator in generators([5, 6])])
    torch.testing.assert_close(noise, pack(drawn), rtol=0, atol=1e-5)
    posterior = pipeline.vae.encode(images * 2 - 1).latent_dist.mean
    torch.testing.assert_close(clean, pack((posterior - 0.1159) * 0.3611), rtol=0, atol=1e-5)

    # everything else as the pipeline itself passes it
    torch.testing.assert_close(offline["img_ids"], sampling["img_ids"])
    torch.testing.assert_close(offline["txt_ids"], sampling["txt_ids"])
    text, pooled, _ = pipeline.encode_prompt(["two dogs", "hand"], max_sequence_length=16)
    torch.testing.assert_close(offline["encoder_hidden_states"], text)
    torch.testing.assert_close(offline["pooled_projections"], pooled)
    assert (offline["guidance"] is None) == (not dev)
    if dev:
        assert offline["guidance"].tolist() == [1.0, 1.0]


def pack(latents):
    count = len(latents)
    return latents.view(count, 4, 8, 2, 8, 2).permute(0, 2, 4, 1, 3, 5).reshape(count, 64, 16)


def test_encoded_images_decode_to_themselves(flux):
    """Latents lie where the pipeline's own decoding expects them."""
    images = photos()
    latents = make(flux).encode_images(images)
    decoded = flux.vae.decode(latents / flux.vae.config.scaling_factor + flux.vae.config.shift_factor).sample
    expected = flux.vae(images * 2 - 1, sample_posterior=False).sample
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-5)
    assert not latents.requires_grad


def test_cached_latents_stand_for_the_images(flux):
    add_lora(flux)
    rollout = make(flux)
    rest = {"regularization_prompts": ["two dogs", "hand"], "regularization_seeds": [5, 6]}
    images = photos(height=48, width=32)  # not the size of the rollout
    direct = rollout(["a cat"], [0], images, **rest)
    cached = rollout(["a cat"], [0], regularization_latents=rollout.encode_images(images), **rest)
    assert torch.equal(direct.prediction, cached.prediction)
    assert torch.equal(direct.target, cached.target)
    again = rollout(["a cat"], [0], images[:1], rest["regularization_prompts"][:1], [5])
    torch.testing.assert_close(again.prediction, direct.prediction[:1], rtol=0, atol=1e-5)
    torch.testing.assert_close(again.target, direct.target[:1], rtol=0, atol=1e-5)
    other = rollout(["a cat"], [0], images[:1], rest["regularization_prompts"][:1], [6])
    assert not torch.allclose(other.target, again.target)


def test_the_offline_gradient_is_that_of_finite_differences(in_float64):
    pipeline = tiny_flux(guidance_embeds=True)
    pipeline.to(torch.float64)
    weights = add_lora(pipeline)
    for weight in weights.values():
        weight.data = weight.data.double()
    rollout = make(pipeline, gradient_fraction=1.0)

    def loss():
        output = rollout(["a cat"], [0], photos().double(), ["two dogs", "hand"], [5, 6])
        return output.images.mean() + offline_loss(output.prediction, output.target).sum()

    loss().backward()
    generator = torch.Generator().manual_seed(5)
    directions = {n: torch.randn(w.shape, generator=generator, dtype=torch.float64) for n, w in weights.items()}
    values = []
    for step in (1e-4, -2e-4):  # there, and back past the start
        with torch.no_grad():
            for name, direction in directions.items():
                weights[name] += step * direction
            values.append(loss().item())
    expected = (values[0] - values[1]) / 2e-4
    assert sum((weights[n].grad * d).sum().item() for n, d in directions.items()) == pytest.approx(expected, rel=1e-5)


def test_families_without_offline_loss_say_so():
    rollout = make(tiny_sdxl(), max_sequence_length=None)
    with pytest.raises(ValueError, match=r"not available for StableDiffusionXLPipeline, only for \['FluxPipeline'\]"):
        rollout(["a cat"], [0], photos(1), ["hand"], [5])
    with pytest.raises(ValueError, match="not available"):
        rollout.encode_images(photos(1))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"regularization_images": photos(2)}, "`regularization_prompts` is None"),
        ({"regularization_images": photos(2), "regularization_prompts": ["a"]}, "`regularization_seeds` is missing"),
        (
            {"regularization_images": photos(2), "regularization_prompts": ["a"], "regularization_seeds": [0]},
            "2 regularization images have 1 prompts",
        ),
        (
            {
                "regularization_images": photos(1)[0],
                "regularization_prompts": ["a"] * 3,
                "regularization_seeds": [0] * 3,
            },
            r"shape \(3, 32, 32\)",
        ),
        (
            {
                "regularization_images": (photos(1) * 255).byte(),
                "regularization_prompts": ["a"],
                "regularization_seeds": [0],
            },
            "torch.uint8",
        ),
    ],
)
def test_regularization_arguments_are_checked(flux, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(flux)(["a cat"], [0], **kwargs)


# --- noise levels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [64, 1024, 4096])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("sampling", ["logit_normal", "uniform"])
def test_noise_levels_are_shifted_as_the_scheduler_shifts_its_own(sampling, dynamic, tokens):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dynamic, shift=1.0 if dynamic else 3.0)
    found = draw_flow_sigmas(scheduler, generators(range(50)), tokens, sampling)
    if sampling == "uniform":
        plain = torch.cat([torch.rand(1, generator=generator) for generator in generators(range(50))])
    else:
        plain = 1 / (1 + torch.exp(-torch.cat([torch.randn(1, generator=g) for g in generators(range(50))])))
    mu = calculate_shift(tokens) if dynamic else None
    scheduler.set_timesteps(sigmas=plain.tolist(), mu=mu)
    torch.testing.assert_close(found, scheduler.sigmas[:-1])


def test_noise_levels_have_the_named_distribution():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    uniform = draw_flow_sigmas(scheduler, generators(range(2000)), 64, "uniform")
    normal = torch.logit(draw_flow_sigmas(scheduler, generators(range(2000)), 64, "logit_normal"))
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.03)
    assert uniform.std().item() == pytest.approx(12**-0.5, abs=0.02)
    assert normal.mean().item() == pytest.approx(0, abs=0.08)
    assert normal.std().item() == pytest.approx(1, abs=0.06)


def test_the_rollout_draws_as_it_is_told(flux):
    calls = record_calls(flux.transformer)
    for sampling in ("logit_normal", "uniform"):
        make(flux, offline_sigmas=sampling)(["a cat"], [0], photos(1), ["hand"], [5])
        generator = torch.Generator().manual_seed(5)
        torch.randn(4, 16, 16, generator=generator)  # the noise comes first
        expected = (
            torch.randn(1, generator=generator).sigmoid()
            if sampling == "logit_normal"
            else torch.rand(1, generator=generator)
        )
        torch.testing.assert_close(calls[-1]["timestep"], expected)
