# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The offline loss against losses written by hand, and against what scheduler, VAE and the pipeline's own call do."""

import diffusers
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from fixtures.classic_pipelines import tiny_sana_sprint, tiny_sd
from fixtures.pipelines import add_lora, tiny_flux, tiny_pixart, tiny_qwen, tiny_sd3, tiny_sdxl

from diffusers_diffdoctor.rollout import DifferentiableRollout
from diffusers_diffdoctor.rollout.latents import NotInvertible, measure_latent_map
from diffusers_diffdoctor.rollout.noise import add_noise, draw_flow_sigmas
from diffusers_diffdoctor.treatment.losses import offline_loss


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


# --- offline loss of FLUX --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dev", [False, True])
def test_flux_is_asked_for_the_velocity_of_its_own_latents(dev):
    pipeline = tiny_flux(guidance_embeds=dev, dynamic_shifting=dev)
    add_lora(pipeline)
    rollout = make(pipeline)
    assert rollout.offline_loss_missing is None  # measured, before calls are counted
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


def test_half_precision_does_not_blur_the_latents(flux):
    """How latents reach the decoder is measured in float32, also where the pipeline is in bfloat16."""
    images, expected = photos(), make(tiny_flux()).encode_images(photos())
    rollout = make(flux.to(torch.bfloat16))
    found = rollout.encode_images(images)
    assert (found - expected).norm() < 0.02 * expected.norm()  # the VAE itself is in bfloat16
    scale = rollout.training_loss._map.scale
    torch.testing.assert_close(scale, torch.full_like(scale, 1 / 0.3611), rtol=1e-5, atol=0)


def test_cached_latents_stand_for_the_images(flux):
    add_lora(flux)
    rollout = make(flux)
    rest = {"regularization_prompts": ["two dogs", "hand"], "regularization_seeds": [5, 6]}
    images = photos()
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


# --- other models, by hand ---------------------------------------------------------------------------------------------------


def drawn(seeds, shape, steps=1000):
    """Noise and timestep of each sample, drawn as the rollout draws them."""
    pairs = [(torch.randn(shape, generator=g), torch.randint(steps, (1,), generator=g)) for g in generators(seeds)]
    noise, timesteps = zip(*pairs)
    return torch.stack(noise), torch.cat(timesteps)


def noised_by_ddpm(latents, noise, timesteps):
    scheduler = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return scheduler.add_noise(latents, noise, timesteps), scheduler


def sdxl_by_hand(pipeline, images, prompts, seeds):
    latents = pipeline.vae.encode(images * 2 - 1).latent_dist.mean * pipeline.vae.config.scaling_factor
    noise, timesteps = drawn(seeds, latents.shape[1:])
    noised, _ = noised_by_ddpm(latents, noise, timesteps)
    text, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    conditions = {"text_embeds": pooled, "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]] * len(images))}
    said = pipeline.unet(noised, timesteps, encoder_hidden_states=text, added_cond_kwargs=conditions).sample
    return (said - noise).square().flatten(1).mean(1)


def sd_v_by_hand(pipeline, images, prompts, seeds):
    latents = pipeline.vae.encode(images * 2 - 1).latent_dist.mean * pipeline.vae.config.scaling_factor
    noise, timesteps = drawn(seeds, latents.shape[1:])
    scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
    text, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
    noised = scheduler.add_noise(latents, noise, timesteps)
    said = pipeline.unet(noised, timesteps, encoder_hidden_states=text).sample
    return (said - scheduler.get_velocity(latents, noise, timesteps)).square().flatten(1).mean(1)


def sd3_by_hand(pipeline, images, prompts, seeds):
    latents = pipeline.vae.encode(images * 2 - 1).latent_dist.mean
    latents = (latents - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor
    losses = []
    for latent, prompt, generator in zip(latents, prompts, generators(seeds)):
        noise = torch.randn(latent.shape, generator=generator)
        sigma = torch.randn(1, generator=generator).sigmoid()
        sigma = 3 * sigma / (1 + 2 * sigma)
        text, _, pooled, _ = pipeline.encode_prompt(
            prompt, None, None, do_classifier_free_guidance=False, max_sequence_length=16
        )
        said = pipeline.transformer(
            hidden_states=((1 - sigma) * latent + sigma * noise)[None],
            timestep=sigma * 1000,
            encoder_hidden_states=text,
            pooled_projections=pooled,
        ).sample[0]
        losses.append((said - (noise - latent)).square().mean())
    return torch.stack(losses)


def pixart_by_hand(pipeline, images, prompts, seeds):
    latents = pipeline.vae.encode(images * 2 - 1).latent_dist.mean * pipeline.vae.config.scaling_factor
    noise, timesteps = drawn(seeds, latents.shape[1:])
    noised = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config).add_noise(latents, noise, timesteps)
    text, mask, _, _ = pipeline.encode_prompt(prompts, False, clean_caption=False, max_sequence_length=16)
    said = pipeline.transformer(
        noised,
        encoder_hidden_states=text,
        encoder_attention_mask=mask,
        timestep=timesteps,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ).sample[:, :4]  # the other channels are the variance
    return (said - noise).square().flatten(1).mean(1)


def tiny_sd_v():
    pipeline = tiny_sd()
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type="v_prediction")
    return pipeline


