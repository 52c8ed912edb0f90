# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from fixtures.pipelines import tiny_flux, tiny_pixart, tiny_qwen, tiny_sdxl

from diffusers_diffdoctor.repair import DiagnosticGuidance
from diffusers_diffdoctor.rollout import DifferentiableRollout


class Bright(torch.nn.Module):
    """Takes brightness in the upper half for an artifact."""

    def confidence(self, images):
        value = images.mean(1, keepdim=True)
        return value * (torch.arange(value.shape[-2]) < value.shape[-2] // 2)[:, None]


class Content(torch.nn.Module):
    def confidence(self, images):
        return 0 * images[:, :1]


PROMPTS, SEEDS = ["a cat", "a dog"], [3, 4]


def rollout_of(build, steps=6):
    return DifferentiableRollout(build(), height=32, width=32, num_inference_steps=steps)


@pytest.mark.parametrize("build", [tiny_flux, tiny_sdxl, tiny_pixart, tiny_qwen])
def test_guidance_makes_images_the_detector_likes_better_and_no_other_pixels(build):
    rollout = rollout_of(build)
    plain = rollout.generate(PROMPTS, SEEDS)
    guided = DiagnosticGuidance(rollout, Bright(), strength=1.0, last=1.0).generate(PROMPTS, SEEDS)
    before, after = (Bright().confidence(images).mean((1, 2, 3)) for images in (plain, guided))
    assert (after < before).all()
    assert torch.equal(rollout.generate(PROMPTS, SEEDS), plain)  # nothing of it stays


def test_without_strength_or_complaint_images_are_the_pipelines_own():
    rollout = rollout_of(tiny_flux)
    plain = rollout.generate(PROMPTS, SEEDS)
    assert torch.equal(DiagnosticGuidance(rollout, Bright(), strength=0.0).generate(PROMPTS, SEEDS), plain)
    # a velocity that is answered for without change is that of the denoiser
    assert torch.equal(DiagnosticGuidance(rollout, Content()).generate(PROMPTS, SEEDS), plain)


def test_an_image_is_guided_alike_alone_and_in_a_batch():
    guidance = DiagnosticGuidance(rollout_of(tiny_flux), Bright(), strength=0.5)
    together = guidance.generate(PROMPTS, SEEDS)
    assert torch.allclose(guidance.generate(PROMPTS[1:], SEEDS[1:]), together[1:], atol=1e-4)


def test_decoded_latents_are_the_images_that_they_were_encoded_from():
    """What the sampler ends with, decoded by the way that was measured, is the image."""
    rollout = rollout_of(tiny_flux)
    with torch.no_grad():
        output = rollout(PROMPTS, SEEDS)
    assert rollout.training_loss.missing(PROMPTS[0]) is None
    assert torch.allclose(rollout.training_loss.decode(output.latents), output.images, atol=1e-4)


@pytest.mark.parametrize(("options", "named"), [({"strength": -1}, "`strength`.*-1"), ({"last": 0}, "`last`.*0")])
def test_wrong_arguments_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        DiagnosticGuidance(rollout_of(tiny_flux), Bright(), **options)
