# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""An adapter in a part of the steps, against weights that are set to zero by hand at the right step."""

import pytest
import torch
from fixtures.pipelines import add_lora, tiny_flux, tiny_sdxl
from peft.tuners.tuners_utils import BaseTunerLayer

from diffusers_diffdoctor.rollout import adapter_until


def draw(pipeline, **kwargs):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        "a cat",
        height=32,
        width=32,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **kwargs,
    ).images


@pytest.mark.parametrize("build", [tiny_flux, tiny_sdxl])
@pytest.mark.parametrize(("share", "steps"), [(0.0, 0), (0.5, 2), (0.7, 3), (1.0, 4)])
def test_the_adapter_is_off_after_its_share_of_the_steps(build, share, steps):
    pipeline = build()
    weights = add_lora(pipeline)

    def off(pipeline, number, timestep, kwargs):
        if number + 1 == steps:
            for name, weight in weights.items():
                weight.data.mul_(0 if "lora_B" in name else 1)
        return kwargs

    whole, states = draw(pipeline), []
    denoiser = getattr(pipeline, "transformer", None) or pipeline.unet
    layer = next(module for module in denoiser.modules() if isinstance(module, BaseTunerLayer))
    with adapter_until(pipeline, share):
        hook = layer.register_forward_pre_hook(lambda module, args: states.append(not module.disable_adapters))
        found = draw(pipeline)
        hook.remove()
        again = draw(pipeline)
    assert states == [True] * steps + [False] * (4 - steps)
    torch.testing.assert_close(found, again, rtol=0, atol=0)
    torch.testing.assert_close(draw(pipeline), whole, rtol=0, atol=0)  # and all is as before
    if steps == 0:
        off(None, -1, None, {})
    torch.testing.assert_close(found, draw(pipeline, callback_on_step_end=off), rtol=0, atol=1e-5)


def test_a_share_out_of_its_range_is_refused():
    with pytest.raises(ValueError, match=r"`share` is 1\.5"):
        with adapter_until(tiny_flux(), 1.5):
            pass
