# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Whatever a pipeline returns becomes images in [0, 1], or is refused."""

import pytest
import torch

from diffusers_diffdoctor.rollout.output import own_images


SIZE = (4, 6)


def pixels(count=2, channels=3, low=-1.5, high=1.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(count, channels, *SIZE, generator=generator)


def images(returned, decoded, count=2):
    return own_images(returned, decoded, SIZE, count, "SomePipeline")


@pytest.mark.parametrize(
    "returned",
    [
        lambda x: (x / 2 + 0.5).clamp(0, 1),
        lambda x: x,
        lambda x: x.clamp(-1, 1),
        lambda x: list((x / 2 + 0.5).clamp(0, 1)),
        lambda x: (x / 2 + 0.5).clamp(0, 1).unsqueeze(2),
        lambda x: (x / 2 + 0.5).clamp(0, 1).half(),
    ],
    ids=["processed", "raw", "clamped", "list", "video", "half"],
)
def test_what_the_decoder_said_is_brought_to_0_and_1(returned):
    decoded = pixels().requires_grad_(True)
    found = images(returned(decoded.detach()), decoded)
    torch.testing.assert_close(found, (decoded / 2 + 0.5).clamp(0, 1))
    found.sum().backward()
    assert torch.equal(decoded.grad, torch.full_like(decoded, 0.5))  # beyond the clamp too


def test_other_post_processing_is_taken_as_it_is():
    decoded = pixels()
    returned = ((decoded / 2 + 0.5).clamp(0, 1) ** 2).requires_grad_(True)
    found = images(returned, decoded)
    torch.testing.assert_close(found, returned)
    assert found.requires_grad


def test_transparent_pictures_lie_on_white():
    decoded = pixels(channels=4)
    centred = (decoded / 2 + 0.5).clamp(0, 1)
    expected = centred[:, :3] * centred[:, 3:] + 1 - centred[:, 3:]
    torch.testing.assert_close(images(centred, decoded), expected)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (pixels()[:1], r"returned \(1, 3, 4, 6\) for 2 prompts"),
        (None, "returned NoneType for 2 prompts"),
        (pixels().transpose(2, 3), "asked for images of 4 x 6 pixels, but returned 6 x 4"),
        (30 * pixels(seed=1), r"images in \[-4\d[\d.]*, 4\d[\d.]*\]"),
        (pixels(channels=1, low=0, high=1), "1 channels; 3 are needed"),
    ],
    ids=["count", "nothing", "size", "range", "channels"],
)
def test_what_cannot_be_brought_there_is_refused(returned, message):
    with pytest.raises(ValueError, match=f"SomePipeline .*{message}"):
        images(returned, pixels())
