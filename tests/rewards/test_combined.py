# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What is accepted as a reward, and several of them with weights."""

import numpy as np
import pytest
import torch
from fixtures.segformer import tiny_detector

from diffusers_diffdoctor.rewards import ArtifactReward, CombinedReward, RewardOutput, as_reward, pixel_penalty


class Redness:
    """The map is the red channel."""

    def confidence(self, images):
        return images[:, :1]


def brightness(images, prompts):
    return images.flatten(1).mean(dim=1)


def test_what_is_accepted_as_a_reward():
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    reward = as_reward(Redness(), selection="max", threshold=0.3)
    assert isinstance(reward, ArtifactReward) and reward.selection == "max" and reward.threshold == 0.3
    assert as_reward(reward) is reward
    output = as_reward(brightness)(images, ["", ""])
    torch.testing.assert_close(output.loss, -brightness(images, None))
    torch.testing.assert_close(output.score, brightness(images, None))
    assert output.map is None and output.loss.requires_grad and not output.score.requires_grad
    verdict = RewardOutput(loss=torch.zeros(2), score=torch.ones(2))
    assert as_reward(lambda images, prompts: verdict)(images, ["", ""]) is verdict
    for wrong in (3, None, torch.nn.Linear):
        with pytest.raises(TypeError, match="A reward must be a detector"):
            as_reward(wrong)


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (torch.zeros(3), ValueError, r"shape \(2,\), got \(3,\)"),
        (torch.tensor(0.0), ValueError, r"shape \(2,\), got \(\)"),
        (0.5, TypeError, "must return a RewardOutput or a tensor"),
        (RewardOutput(torch.zeros(1), torch.zeros(1)), ValueError, "1 losses for 2 images"),
    ],
)
def test_wrong_answers_name_the_reward(answer, error, message):
    def my_reward(images, prompts):
        return answer

    with pytest.raises(error, match=message) as caught:
        as_reward(my_reward)(torch.zeros(2, 3, 4, 4), ["", ""])
    assert "my_reward" in str(caught.value)
    for loss, score in ((torch.tensor(0.0), torch.tensor(0.0)), (torch.zeros(2), torch.zeros(3))):
        with pytest.raises(ValueError, match="both of shape"):
            RewardOutput(loss=loss, score=score)


def test_a_combination_is_the_weighted_sum():
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    output = CombinedReward([brightness, Redness()], weights=[0.5, 2.0])(images, ["", ""])
    red = images[:, :1]
    torch.testing.assert_close(output.loss, -0.5 * brightness(images, None) + 2 * pixel_penalty(red))
    sound = 1 - red.flatten(1).max(1).values
    torch.testing.assert_close(output.score, (0.5 * brightness(images, None) + 2 * sound).detach())
    assert torch.equal(output.map, red)
    assert list(output.parts) == ["brightness", "artifact"]
    torch.testing.assert_close(output.parts["brightness"], brightness(images, None).detach())
    torch.testing.assert_close(output.parts["artifact"], sound.detach())
    assert not output.score.requires_grad and output.loss.requires_grad


def test_scores_are_for_the_log_and_keep_no_graph():
    def attached(images, prompts):
        return RewardOutput(loss=-brightness(images, None), score=brightness(images, None))

    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    output = CombinedReward([attached, brightness])(images, ["", ""])
    assert output.loss.requires_grad and not output.score.requires_grad
    assert not any(score.requires_grad for score in output.parts.values()) and len(output.parts) == 2


def test_the_weights_are_one_without_any():
    images = torch.rand(2, 3, 4, 4)
    output = CombinedReward([brightness])(images, ["", ""])
    torch.testing.assert_close(output.loss, -brightness(images, None))
    assert output.map is None and output.parts == {}


def test_the_pixel_selection_reaches_the_detectors():
    images = torch.rand(2, 3, 4, 4)
    output = CombinedReward([Redness()], selection="max", threshold=0.3)(images, ["", ""])
    torch.testing.assert_close(output.loss, images[:, 0].flatten(1).max(1).values)


def test_every_reward_keeps_a_name_of_its_own():
    def brightness_1(images, prompts):
        return images[:, 0].mean(dim=(1, 2))

    combined = CombinedReward([brightness, brightness_1, brightness, brightness])
    assert combined.names == ["brightness", "brightness_1", "brightness_2", "brightness_3"]
    assert list(combined(torch.rand(1, 3, 4, 4), [""]).parts) == combined.names


def unfrozen(images, prompts):
    return torch.nn.Conv2d(3, 1, 3)(images.detach()).mean(dim=(1, 2, 3))


def constant(images, prompts):
    return torch.ones(len(images))


@torch.no_grad()
def not_tracked(images, prompts):
    return brightness(images, prompts)


def in_numpy(images, prompts):
    return torch.from_numpy(images.detach().numpy().mean(axis=(1, 2, 3)))


