# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What cannot work is refused early, by name; what goes wrong later stops before it reaches the weights."""

import re

import numpy as np
import pandas
import pytest
import torch
from datasets import Dataset, DatasetDict, Image
from fixtures.classic_pipelines import tiny_sana_sprint
from fixtures.pipelines import tiny_flux
from fixtures.trainer import PROMPTS, assert_same, lora_of, photos, rows, tiny_args, tiny_detector, tiny_trainer
from transformers import TrainingArguments

from diffusers_diffdoctor import PixelRewardTrainer
from diffusers_diffdoctor.treatment import prepare


class Logits(torch.nn.Module):
    def confidence(self, images):
        return images[:, :1] - 2


class TwoChannels(torch.nn.Module):
    def confidence(self, images):
        return images[:, :2]


@pytest.mark.parametrize(
    "dataset, error, message",
    [
        (None, ValueError, '`train_dataset` is missing. Pass a dataset with the column "prompt"'),
        ([], ValueError, "`train_dataset` is empty"),
        (rows(["a cup", "  ", "a dog"]), ValueError, "`train_dataset` has no prompt in row 1: found '  '"),
        (rows(["a cup", None]), ValueError, "no prompt in row 1: found None"),
        (Dataset.from_dict({"text": ["a cup"]}), ValueError, "no column \"prompt\", only ['text']. Rename one"),
        ([{"caption": "a cup"}], ValueError, "no column \"prompt\", only ['caption']"),
        (["a cup", "a dog"], ValueError, '[{"prompt": text} for text in texts]'),
        ("a cup", TypeError, "`train_dataset` is a str"),
        (Dataset.from_dict({"prompt": ["a"]}).to_iterable_dataset(), TypeError, "streaming=False"),
        (DatasetDict(train=Dataset.from_dict({"prompt": ["a"]})), TypeError, "is a DatasetDict of ['train']"),
        ({"prompt": ["a cup"]}, TypeError, "`train_dataset` is a dict of ['prompt']"),
        (pandas.DataFrame({"prompt": ["a cup"]}), TypeError, "Dataset.from_pandas(frame)"),
        (Dataset.from_dict({"prompt": [1, 2]}), ValueError, "no prompt in row 0: found 1"),
        (rows(["a cup", float("nan")]), ValueError, "no prompt in row 1: found nan"),
        ([{"prompt": "a cup"}, {"text": "a dog"}], ValueError, "no prompt in row 1: found None"),
    ],
)
def test_prompts(tmp_path, dataset, error, message):
    with pytest.raises(error, match=re.escape(message)):
        tiny_trainer(tmp_path, parts={"train_dataset": dataset})


@pytest.mark.parametrize(
    "parts, error, message",
    [
        ({"reward_funcs": TwoChannels()}, ValueError, "whose map of one 64x64 image has the shape (1, 2, 64, 64)"),
        ({"judge": TwoChannels()}, ValueError, "`judge` has a detector (TwoChannels) whose map"),
        (
            {"judge": Logits()},
            ValueError,
            "`judge` has a detector (Logits) whose map of a gray image has values from -1.5 to -1.5",
        ),
        (
            {"eval_dataset": {"hands": rows(["a"]), "feet": rows([None])}},
            ValueError,
            "`eval_dataset['feet']` has no prompt in row 0",
        ),
        ({"eval_dataset": {"hands": [{"text": "a"}]}}, ValueError, "`eval_dataset['hands']` has no column \"prompt\""),
        ({"compute_metrics": "accuracy"}, TypeError, "`compute_metrics` is a str"),
        ({"reward_funcs": "detector"}, ValueError, "There is no reward 'detector'. Name one of"),
        ({"reward_funcs": 7}, TypeError, "A reward must be a detector"),
        ({"reward_funcs": []}, ValueError, "No reward was given"),
        ({"judge": object()}, TypeError, "`judge` is a object, but must have a method `confidence(images)`"),
        ({"eval_dataset": {"hands": []}}, ValueError, "`eval_dataset['hands']` is empty"),
        ({"regularization_dataset": rows(["a cup"])}, ValueError, '`regularization_dataset` has no column "image"'),
        ({"pipeline": 3}, TypeError, "`pipeline` is a int"),
        ({"pipeline": "/nowhere/at/all"}, ValueError, "`pipeline` is '/nowhere/at/all', which cannot be loaded"),
    ],
    ids=lambda value: None if isinstance(value, dict) else "",
)
def test_parts(tmp_path, parts, error, message):
    with pytest.raises(error, match=re.escape(message)):
        tiny_trainer(tmp_path, parts=parts)


