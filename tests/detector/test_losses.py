# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
import math

import pytest
import torch

from diffusers_diffdoctor.detector.losses import LOSSES, confidence_error, cross_entropy_with_dice


every = pytest.mark.parametrize("loss", list(LOSSES.values()), ids=list(LOSSES))


def maps(seed=0, soft=True):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(3, 1, 8, 8, generator=generator)
    return values if soft else values.round()


def logits(seed=1):
    return torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_squared_error_by_hand():
    labels = torch.tensor([[[[1.0, 0.0], [-1.0, 0.25]]]])
    said = torch.tensor([[[[0.0, 0.0], [9.0, 0.0]]]])
    assert confidence_error(said, labels).item() == pytest.approx((0.25 + 0.25 + 0.0625) / 3)


def test_cross_entropy_with_dice_by_hand():
    labels, confidences = [0.8, 0.0, 0.5], [0.9, 0.2, 0.4]
    entropy = -sum(t * math.log(c) + (1 - t) * math.log(1 - c) for c, t in zip(confidences, labels)) / 3
    dice = sum(abs(c - t) for c, t in zip(confidences, labels)) / (sum(confidences) + sum(labels))
    found = cross_entropy_with_dice(
        torch.tensor(confidences).logit().view(1, 1, 1, 3), torch.tensor(labels).view(1, 1, 1, 3)
    )
    assert found.item() == pytest.approx(entropy + 0.2 * 0.8 * dice, rel=1e-5)


def test_for_hard_labels_it_is_the_usual_dice():
    labels, said = maps(soft=False), logits()
    confidence = said.sigmoid()
    both = (confidence + labels).flatten(1).sum(dim=1)
    usual = 1 - 2 * (confidence * labels).flatten(1).sum(dim=1) / both
    entropy = torch.nn.functional.binary_cross_entropy(confidence, labels, reduction="none").flatten(1).mean(dim=1)
    torch.testing.assert_close(cross_entropy_with_dice(said, labels), entropy + 0.2 * usual)


@every
def test_what_does_not_count_changes_nothing(loss):
    """Whatever the network says of it, and however much of it there is."""
    labels, said = maps(), logits()
    padded, wide = torch.full((3, 1, 8, 13), -1.0), 9 * torch.ones(3, 1, 8, 13)
    padded[..., :8], wide[..., :8] = labels, said
    wide.requires_grad_()
    found = loss(wide, padded)
    torch.testing.assert_close(found, loss(said, labels))
    found.sum().backward()
    assert wide.grad[..., 8:].abs().max() == 0 and wide.grad[..., :8].abs().min() > 0
    assert loss(said, torch.full_like(labels, -1.0)).tolist() == [0, 0, 0]


@every
def test_an_image_counts_as_if_it_were_alone(loss):
    labels, said = maps(), logits()
    labels[1] = 0
    alone = torch.cat([loss(said[i : i + 1], labels[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(loss(said, labels), alone)


@every
@pytest.mark.parametrize("soft", [True, False], ids=["soft", "hard"])
def test_the_map_itself_is_the_best_answer(loss, soft):
    """Also for soft labels, which the usual Dice loss would pull to 0 or 1, and for a map of zeros."""
    labels = maps(soft=soft).clamp(0.02, 0.98)
    labels[1] = 1 / 255
    best = labels.logit()
    for step in (-0.5, 0.5, *(scale * logits(seed) for seed in range(5) for scale in (0.05, 1.0))):
        assert (loss(best + step, labels) > loss(best, labels)).all()


def test_only_squared_error_stops_learning_where_nothing_is_found():
    """Confidences of 1e-4 everywhere, a quarter of the image is an artifact: the reason for the other loss."""
    labels = torch.zeros(1, 1, 8, 8)
    labels[..., :4, :4] = 1
    pull = {}
    for name, loss in LOSSES.items():
        said = torch.full((1, 1, 8, 8), 1e-4).logit().requires_grad_()
        loss(said, labels).sum().backward()
        pull[name] = said.grad[..., :4, :4].abs().max().item() * 64  # of a pixel, without the mean
    assert pull["mse"] < 3e-4 and pull["bce_dice"] > 0.9


def test_a_faint_map_is_no_region():
    """Labels of 1/255 everywhere, as a detector writes them where nothing is: Dice must not ask for exactly that."""
    labels = torch.full((1, 1, 32, 32), 1 / 255)
    nothing = torch.full_like(labels, 1e-3).logit()
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(nothing, labels)
    assert entropy < cross_entropy_with_dice(nothing, labels) < entropy + 1e-3
    zeros = torch.zeros_like(labels)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(nothing, zeros)
    assert cross_entropy_with_dice(nothing, zeros).item() == pytest.approx(entropy.item())
    region = labels.clone()
    region[..., :8, :8] = 1
    assert cross_entropy_with_dice(nothing, region) > 0.15 + torch.nn.functional.binary_cross_entropy_with_logits(
        nothing, region
    )


@every
def test_certain_networks_keep_finite_losses(loss):
    labels = maps(soft=False)
    labels[1] = 0
    for said in (torch.full_like(labels, -200.0), torch.full_like(labels, 200.0)):
        said.requires_grad_()
        found = loss(said, labels)
        found.sum().backward()
        assert torch.isfinite(found).all() and torch.isfinite(said.grad).all()
