# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
import copy

import pytest
import torch
from diffusers.training_utils import EMAModel
from fixtures.runs import detector, state_of
from fixtures.segformer import tiny_detector
from fixtures.trainer import assert_same

from diffusers_diffdoctor.detector import ArtifactDetectorForSemanticSegmentation
from diffusers_diffdoctor.detector.averaging import moving_average


def test_the_average_is_that_of_diffusers():
    """By which treatment averages; with statistics of normalisation layers beside the weights, which it has not."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    start = [value.clone() for value in model.parameters()]
    ours, theirs = moving_average(model, 0.6), EMAModel(model.parameters(), decay=0.6)
    mean = None
    for step in range(1, 20):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        model(torch.randn(5, 3))
        ours.update_parameters(model)
        theirs.step(model.parameters())
        decay = 0 if step == 1 else min(0.6, step / (9 + step))
        mean = model[1].running_mean if mean is None else decay * mean + (1 - decay) * model[1].running_mean
    for a, b, first in zip(ours.module.parameters(), theirs.shadow_params, start):
        torch.testing.assert_close(a, b)
        assert not a.requires_grad and not torch.allclose(a, first)
    torch.testing.assert_close(ours.module[1].running_mean, mean)
    assert ours.module[1].num_batches_tracked == 19 and not ours.module.training and model.training


def test_the_average_is_evaluated_and_saved(tmp_path):
    trainer = detector(tmp_path, ema_decay=0.7, max_steps=4, save_steps=4, eval_strategy="steps", eval_steps=4)
    trainer.train()
    trainer.save_model()
    live, average = trainer.model.state_dict(), trainer.average.module.state_dict()
    assert any(not torch.equal(live[name], average[name]) for name in live)
    for folder in (tmp_path, tmp_path / "checkpoint-4"):
        saved = ArtifactDetectorForSemanticSegmentation.from_pretrained(folder)
        assert_same(saved.state_dict(), average)
    logged = next(entry for entry in trainer.state.log_history if "eval_mse" in entry)
    plain = detector(tmp_path / "again", ema_decay=None)
    plain.model.load_state_dict(average)
    assert plain.evaluate()["eval_mse"] == pytest.approx(logged["eval_mse"], rel=1e-6)
    plain.model.load_state_dict(live)
    assert plain.evaluate()["eval_mse"] != pytest.approx(logged["eval_mse"], rel=1e-4)
    assert not (tmp_path / "live_model.safetensors").exists()


def test_a_resumed_run_goes_on_with_both(tmp_path):
    whole, resumed = (detector(tmp_path / "run", overwrite_output_dir=True) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert_same(state_of(whole), state_of(resumed))
    assert "average.1" in state_of(whole)


def test_a_run_may_begin_or_stop_to_average(tmp_path):
    detector(tmp_path / "run", ema_decay=0.5, max_steps=2).train()
    checkpoint = tmp_path / "run/checkpoint-2"
    saved = ArtifactDetectorForSemanticSegmentation.from_pretrained(checkpoint).state_dict()
    without = detector(tmp_path / "run", ema_decay=None, max_steps=2)
    without._load_from_checkpoint(str(checkpoint))
    assert without.average is None
    assert any(not torch.equal(saved[name], value) for name, value in without.model.state_dict().items())
    detector(tmp_path / "plain", ema_decay=None, max_steps=2).train()
    begun = detector(tmp_path / "plain", ema_decay=0.5, max_steps=2)
    begun._load_from_checkpoint(str(tmp_path / "plain/checkpoint-2"))
    assert_same(dict(begun.model.state_dict()), dict(begun.average.module.state_dict()))
    assert begun.average.n_averaged == 0


def test_the_best_average_is_loaded_at_the_end(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 3, "learning_rate": 1e-2}
    trainer = detector(
        tmp_path, load_best_model_at_end=True, metric_for_best_model="eval_mse", greater_is_better=True, **settings
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    expected = ArtifactDetectorForSemanticSegmentation.from_pretrained(best).state_dict()
    assert_same(dict(trainer.model.state_dict()), dict(expected))
    assert trainer.saved_step == trainer.state.best_global_step < 3


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5])
def test_a_decay_that_averages_nothing_is_refused(tmp_path, decay):
    with pytest.raises(ValueError, match=r"`ema_decay` must be in \(0, 1\)"):
        detector(tmp_path, ema_decay=decay)


def test_half_precision_is_averaged_in_its_own_type():
    model = tiny_detector().half()
    average = moving_average(copy.deepcopy(model), 0.5)
    average.update_parameters(model)
    average.update_parameters(model)
    assert {value.dtype for value in average.module.parameters()} == {torch.float16}
