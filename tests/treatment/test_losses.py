# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch

from diffusers_diffdoctor.treatment.losses import offline_loss, preservation_loss


def test_it_is_the_mean_squared_error_of_each_sample():
    prediction, target = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    expected = [torch.nn.functional.mse_loss(prediction[i], target[i]) for i in range(2)]
    torch.testing.assert_close(offline_loss(prediction, target), torch.stack(expected))


def test_half_precision_is_compared_in_float32():
    target = torch.tensor([[1000.0, 1.0]])
    loss = offline_loss(target.to(torch.float16), target + 0.25)  # 1000.25 is no float16
    assert loss.dtype == torch.float32
    assert loss.item() == 0.0625
    assert offline_loss(target.double(), target).dtype == torch.float64


def test_its_gradient_reaches_the_prediction():
    prediction = torch.tensor([[1.0, 3.0]], requires_grad=True)
    offline_loss(prediction, torch.zeros(1, 2)).sum().backward()
    assert prediction.grad.tolist() == [[1.0, 3.0]]


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\) and `target` \(2, 4\)"):
        offline_loss(torch.zeros(2, 3), torch.zeros(2, 4))


def test_preservation_counts_what_was_sound_before():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 32, 32, generator=generator, requires_grad=True)
    untreated = torch.rand(2, 3, 32, 32, generator=generator)
    maps = torch.zeros(2, 1, 32, 32)
    maps[0, 0, 10, 20] = 0.3
    maps[1] = 1.0  # nothing sound: nothing to preserve
    loss = preservation_loss(images, untreated, maps)
    total, sound = 0.0, torch.zeros(32, 32, dtype=torch.bool)
    for y in range(0, 32, 2):  # cells of 32 / 16 pixels
        for x in range(0, 32, 2):
            if min(abs(y - 10), abs(y - 9)) <= 2 and min(abs(x - 20), abs(x - 19)) <= 2:  # within 2 pixels of it
                continue
            sound[y : y + 2, x : x + 2] = True
            cell = (images[0] - untreated[0])[:, y : y + 2, x : x + 2].mean((1, 2))
            total += cell.square().mean().item()
    assert loss.tolist() == pytest.approx([total / (sound.sum().item() / 4), 0.0])
    loss.sum().backward()
    changed = images.grad.abs().sum(1) > 0
    assert torch.equal(changed[0], sound) and not changed[1].any()
    assert not sound[8:13, 18:23].any() and sound.sum() > 900
    everything = preservation_loss(images.detach(), untreated)
    cells = torch.nn.functional.avg_pool2d(images.detach() - untreated, 2)
    torch.testing.assert_close(everything, cells.square().mean((1, 2, 3)))
