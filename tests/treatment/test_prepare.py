# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Pipelines that were loaded in half precision, or altered, before they came here."""

import pytest
import torch
from fixtures.pipelines import add_lora, tiny_flux, tiny_sdxl

from diffusers_diffdoctor import DifferentiableRollout
from diffusers_diffdoctor.treatment.prepare import load_pipeline


# --- half precision ------------------------------------------------------------------------------------------------------


def image_and_gradient(dtype: torch.dtype, vae_checkpointing: bool) -> tuple[torch.Tensor, torch.Tensor]:
    pipeline = load_pipeline(tiny_sdxl().to(dtype), dtype)
    weights = add_lora(pipeline)
    for weight in weights.values():
        weight.data = weight.data.float()
    rollout = DifferentiableRollout(pipeline, height=32, width=32, num_inference_steps=2, gradient_fraction=0.5)
    rollout.vae_gradient_checkpointing = vae_checkpointing
    images = rollout(["a cup"], seeds=[0]).images
    slope = torch.linspace(0, 1, images.numel()).reshape(images.shape)
    (1e4 * images * slope).mean().backward()  # scaled as a loss scaler would, away from what float16 rounds to 0
    gradients = [weight.grad.flatten().float() for weight in weights.values() if weight.grad is not None]
    return images.detach(), torch.cat(gradients)


@pytest.mark.parametrize("vae_checkpointing", [False, True], ids=["stored", "checkpointed"])
def test_sdxl_in_float16_has_the_gradient_of_float32(vae_checkpointing):
    images, gradient = image_and_gradient(torch.float32, vae_checkpointing)
    half_images, half_gradient = image_and_gradient(torch.float16, vae_checkpointing)
    assert (half_images - images).abs().mean() < 2e-3
    assert torch.cosine_similarity(half_gradient, gradient, dim=0) > 0.99


def test_a_vae_that_overflows_in_float16_computes_in_float32_under_autocast_too():
    latents = torch.randn(1, 4, 8, 8)
    expected = tiny_sdxl().vae.decode(latents.half().float()).sample
    vae = DifferentiableRollout(tiny_sdxl().to(torch.float16)).pipeline.vae
    with torch.autocast("cpu", dtype=torch.float16):
        decoded = vae.decode(latents.half()).sample
    assert decoded.dtype == torch.float32
    assert torch.allclose(decoded, expected, atol=2e-3)  # its weights went through float16 once


def test_a_vae_that_bears_float16_keeps_it():
    pipeline = tiny_sdxl()
    pipeline.vae.register_to_config(force_upcast=False)
    assert DifferentiableRollout(pipeline.to(torch.float16)).pipeline.vae.dtype == torch.float16


# --- altered pipelines ---------------------------------------------------------------------------------------------------


def compiled(pipeline):
    pipeline.transformer = torch.compile(pipeline.transformer)


def compiled_in_place(pipeline):
    pipeline.transformer.compile()


def compiled_by_block(pipeline):
    pipeline.transformer.compile_repeated_blocks()


def fused(pipeline):
    pipeline.transformer.fuse_qkv_projections()


def stored_in_eight_bits(pipeline):
    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def offloaded_by_group(pipeline):
    pipeline.transformer.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")


@pytest.mark.parametrize(
    "alter, remedy",
    [
        (compiled, "without torch.compile"),
        (compiled_in_place, "without torch.compile"),
        (compiled_by_block, "without torch.compile"),
        (fused, r"pipe\.transformer\.unfuse_qkv_projections\(\)"),
        (stored_in_eight_bits, "Load the pipeline without them"),
        (offloaded_by_group, "Load the pipeline without them"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_altered_denoiser_is_refused_with_the_remedy(alter, remedy):
    pipeline = tiny_flux()
    alter(pipeline)
    with pytest.raises(ValueError, match=rf"`pipeline\.transformer` (.|\n)*{remedy}"):
        load_pipeline(pipeline, torch.float32)


def test_the_remedy_for_fused_projections_works():
    pipeline = tiny_flux()
    pipeline.transformer.fuse_qkv_projections()
    pipeline.transformer.unfuse_qkv_projections()
    assert load_pipeline(pipeline, torch.float32) is pipeline


def test_a_compiled_text_encoder_is_no_matter():
    pipeline = tiny_flux()
    pipeline.text_encoder_2.compile()
    assert load_pipeline(pipeline, torch.float32) is pipeline
