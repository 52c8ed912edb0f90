# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What `encode_prompt` returned is remembered, and put together as the pipeline itself stacks it."""

import pytest
import torch
from fixtures.classic_pipelines import CLASSIC
from fixtures.pipelines import tiny_flux, tiny_sdxl
from fixtures.recent_pipelines import RECENT

from diffusers_diffdoctor.rollout import DifferentiableRollout


CLASSES = CLASSIC | RECENT


def rollout_of(name, **kwargs):
    tiny = CLASSES[name]
    named = {key: tiny.kwargs[key] for key in ("guidance_scale", "max_sequence_length") if key in tiny.kwargs}
    rest = {key: value for key, value in tiny.kwargs.items() if key not in named}
    settings = {"num_inference_steps": tiny.steps, "pipeline_kwargs": rest} | named
    return DifferentiableRollout(tiny.build(), height=tiny.size, width=tiny.size, **(settings | kwargs))


def same(found, expected):
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    elif isinstance(expected, (list, tuple)):
        assert type(found) is type(expected) and len(found) == len(expected)
        for a, b in zip(found, expected):
            same(a, b)
    else:
        assert found == expected


@pytest.mark.parametrize(
    "name", ["ZImagePipeline", "OvisImagePipeline", "Flux2Pipeline", "ErnieImagePipeline", "BriaFiboPipeline"]
)
def test_a_batch_is_put_together_as_the_pipeline_itself_does(name):
    """Lists, ids without a dimension of the batch, ids with one, lists of layers."""
    rollout = rollout_of(name)
    texts = ["one cat", "two dog"]
    rollout.cache_prompts(texts)
    asked, encode = [], rollout.pipeline.encode_prompt

    def compare(*args, **kwargs):
        found = rollout.prompts._answer(*args, **kwargs)
        same(found, encode(*args, **kwargs))
        asked.append(found)
        return found

    rollout.pipeline.encode_prompt = compare
    rollout.call(
        prompt=texts,
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
        **rollout.call_kwargs,
    )
    assert asked


def test_equal_results_are_kept_once():
    rollout = DifferentiableRollout(tiny_sdxl(), height=32, width=32, pipeline_kwargs={"negative_prompt": "blurry"})
    rollout.cache_prompts(["one cat", "two dog", "red hat"])
    negatives = {id(row.result[1]) for row in rollout.prompts.rows.values()}
    positives = {id(row.result[0]) for row in rollout.prompts.rows.values()}
    assert len(negatives) == 1 and len(positives) == 3


def test_what_was_not_cached_is_not_kept():
    rollout = DifferentiableRollout(tiny_flux(), height=32, width=32, max_sequence_length=16)
    rollout.cache_prompts(["one cat"])
    rollout.generate(["one cat", "two dog"], [0, 1])
    assert {prompt for prompt, _ in rollout.prompts.keys_of} == {"one cat"}
    assert len(rollout.prompts.rows) == 1


def test_other_arguments_are_another_memory():
    """Guidance decides what is encoded, so prompts of the offline loss are remembered apart."""
    rollout = DifferentiableRollout(tiny_sdxl(), height=32, width=32, guidance_scale=5.0)
    rollout.cache_prompts(["one cat"])
    rollout.cache_prompts(["a photo"], offline=True)
    rollout.free_text_encoders()
    rollout.generate(["one cat"], [0])
    with pytest.raises(ValueError, match="'a photo' was not cached"):
        rollout.generate(["a photo"], [0])
    photo = torch.rand(1, 3, 32, 32)
    assert rollout(["one cat"], [0], photo, ["a photo"], [0]).prediction is not None
    with pytest.raises(ValueError, match="'one cat' was not cached"):
        rollout(["one cat"], [0], photo, ["one cat"], [0])


def test_a_pipeline_that_needs_its_text_encoders_keeps_them(caplog):
    rollout = rollout_of("NucleusMoEImagePipeline")
    rollout.cache_prompts(["one cat"])
    rollout.free_text_encoders()
    assert "The text encoders stay: NucleusMoEImagePipeline needs its text encoders" in caplog.text
    assert rollout.pipeline.text_encoder is not None
    assert "config" in rollout.prompts_not_cached
    assert rollout.generate(["another cat"], [0]).shape[0] == 1


def test_images_that_depend_on_their_neighbours_are_drawn_one_by_one(caplog):
    """GLM-Image draws tokens of its own with the first generator of a batch."""
    rollout = rollout_of("GlmImagePipeline", num_inference_steps=1)
    texts = ["one cat", "two dog"]
    together = rollout.generate(texts, [0, 1])
    assert "GlmImagePipeline draws images one by one" in caplog.text
    assert torch.equal(together[1:], rollout.generate(texts[1:], [1]))
