# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from torch import nn

from diffusers_diffdoctor.miniature import build
from diffusers_diffdoctor.miniature.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(32, 32), (16, 80), (80, 16)])
def test_orthogonalized_matrices_keep_their_directions_and_lose_their_scale(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    values = torch.diagonal(u.T @ orthogonalize(matrix) @ vh.T)
    assert 0.3 < values.min() and values.max() < 1.3
    off = u.T @ orthogonalize(matrix) @ vh.T - torch.diag(values)
    assert off.abs().max() < 1e-4


def test_parameters_that_are_no_matrices_move_as_by_adamw():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8))
    twin = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8))
    twin.load_state_dict(module.state_dict())
    optimizers = (
        Muon(module, lr=1e-2),
        torch.optim.AdamW(twin.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.01),
    )
    for _ in range(5):
        x = torch.randn(2, 3, 8, 8)
        for network, optimizer in zip((module, twin), optimizers):
            optimizer.zero_grad()
            network(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(module.parameters(), twin.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_matrices_and_the_rest_are_told_apart():
    module = nn.Sequential(nn.Embedding(32, 32), nn.Linear(32, 32), nn.Linear(32, 4))
    matrices, others = Muon(module, lr=1e-3).param_groups
    assert [p is module[1].weight for p in matrices["params"]] == [True]
    assert len(others["params"]) == 4


def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path):
    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))

    def loss_of_step(module, stop=None):
        def loss(step, generator):
            if step == stop:
                raise KeyboardInterrupt
            x = torch.randn(8, 16, generator=generator)
            return (module(x) - x.sum(1, keepdim=True)).square().mean()

        return loss

    whole, halved = network(), network()
    build._train(whole, loss_of_step(whole), 600, 1e-2, "whole", tmp_path / "whole.pt", ema_decay=0.9)
    with pytest.raises(KeyboardInterrupt):
        build._train(halved, loss_of_step(halved, 300), 600, 1e-2, "half", tmp_path / "half.pt", ema_decay=0.9)
    halved = network()
    build._train(halved, loss_of_step(halved), 600, 1e-2, "half", tmp_path / "half.pt", ema_decay=0.9)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), halved.parameters()))
    assert not any(torch.equal(a, b) for a, b in zip(whole.parameters(), network().parameters()))
    assert not list(tmp_path.iterdir())
