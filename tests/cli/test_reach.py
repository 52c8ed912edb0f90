# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What lies in the cache is used soon where the Hub does not answer, whether it refuses or keeps silent."""

import socket
import sys
import time

import pytest
import torch
from fixtures.pipelines import tiny_flux
from fixtures.trainer import tiny_detector
from huggingface_hub import constants

from diffdoctor import command_module
from diffusers_diffdoctor.cli import reach
from diffusers_diffdoctor.cli.diagnose import load_detector
from diffusers_diffdoctor.cli.treat import check_pipeline_is_there
from diffusers_diffdoctor.treatment.prepare import load_pipeline


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """As the Hub's client lays out what it has downloaded."""
    folder, commit = tmp_path_factory.mktemp("cache"), "0" * 40
    for name, model in (("detector", tiny_detector()), ("pipeline", tiny_flux())):
        repository = folder / f"models--some--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs/main").write_text(commit)
        model.save_pretrained(repository / "snapshots" / commit)
    return folder


@pytest.fixture(params=["refused", "silent"])
def no_hub(request, cache, monkeypatch):
    import datasets

    command_module("treat")  # a command leaves out what others say of it
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if request.param == "silent":
            server.listen(100)  # connects, and never answers
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(reach, "SECONDS", 0.5)
        yield


def test_what_is_cached_is_loaded_without_waiting(no_hub, caplog):
    start = time.monotonic()
    detector = load_detector("some/detector", "cpu")
    check_pipeline_is_there("some/pipeline")
    pipeline = load_pipeline("some/pipeline", torch.float32)
    assert time.monotonic() - start < 5
    expected = tiny_detector().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in detector.state_dict().items())
    assert type(pipeline).__name__ == "FluxPipeline"
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "does not answer" in said[0] and "some/detector` is taken from the cache" in said[0]
    assert constants.HF_HUB_OFFLINE and sys.modules["datasets"].config.HF_HUB_OFFLINE


def test_what_is_not_cached_is_said_soon(no_hub):
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="`--pipeline some/other` is no folder here, and it is not in the cache"):
        check_pipeline_is_there("some/other")
    assert time.monotonic() - start < 5
    assert not constants.HF_HUB_OFFLINE


def test_offline_by_wish_asks_nothing(no_hub, monkeypatch, caplog):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    load_detector("some/detector", "cpu")
    assert not caplog.records
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set"):
        load_detector("some/other", "cpu")