@pytest.mark.parametrize("nothing", [None, {}])
@pytest.mark.parametrize("asked", [{"eval_strategy": "steps", "eval_steps": 1}, {"eval_on_start": True}])
def test_an_evaluation_of_nothing_is_refused_before_the_pipeline_is_loaded(tmp_path, nothing, asked):
    with pytest.raises(ValueError, match="`eval_dataset` has no prompts to evaluate on"):
        tiny_trainer(tmp_path, "/nowhere/at/all", parts={"eval_dataset": nothing}, **asked)


def test_a_best_metric_that_is_not_measured_is_refused_before_the_first_step(tmp_path):
    common = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    common |= {"load_best_model_at_end": True}
    parts = {"eval_dataset": rows(PROMPTS[:1])}
    trainer = tiny_trainer(tmp_path, parts=parts, metric_for_best_model="judge_area_ratio", **common)
    with pytest.raises(
        ValueError, match=r"`metric_for_best_model` is 'judge_area_ratio', .* eval_artifact_frequency, "
    ):
        trainer.train()
    assert trainer.state.global_step == 0
    for best in ("area_ratio", "eval_area_ratio"):
        tiny_trainer(tmp_path, parts=parts, metric_for_best_model=best, **common).train()


def test_a_folder_that_is_no_pipeline(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"`pipeline` is '.*folder', which has no model_index\.json"):
        tiny_trainer(tmp_path, tmp_path / "folder")


def test_a_pipeline_with_an_adapter(tmp_path):
    pipeline = tiny_flux()
    tiny_trainer(tmp_path, pipeline)
    with pytest.raises(ValueError, match=r"already has the adapters \['default'\].*fuse_lora"):
        tiny_trainer(tmp_path, pipeline)


def test_a_pipeline_without_offline_loss_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"not available for SanaSprintPipeline: .* one step"):
        tiny_trainer(
            tmp_path,
            tiny_sana_sprint(),
            num_inference_steps=2,
            pipeline_kwargs={"clean_caption": False},
            resolution=32,
        )


def test_other_arguments_than_ours(tmp_path):
    with pytest.raises(TypeError, match="`args` is a TrainingArguments"):
        PixelRewardTrainer(tiny_flux(), tiny_detector(), TrainingArguments(str(tmp_path)), rows(PROMPTS))


def test_weights_that_do_not_match_the_rewards(tmp_path):
    with pytest.raises(ValueError, match="`reward_weights` has 2 entries for 1 rewards"):
        tiny_trainer(tmp_path, reward_weights=[1.0, 2.0])


@pytest.mark.parametrize("nothing", [{"pixel_weight": 0.0}, {"reward_weights": [0.0], "drift_weight": 1.0}])
def test_a_loss_of_nothing_is_refused(tmp_path, nothing):
    """`offline_weight` is above 0 here, but without images it has nothing to weigh; drift alone holds what nothing moves."""
    with pytest.raises(ValueError, match=r"`pixel_weight` is .* `reward_weights` .* nothing would be learnt"):
        tiny_trainer(tmp_path, parts={"regularization_dataset": None}, **nothing)
    tiny_trainer(tmp_path, **nothing)  # with images the offline loss is left