@pytest.mark.parametrize(
    ("build", "by_hand", "kwargs"),
    [
        (tiny_sdxl, sdxl_by_hand, {"max_sequence_length": None}),
        (tiny_sd_v, sd_v_by_hand, {"max_sequence_length": None}),
        (tiny_sd3, sd3_by_hand, {}),
        (tiny_pixart, pixart_by_hand, {"pipeline_kwargs": {"clean_caption": False}}),
    ],
    ids=["sdxl", "sd-v", "sd3", "pixart"],
)
def test_the_loss_is_the_one_written_by_hand(build, by_hand, kwargs):
    pipeline, images, prompts, seeds = build(), photos(3), ["two dogs", "hand", "a cat"], [5, 6, 7]
    weights = add_lora(pipeline)
    rollout = make(pipeline, **kwargs)
    output = rollout(["a cat"], [0], images, prompts, seeds)
    found = offline_loss(output.prediction, output.target)
    expected = by_hand(pipeline, images, prompts, seeds)
    assert expected.min() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    weight = weights[next(iter(weights))]
    gradients = [torch.autograd.grad(loss.sum(), weight, retain_graph=True)[0] for loss in (found, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


def test_a_pipeline_that_cannot_be_asked_says_why():
    rollout = make(tiny_sana_sprint(), pipeline_kwargs={"clean_caption": False})
    reason = rollout.offline_loss_missing
    assert "one step" in reason
    with pytest.raises(ValueError, match=r"not available for SanaSprintPipeline: .*one step"):
        rollout(["a cat"], [0], photos(1), ["hand"], [5])
    with pytest.raises(ValueError, match="not available"):
        rollout.encode_images(photos(1))


# --- latents -----------------------------------------------------------------------------------------------------------------


def test_a_latent_map_is_measured_and_turned_around():
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(4 * 6 * 6, generator=generator)
    scale, shift = (torch.rand(4 * 6 * 6, generator=generator) + 0.5 for _ in range(2))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        found = measure_latent_map(
            lambda x, dtype=dtype: (scale * x.flatten(1)[:, order] + shift).view(-1, 4, 1, 36).to(dtype), (4, 6, 6)
        )
        assert torch.equal(found.order, order)
        latents = torch.randn(2, 4, 6, 6, generator=generator)
        decoder_input = (scale * latents.flatten(1)[:, order] + shift).view(-1, 4, 1, 36)
        torch.testing.assert_close(found.invert(decoder_input), latents, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x[..., :3], "18 reach the decoder|of 36"),
        (lambda x: x.flip(-1) + x, "mixed"),
        (lambda x: torch.tanh(x) + 2 * x, "more than a factor"),
        (lambda x: torch.cat([x[..., :3], 0 * x[..., 3:]], -1), "do not reach"),
    ],
)
def test_what_cannot_be_turned_around_is_refused(function, message):
    with pytest.raises(NotInvertible, match=message):
        measure_latent_map(function, (1, 6, 6))


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
    mu = calculate_shift(tokens) if dynamic else None
    found = draw_flow_sigmas(scheduler, generators(range(50)), mu, sampling)
    if sampling == "uniform":
        plain = torch.cat([torch.rand(1, generator=generator) for generator in generators(range(50))])
    else:
        plain = 1 / (1 + torch.exp(-torch.cat([torch.randn(1, generator=g) for g in generators(range(50))])))
    scheduler.set_timesteps(sigmas=plain.tolist(), mu=mu)
    torch.testing.assert_close(found, scheduler.sigmas[:-1])


