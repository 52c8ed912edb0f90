# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from transformers import pipeline

import diffusers_diffdoctor  # noqa: F401
from diffusers_diffdoctor.detector import (
    ArtifactDetectorCollator,
    ArtifactDetectorConfig,
    ArtifactDetectorForSemanticSegmentation,
    ArtifactDetectorTrainer,
    ArtifactDetectorTrainingArguments,
)
from diffusers_diffdoctor.detector.modeling_artifact_detector import normalise_images


CONFIG = {
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 8, 16, 16],
    "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 16,
    "image_size": 64,
    "drop_path_rate": 0.0,
    "classifier_dropout_prob": 0.0,
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ArtifactDetectorForSemanticSegmentation(ArtifactDetectorConfig(**CONFIG))


def arguments(path, **kwargs):
    defaults = {"report_to": "none", "use_cpu": True, "per_device_train_batch_size": 4, "disable_tqdm": True}
    return ArtifactDetectorTrainingArguments(output_dir=str(path), **{"save_strategy": "no"} | defaults | kwargs)


def red_squares(count, seed=0, side=64):
    """A red square is the artifact; every second image has none. Anything that learns at all finds it."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        image = rng.integers(0, 120, (side, side, 3), dtype=np.uint8)
        artifact_map = np.zeros((side, side), np.uint8)
        if index % 2 == 0:
            top, left = rng.integers(0, side // 2, 2)
            artifact_map[top : top + side // 2, left : left + side // 2] = 255
            image[artifact_map > 0] = [255, 0, 0]
        yield {"image": Image.fromarray(image), "artifact_map": Image.fromarray(artifact_map)}


def as_dataset(rows):
    features = Features({"image": ImageFeature(), "artifact_map": ImageFeature()})
    return Dataset.from_list(list(rows), features=features)


def test_training_finds_the_artifact(model, tmp_path):
    trainer = ArtifactDetectorTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=120, learning_rate=5e-3, logging_steps=120, jpeg_probability=0.5),
        train_dataset=as_dataset(red_squares(32)),
        eval_dataset=as_dataset(red_squares(16, seed=1)),
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    # An untrained detector says 0.5 everywhere, an error of 0.25; the best constant map has 0.109. Both must fail here.
    assert after["eval_mse"] < 0.3 * before["eval_mse"] < 0.109
    assert after["eval_true_positive_rate"] > 0.9 and after["eval_false_positive_rate"] < 0.2
    assert after["eval_mse_clean"] < 0.3 * before["eval_mse_clean"]
    trainer.save_model()
    found = pipeline("artifact-detection", model=str(tmp_path))(next(red_squares(1, seed=2))["image"])
    assert found["max_confidence"] > 0.5
    assert (tmp_path / "README.md").exists() and (tmp_path / "preprocessor_config.json").exists()


def new_model():
    torch.manual_seed(0)
    return ArtifactDetectorForSemanticSegmentation(ArtifactDetectorConfig(**CONFIG))


@pytest.mark.parametrize(("step", "flip"), [(3, 0.0), (4, 0.5)], ids=["in-an-epoch", "at-its-end-with-flips"])
def test_a_resumed_training_equals_one_that_was_never_stopped(tmp_path, step, flip):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": step, "learning_rate": 1e-3}
    settings["flip_probability"] = flip
    whole, resumed = (
        ArtifactDetectorTrainer(
            new_model(), arguments(tmp_path / "run", **settings), train_dataset=as_dataset(red_squares(16))
        )
        for _ in range(2)
    )
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / f"run/checkpoint-{step}"))
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values()):
        assert torch.equal(a, b), name
    assert not torch.equal(next(whole.model.parameters()), next(new_model().parameters()))


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    trainer = ArtifactDetectorTrainer(
        new_model(),
        arguments(
            tmp_path,
            max_steps=4,
            learning_rate=1e-3,
            save_strategy="steps",
            save_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="eval_mse",
            greater_is_better=True,  # the worst, that is, an early one
        ),
        train_dataset=as_dataset(red_squares(16)),
        eval_dataset=as_dataset(red_squares(8, seed=1)),
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert not best.endswith("checkpoint-4")
    expected = ArtifactDetectorForSemanticSegmentation.from_pretrained(best).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in trainer.model.state_dict().items())


def test_evaluation_figures_match_a_plain_loop(model, tmp_path):
    rows = list(red_squares(6))
    trainer = ArtifactDetectorTrainer(
        model=model,
        args=arguments(tmp_path, per_device_eval_batch_size=4, threshold=0.4),
        eval_dataset=as_dataset(rows),
    )
    with torch.no_grad():
        model.decode_head.classifier.bias.add_(-0.4)
    metrics = trainer.evaluate()
    model.eval()
    errors, clean_errors, hits, alarms = [], [], [], []
    for row in rows:
        image = torch.from_numpy(np.array(row["image"])).permute(2, 0, 1)[None] / 255
        truth = torch.from_numpy(np.array(row["artifact_map"]))[None, None] / 255
        with torch.no_grad():
            found = model.confidence(image)
        errors.append(((found - truth) ** 2).mean().item())
        if truth.max() == 0:
            clean_errors.append(errors[-1])
        (hits if truth.max() >= 0.4 else alarms).append(float(found.max() >= 0.4))
    assert metrics["eval_mse"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert metrics["eval_loss"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert metrics["eval_mse_clean"] == pytest.approx(np.mean(clean_errors), rel=1e-4)
    assert metrics["eval_true_positive_rate"] == np.mean(hits)
    assert metrics["eval_false_positive_rate"] == np.mean(alarms)


class Tensors(torch.utils.data.Dataset):
    def __init__(self, count):
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randn(count, 3, 32, 48, generator=generator)
        self.labels = torch.rand(count, 1, 32, 48, generator=generator)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def test_tensors_pass_unchanged_and_train(model, tmp_path):
    data = Tensors(4)
    batch = ArtifactDetectorCollator(model.config, flip_probability=1.0, jpeg_probability=1.0)([data[0], data[1]])
    assert torch.equal(batch["pixel_values"], data.pixels[:2]) and torch.equal(batch["labels"], data.labels[:2])
    trainer = ArtifactDetectorTrainer(model=model, args=arguments(tmp_path, max_steps=1), train_dataset=data)
    assert np.isfinite(trainer.train().training_loss)


def test_accumulated_steps_make_the_loss_of_the_whole_batch(tmp_path):
    """The loss is a mean; summing it over accumulation steps would multiply the gradient."""
    weights = []
    for batch, steps in ((4, 1), (2, 2)):
        torch.manual_seed(0)
        model = ArtifactDetectorForSemanticSegmentation(ArtifactDetectorConfig(**CONFIG))
        model.decode_head.batch_norm.momentum = 0.0
        model.decode_head.batch_norm.train = lambda mode=True: None  # batch statistics would differ by themselves
        model.decode_head.batch_norm.training = False
        args = arguments(
            tmp_path,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
        )
        ArtifactDetectorTrainer(model=model, args=args, train_dataset=Tensors(4)).train()
        weights.append(model.decode_head.classifier.weight.detach())
    torch.testing.assert_close(weights[0], weights[1])


def test_collator_prepares_as_the_model_does(model):
    row = next(red_squares(1, side=96))
    batch = ArtifactDetectorCollator(model.config)([row])
    image = torch.from_numpy(np.array(row["image"])).permute(2, 0, 1)[None] / 255
    expected = normalise_images(image, model.config)
    assert batch["pixel_values"].shape == expected.shape == (1, 3, 64, 64)
    assert (batch["pixel_values"] - expected).abs().max() < 1 / 255 / 0.22  # PIL rounds to 8 bits
    assert batch["labels"].shape == (1, 1, 64, 64) and batch["labels"].max() == 1


def test_augmentation_moves_the_map_with_the_image(model):
    row = next(red_squares(1))
    plain, mirrored = (ArtifactDetectorCollator(model.config, flip_probability=p)([row]) for p in (0.0, 1.0))
    for name in plain:
        assert torch.equal(plain[name].flip(-1), mirrored[name])
    assert not torch.equal(plain["labels"], mirrored["labels"])
    jpeg = ArtifactDetectorCollator(model.config, jpeg_probability=1.0, jpeg_quality=(10, 10))([row])
    assert torch.equal(plain["labels"], jpeg["labels"]) and not torch.equal(
        plain["pixel_values"], jpeg["pixel_values"]
    )


def test_evaluation_is_not_augmented(model, tmp_path):
    data = as_dataset(red_squares(4))
    trainer = ArtifactDetectorTrainer(
        model=model,
        args=arguments(tmp_path, flip_probability=1.0, per_device_eval_batch_size=4),
        train_dataset=data,
        eval_dataset=data,
    )
    plain = ArtifactDetectorCollator(model.config)(list(data))["labels"]
    assert torch.equal(next(iter(trainer.get_eval_dataloader()))["labels"].cpu(), plain)
    training = next(iter(trainer.get_train_dataloader()))["labels"].cpu()
    assert sorted(map(torch.Tensor.tolist, training)) == sorted(map(torch.Tensor.tolist, plain.flip(-1)))


def test_shapes_are_padded_to_one_batch(model):
    rows = [
        {"image": Image.new("RGB", size, "white"), "artifact_map": Image.new("L", size, 255)}
        for size in ((64, 64), (128, 64))
    ]
    batch = ArtifactDetectorCollator(model.config)(rows)
    assert batch["pixel_values"].shape == (2, 3, 64, 128)
    assert batch["labels"][0, 0, :, :64].min() == 1 and batch["labels"][0, 0, :, 64:].max() == 0
    assert batch["pixel_values"][0, :, :, 64:].abs().max() == 0 and batch["labels"][1].min() == 1


def test_bad_input_is_named(model, tmp_path):
    args = arguments(tmp_path)
    with pytest.raises(ValueError, match=r"train_dataset` has the columns .*needed are `image` and `artifact_map`"):
        ArtifactDetectorTrainer(model=model, args=args, train_dataset=Dataset.from_dict({"image": [1], "mask": [1]}))
    with pytest.raises(ValueError, match="eval_dataset\\['photos'\\]` is empty"):
        ArtifactDetectorTrainer(model=model, args=args, eval_dataset={"photos": Dataset.from_dict({"image": []})})
    with pytest.raises(TypeError, match="must be an artifact detector"):
        ArtifactDetectorTrainer(model=torch.nn.Linear(1, 1), args=args)
    with pytest.raises(ValueError, match="jpeg_probability"):
        arguments(tmp_path, jpeg_probability=2)
    collate = ArtifactDetectorCollator(model.config)
    image = Image.new("RGB", (64, 64))
    with pytest.raises(ValueError, match="64 x 64 pixels has a map of 32 x 64"):
        collate([{"image": image, "artifact_map": Image.new("L", (32, 64))}])
    with pytest.raises(ValueError, match="found mode RGB"):
        collate([{"image": image, "artifact_map": image}])
    with pytest.raises(TypeError, match="cast_column"):
        collate([{"image": "file.png", "artifact_map": image}])
