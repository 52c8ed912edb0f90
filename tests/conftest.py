# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What every test gets. The tiny pipelines are built by `fixtures.pipelines`; `tests` is on the path."""

import pytest
import torch
from fixtures.pipelines import PIPELINES, tiny_flux


# Threads cost more than they bring on matrices of 16 columns, and results then do not depend on the number of cores.
torch.set_num_threads(1)


def pytest_runtest_setup(item):
    if "gpu" in item.keywords and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def flux():
    """A tiny random FLUX.1-schnell."""
    return tiny_flux()


@pytest.fixture(params=PIPELINES)
def any_pipeline(request):
    """One tiny random pipeline of each family that is tested."""
    return PIPELINES[request.param]()


@pytest.fixture
def in_float64(monkeypatch):
    """Libraries that ask for float32 get float64, so that finite differences are exact to many digits."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.fixture(autouse=True)
def gradients_stay_enabled():
    """No test may leave another one without gradients."""
    yield
    enabled = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert enabled
