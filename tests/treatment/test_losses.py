# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch

from diffusers_diffdoctor.treatment.losses import offline_loss


def test_it_is_the_mean_squared_error_of_each_sample():
    prediction, target = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    expected = [torch.nn.functional.mse_loss(prediction[i], target[i]) for i in range(2)]
    torch.testing.assert_close(offline_loss(prediction, target), torch.stack(expected))


def test_half_precision_is_compared_in_float32():
    target = torch.tensor([[1000.0, 1.0]])
    loss = offline_loss(target.to(torch.float16), target + 0.25)  # 1000.25 is no float16
    assert loss.dtype == torch.float32
    assert loss.item() == 0.0625
    both = torch.tensor([[1000.0]], dtype=torch.float16), torch.tensor([[0.25]], dtype=torch.float16)
    assert offline_loss(*both).item() == 999.75**2  # nor is the difference
    assert offline_loss(target.double(), target).dtype == torch.float64


def test_its_gradient_reaches_the_prediction():
    prediction = torch.tensor([[1.0, 3.0]], requires_grad=True)
    offline_loss(prediction, torch.zeros(1, 2)).sum().backward()
    assert prediction.grad.tolist() == [[1.0, 3.0]]


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\) and `target` \(2, 4\)"):
        offline_loss(torch.zeros(2, 3), torch.zeros(2, 4))