def test_adapter_weights_without_gradient_are_named_once(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(prepare.logger, "warning", said.append)
    trainer = tiny_trainer(tmp_path)
    layer = trainer.rollout.denoiser.transformer_blocks[0].attn.to_q
    layer.forward = layer.base_layer.forward  # as if something had kept the layer from before the adapter
    trainer.train()
    (line,) = [line for line in said if "get no gradient" in line]
    assert line.startswith("2 of ") and "transformer_blocks.0.attn.to_q.lora_A" in line
    said.clear()
    tiny_trainer(tmp_path).train()
    assert not [line for line in said if "get no gradient" in line]


@pytest.mark.parametrize(
    "image, message",
    [
        (np.full((20, 20, 3), 1.5, dtype=np.float32), r"must lie in \[0, 1\], found values from 1.5 to 1.5"),
        (np.full((20, 20, 3), -0.5), "must lie in"),
        (np.full((20, 20, 3), np.nan), "must lie in"),
        (np.zeros((20, 20, 20), dtype=np.uint8), r"shape \(20, 20, 20\) is no image"),
        (None, "found NoneType"),
    ],
)
def test_regularization_images_out_of_range_are_named(tmp_path, image, message):
    dataset = [*photos(2), {"image": image, "prompt": "broken"}]
    trainer = tiny_trainer(tmp_path, parts={"regularization_dataset": photos(3)})
    trainer.regularization.dataset = dataset
    with pytest.raises(ValueError, match=f"`regularization_dataset` has an image in row 2 .*{message}"):
        trainer.regularization.picture(2)


def test_a_regularization_image_that_breaks_during_training_is_named(tmp_path):
    files = [tmp_path / "0.png", tmp_path / "1.png"]
    for row, file in zip(photos(2), files):
        row["image"].save(file)
    dataset = Dataset.from_dict({"image": [str(file) for file in files], "prompt": ["a", "b"]})
    trainer = tiny_trainer(
        tmp_path / "run", parts={"regularization_dataset": dataset.cast_column("image", Image())}, max_steps=4
    )
    row = 1 - trainer.regularization.row(0)  # that one is encoded before training
    files[row].write_bytes(files[row].read_bytes()[:200])
    with pytest.raises(ValueError, match=f"`regularization_dataset` has an image in row {row} that cannot be used"):
        trainer.train()


def test_a_reward_without_gradient_is_refused_beside_an_offline_loss(tmp_path):
    def sharpness(images, prompts):
        return images.detach().diff().abs().mean(dim=(1, 2, 3))

    parts = {"reward_funcs": [tiny_detector(), sharpness]}
    trainer = tiny_trainer(tmp_path, parts=parts)
    start = lora_of(trainer)
    with pytest.raises(ValueError, match="The reward `sharpness` gives no gradient"):
        trainer.train()
    assert_same(lora_of(trainer), start)
    tiny_trainer(tmp_path, parts=parts, reward_weights=[1.0, 0.0], max_steps=1).train()
    tiny_trainer(tmp_path, parts={"reward_funcs": sharpness}, pixel_weight=0.0, max_steps=1).train()


class BreaksOnce(torch.nn.Module):
    """Scores that are not a number for the second image of the second update."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, images, prompts):
        self.calls += 1
        scores = images.mean(dim=(1, 2, 3))
        return torch.where(torch.arange(len(images)) == 1, float("nan"), scores) if self.calls == 2 else scores


def test_a_loss_that_is_not_a_number_stops_before_the_update(tmp_path):
    parts = {"reward_funcs": BreaksOnce(), "regularization_dataset": None}
    common = {"train_sampling_strategy": "sequential", "max_steps": 3}
    trainer = tiny_trainer(tmp_path / "run", parts=parts, **common)
    expected = f"The reward `BreaksOnce` returned nan for 1 of 2 images.* the prompt '{PROMPTS[3]}'"
    with pytest.raises(FloatingPointError, match=expected):
        trainer.train()
    one_step = tiny_trainer(
        tmp_path / "one", parts=parts | {"reward_funcs": BreaksOnce()}, **common | {"max_steps": 1}
    )
    one_step.train()
    assert_same(lora_of(trainer), lora_of(one_step))


class BreaksTheGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


def test_a_gradient_that_is_not_finite_stops_before_the_update(tmp_path):
    def reward(images, prompts):
        return BreaksTheGradient.apply(images).mean(dim=(1, 2, 3))

    parts = {"reward_funcs": reward, "regularization_dataset": None}
    trainer = tiny_trainer(tmp_path, parts=parts, train_sampling_strategy="sequential")
    start = lora_of(trainer)
    with pytest.raises(FloatingPointError, match=f"The gradient's norm is (nan|inf) in step 1, for '{PROMPTS[0]}'"):
        trainer.train()
    assert_same(lora_of(trainer), start)


def test_evaluation_without_prompts_or_with_unknown_ones(tmp_path):
    trainer = tiny_trainer(tmp_path)
    with pytest.raises(ValueError, match="`eval_dataset` is missing"):
        trainer.evaluate()
    with pytest.raises(ValueError, match="'a new prompt' was not cached before the text encoders were freed"):
        trainer.evaluate(rows(["a new prompt"]))


def test_arguments_are_checked_before_the_pipeline_is_loaded(tmp_path):
    """A wrong dataset must not cost the minutes in which FLUX is loaded."""
    with pytest.raises(ValueError, match="`train_dataset` is empty"):
        PixelRewardTrainer("/nowhere/at/all", tiny_detector(), tiny_args(tmp_path), [])


def test_float16_without_scaled_gradients(tmp_path):
    with pytest.raises(ValueError, match="`pipeline` is in float16 and its gradients are not scaled"):
        tiny_trainer(tmp_path, tiny_flux().to(torch.float16))
