# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from fixtures.segformer import tiny_detector

from diffusers_diffdoctor.rewards import ArtifactReward, pixel_penalty


def random_maps(seed=0):
    """float64, away from the threshold of 0.1 so that small steps do not cross it; the second sample is clean."""
    maps = torch.rand(3, 1, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    maps = torch.where((maps - 0.1).abs() < 0.01, 0.5, maps)
    maps[1] = maps[1] * 0.09
    return maps


def by_loops(maps, selection, threshold):
    results = []
    for sample in maps[:, 0].tolist():
        values = [value for row in sample for value in row]
        active = [value for value in values if value > threshold]
        results.append(
            {
                "mean": sum(values) / len(values),
                "max": max(values),
                "threshold": sum(active) / len(active) if active else 0.0,
            }[selection]
        )
    return torch.tensor(results, dtype=maps.dtype)


@pytest.mark.parametrize("selection", ["threshold", "mean", "max"])
def test_penalty_and_its_gradient(selection):
    maps = random_maps().requires_grad_()
    penalty = pixel_penalty(maps, selection)
    torch.testing.assert_close(penalty, by_loops(maps, selection, 0.1))
    (gradient,) = torch.autograd.grad(penalty.sum(), maps)
    step, expected = 1e-7, torch.zeros_like(maps)
    for index in range(maps.numel()):
        moved = torch.zeros_like(maps).flatten()
        moved[index] = step
        moved = moved.view_as(maps)
        high, low = (by_loops((maps + sign * moved).detach(), selection, 0.1).sum() for sign in (1, -1))
        expected.view(-1)[index] = (high - low) / (2 * step)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-6)


def test_clean_sample_costs_nothing():
    maps = random_maps().requires_grad_()
    penalty = pixel_penalty(maps)
    (gradient,) = torch.autograd.grad(penalty.sum(), maps)
    assert penalty[1] == 0 and gradient[1].abs().max() == 0
    assert gradient.isfinite().all() and gradient[0].abs().max() > 0
    nothing = torch.zeros(2, 1, 4, 4, requires_grad=True)
    pixel_penalty(nothing).sum().backward()
    assert nothing.grad.abs().max() == 0


def test_samples_do_not_mix():
    maps = random_maps()
    for selection in ("threshold", "mean", "max"):
        alone = torch.cat([pixel_penalty(sample[None], selection) for sample in maps])
        assert torch.equal(alone, pixel_penalty(maps, selection))


def test_threshold_is_exclusive_and_can_be_moved():
    maps = torch.tensor([0.25, 0.5, 0.75, 1.0]).view(1, 1, 2, 2)
    assert pixel_penalty(maps, threshold=0.5).item() == pytest.approx(0.875)
    assert pixel_penalty(maps, threshold=0.2).item() == pytest.approx(0.625)
    assert pixel_penalty(maps, threshold=0.75).item() == 1  # of a single active pixel
    assert pixel_penalty(torch.tensor([0.0, 0.5]).view(1, 1, 1, 2), threshold=0.0).item() == 0.5


def test_half_precision_counts_all_pixels():
    """float16 ends at 65504; a 1024-pixel map has a million pixels."""
    maps = torch.full((1, 1, 1024, 1024), 0.5, dtype=torch.float16)
    assert pixel_penalty(maps).item() == pixel_penalty(maps, "mean").item() == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 4, 4),), "must have the shape"),
        ((torch.zeros(2, 3, 4, 4),), "must have the shape"),
        ((torch.zeros(2, 1, 0, 4),), "must have the shape"),
        ((torch.zeros(2, 1, 4, 4), "median"), "one of threshold, mean, max; got 'median'"),
        ((torch.zeros(2, 1, 4, 4), "threshold", 1.0), "threshold must lie in"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        pixel_penalty(*arguments)


class Redness:
    """The map is the red channel."""

    def confidence(self, images):
        return images[:, :1]


def test_reward_of_any_detector():
    images = torch.rand(2, 3, 4, 4)
    images[1, 0] = 0.05
    images.requires_grad_()
    output = ArtifactReward(Redness())(images, ["a", "b"])
    torch.testing.assert_close(output.loss, pixel_penalty(images[:, :1]))
    torch.testing.assert_close(output.score, 1 - images[:, 0].flatten(1).max(1).values)
    assert torch.equal(output.map, images[:, :1]) and not output.map.requires_grad and not output.score.requires_grad
    output.loss.sum().backward()
    assert images.grad[0, 0].abs().sum() > 0 and images.grad[1].abs().sum() == 0
    assert ArtifactReward(Redness(), selection="mean")(images, None).loss[1].item() == pytest.approx(0.05)
    high = ArtifactReward(Redness(), threshold=0.4)(images, None)
    torch.testing.assert_close(high.loss, pixel_penalty(images[:, :1], threshold=0.4))
    assert high.loss[0] > output.loss[0]
    with pytest.raises(ValueError, match="got 'all'"):
        ArtifactReward(Redness(), selection="all")
    with pytest.raises(TypeError, match="needs a `confidence"):
        ArtifactReward(object())


def test_detector_stays_frozen_and_in_evaluation_mode():
    model = tiny_detector().train()
    reward = ArtifactReward(model)
    reward.train()
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    reward(images, ["", ""]).loss.sum().backward()
    assert images.grad.abs().sum() > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