@pytest.mark.parametrize("blind", [unfrozen, constant, not_tracked, in_numpy])
def test_a_reward_without_gradient_is_refused_among_others_too(blind):
    images = 2 * torch.rand(2, 3, 4, 4, requires_grad=True)
    for rewards in ([blind], [brightness, blind], [blind, Redness()]):
        with pytest.raises(ValueError, match=f"The reward `{blind.__name__}` gives no gradient"):
            CombinedReward(rewards)(images, ["", ""])
    output = CombinedReward([brightness, blind], [1.0, 0.0])(images, ["", ""])  # a metric
    torch.testing.assert_close(output.loss, -brightness(images, None))
    assert set(output.parts) == {"brightness", blind.__name__}
    with torch.no_grad():  # an evaluation
        assert len(CombinedReward([blind])(images, ["", ""]).loss) == 2
    assert len(CombinedReward([blind])(images.detach(), ["", ""]).loss) == 2


def test_a_reward_that_selects_nothing_has_a_gradient_of_zero():
    images = (torch.rand(2, 3, 4, 4) / 100).requires_grad_()
    output = CombinedReward([Redness()], threshold=0.5)(images, ["", ""])
    output.loss.sum().backward()
    assert output.loss.tolist() == [0, 0] and not images.grad.any()


def test_what_a_metric_cannot_say_is_in_no_sum():
    def nothing(images, prompts):
        return torch.full((len(images),), float("nan"))

    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    output = CombinedReward([brightness, nothing], [1.0, 0.0])(images, ["", ""])
    assert output.loss.isfinite().all() and output.score.isfinite().all() and output.parts["nothing"].isnan().all()
    output = CombinedReward([nothing], [0.0])(images, ["", ""])
    assert output.loss.tolist() == output.score.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "No reward was given"),
        (([brightness], [1, 2]), "2 entries for 1 rewards"),
        (([brightness, brightness], [1]), "1 entries for 2 rewards"),
        (([brightness], [float("nan")]), "finite, found"),
    ],
)
def test_weights_that_cannot_work_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CombinedReward(*arguments)


def test_combination_moves_all_its_models():
    model = tiny_detector()
    CombinedReward([model, brightness]).to(torch.float64)
    assert model.dtype == torch.float64


@pytest.mark.parametrize("kind", [list, tuple, np.asarray, lambda scores: np.asarray(scores, dtype=np.float16)])
def test_numbers_without_a_gradient_are_scores_too(kind):
    def darkness(images, prompts):
        return kind([float(1 - image.detach().mean()) for image in images])

    images = torch.rand(3, 3, 4, 4)
    output = CombinedReward([darkness])(images, ["a", "b", "c"])
    torch.testing.assert_close(output.score, 1 - images.mean(dim=(1, 2, 3)), atol=1e-3, rtol=0)
    assert torch.equal(output.loss, -output.score) and output.score.dtype == torch.float32
    with pytest.raises(ValueError, match=r"The reward `darkness` gives no gradient.*DDPO"):
        CombinedReward([darkness])(images.requires_grad_(), ["a", "b", "c"])


def test_a_list_of_tensors_keeps_its_gradient():
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    output = CombinedReward([lambda images, prompts: [image.mean() for image in images]])(images, ["", ""])
    output.loss.sum().backward()
    torch.testing.assert_close(images.grad, torch.full_like(images, -1 / 48))


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        ([0.5], ValueError, r"shape \(2,\), got \(1,\)"),
        (np.zeros((2, 1)), ValueError, r"shape \(2,\), got \(2, 1\)"),
        ([None, 0.5], TypeError, r"must return numbers, one per image, got \[None, 0.5\]"),
        (["0.5", "1"], TypeError, "must return numbers"),
        ([[1, 2], [3]], TypeError, "must return numbers"),
        ("12", TypeError, "got str"),
    ],
)
def test_wrong_numbers_name_the_reward(answer, error, message):
    def my_reward(images, prompts):
        return answer

    with pytest.raises(error, match=f"The reward `my_reward` .*{message}"):
        as_reward(my_reward)(torch.zeros(2, 3, 4, 4), ["", ""])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_named(value):
    def my_reward(images, prompts):
        return torch.where(torch.arange(len(images)) == 1, value, images.mean(dim=(1, 2, 3)))

    images = torch.rand(2, 3, 4, 4)
    for given in (images, images.clone().requires_grad_()):
        with pytest.raises(FloatingPointError, match=r"`my_reward` returned -?(nan|inf) for 1 of 2 .* prompt 'a cup'"):
            CombinedReward([brightness, my_reward])(given, ["a hat", "a cup"])
    broken = images.clone()
    broken[1] = float("nan")  # not the reward's fault
    assert CombinedReward([my_reward])(broken, ["a hat", "a cup"]).loss[0].isfinite()
    assert CombinedReward([brightness, my_reward], [1, 0])(images, ["a hat", "a cup"]).loss.isfinite().all()