def test_noise_levels_have_the_named_distribution():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    uniform = draw_flow_sigmas(scheduler, generators(range(2000)), None, "uniform")
    normal = torch.logit(draw_flow_sigmas(scheduler, generators(range(2000)), None, "logit_normal"))
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.03)
    assert uniform.std().item() == pytest.approx(12**-0.5, abs=0.02)
    assert normal.mean().item() == pytest.approx(0, abs=0.08)
    assert normal.std().item() == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_noise_and_targets_are_those_of_the_scheduler(kind):
    scheduler = diffusers.DDPMScheduler(prediction_type=kind)
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noised = add_noise(scheduler, latents, generators([5, 6, 7]), "logit_normal", None)
    drawn = generators([5, 6, 7])
    noise = torch.stack([torch.randn(4, 8, 8, generator=generator) for generator in drawn])
    timesteps = torch.cat([torch.randint(1000, (1,), generator=generator) for generator in drawn])
    assert torch.equal(noised.timesteps, timesteps) and len(set(timesteps.tolist())) == 3
    torch.testing.assert_close(noised.latents, scheduler.add_noise(latents, noise, timesteps))
    velocity = scheduler.get_velocity(latents, noise, timesteps)
    expected = {"epsilon": noise, "v_prediction": velocity, "sample": latents}[kind]
    torch.testing.assert_close(noised.target, expected)


def test_predictions_come_in_the_order_of_the_prompts():
    """Those of one length share a call: here the first and the last."""
    rollout = make(tiny_qwen(), max_sequence_length=512)
    prompts, seeds = ["a cat", "two dogs", "a dog and a cat", "a dog"], [5, 6, 7, 8]
    rollout.cache_prompts(prompts, offline=True)
    assert rollout.prompts.groups(prompts, rollout.training_loss.arguments) == [[0, 3], [1], [2]]
    images = photos(4)
    together = rollout(["a cat"], [0], images, prompts, seeds)
    for i in range(4):
        alone = rollout(["a cat"], [0], images[i : i + 1], prompts[i : i + 1], seeds[i : i + 1])
        torch.testing.assert_close(together.prediction[i], alone.prediction[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.target[i], alone.target[0], rtol=1e-4, atol=1e-5)


def test_the_rollout_draws_as_it_is_told(flux):
    calls = record_calls(flux.transformer)
    for sampling in ("logit_normal", "uniform"):
        rollout = make(flux, offline_sigmas=sampling)
        rollout(["a cat"], [0], photos(1), ["hand"], [5])
        generator = torch.Generator().manual_seed(5)
        torch.randn(4, 16, 16, generator=generator)  # the noise comes first
        expected = (
            torch.randn(1, generator=generator).sigmoid()
            if sampling == "logit_normal"
            else torch.rand(1, generator=generator)
        )
        torch.testing.assert_close(calls[-1]["timestep"], expected)
