# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
import io

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from fixtures.segformer import tiny_detector
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
from diffusers_diffdoctor.detector.augmentation import PRESETS, Augmentation
from diffusers_diffdoctor.detector.losses import LOSSES
from diffusers_diffdoctor.detector.modeling_artifact_detector import normalise_images, squared_error
from diffusers_diffdoctor.images import to_image_tensor


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
    defaults = {"overwrite_output_dir": True, "use_cpu": True, "per_device_train_batch_size": 4, "disable_tqdm": True}
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
        args=arguments(tmp_path, max_steps=120, learning_rate=5e-3, logging_steps=120, augmentation="light"),
        train_dataset=as_dataset(red_squares(32)),
        eval_dataset=as_dataset(red_squares(16, seed=1)),
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    # An untrained detector says 0.5 everywhere, an error of 0.25; the best constant map has 0.109. Both must fail here.
    assert after["eval_mse"] < 0.3 * before["eval_mse"] < 0.109
    assert after["eval_misses"] < 0.1 and after["eval_false_alarms"] < 0.2
    assert after["eval_without_artifacts_mse"] < 0.3 * before["eval_without_artifacts_mse"]
    trainer.save_model()
    found = pipeline("artifact-detection", model=str(tmp_path))(next(red_squares(1, seed=2))["image"])
    assert found["max_confidence"] > 0.5
    assert (tmp_path / "README.md").exists() and (tmp_path / "preprocessor_config.json").exists()


def new_model():
    torch.manual_seed(0)
    return ArtifactDetectorForSemanticSegmentation(ArtifactDetectorConfig(**CONFIG))


@pytest.mark.parametrize(
    ("step", "augmentation"), [(3, "none"), (4, "strong")], ids=["in-an-epoch", "at-its-end-augmented"]
)
def test_a_resumed_training_equals_one_that_was_never_stopped(tmp_path, step, augmentation):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": step, "learning_rate": 1e-3}
    settings["augmentation"] = augmentation
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
    assert metrics["eval_without_artifacts_mse"] == pytest.approx(np.mean(clean_errors), rel=1e-4)
    assert metrics["eval_misses"] == pytest.approx(1 - np.mean(hits))
    assert metrics["eval_false_alarms"] == pytest.approx(np.mean(alarms))


class Tensors(torch.utils.data.Dataset):
    def __init__(self, count):
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randn(count, 3, 32, 48, generator=generator)
        self.labels = torch.rand(count, 1, 32, 48, generator=generator)
        self.labels[-1] *= 0.4  # the image without artifacts

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def test_tensors_pass_unchanged_and_train(model, tmp_path):
    data = Tensors(4)
    batch = ArtifactDetectorCollator(model.config, PRESETS["strong"], image_sizes=(32, 96))([data[0], data[1]])
    assert torch.equal(batch["pixel_values"], data.pixels[:2]) and torch.equal(batch["labels"], data.labels[:2])
    trainer = ArtifactDetectorTrainer(model=model, args=arguments(tmp_path, max_steps=1), train_dataset=data)
    assert np.isfinite(trainer.train().training_loss)


@pytest.mark.parametrize("loss", ["mse", "bce_dice"])
@pytest.mark.parametrize(("batch", "steps"), [(2, 2), (1, 4), (3, 2)], ids=["halves", "singly", "unequal"])
def test_each_image_of_an_update_weighs_the_same(tmp_path, loss, batch, steps):
    """Whatever the batches that it comes in; of 4 images the second batch of 3 has one."""

    def weights_after(batch, steps):
        model = new_model()
        model.decode_head.batch_norm.train = lambda mode=True: None  # batch statistics would differ by themselves
        model.decode_head.batch_norm.training = False
        args = arguments(
            tmp_path,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            loss=loss,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            logging_steps=1,
        )
        trainer = ArtifactDetectorTrainer(model, args, train_dataset=Tensors(4))
        trainer.train()
        return model.decode_head.classifier.weight.detach(), trainer.state.log_history[0]["loss"]

    whole, logged = weights_after(4, 1)
    found, found_logged = weights_after(batch, steps)
    torch.testing.assert_close(found, whole)
    assert found_logged == pytest.approx(logged, rel=1e-5)
    assert not torch.equal(whole, new_model().decode_head.classifier.weight)


def test_the_other_loss_is_trained_and_reported(tmp_path):
    logs = {}
    for loss in ("mse", "bce_dice"):
        args = arguments(tmp_path, loss=loss, max_steps=1, logging_steps=1)
        parts = {"train_dataset": Tensors(4), "eval_dataset": Tensors(4), "compute_metrics": mean_error}
        trainer = ArtifactDetectorTrainer(new_model(), args, **parts)
        evaluated = trainer.evaluate(), evaluate_again(trainer)
        assert evaluated[0]["eval_loss"] == evaluated[1]
        trainer.train()
        logs[loss] = (trainer.state.log_history[0]["loss"], evaluated[0]["eval_loss"], evaluated[0]["eval_mse"])
    assert logs["mse"][1] == pytest.approx(logs["mse"][2]) == logs["bce_dice"][2] < logs["bce_dice"][1]
    assert logs["mse"][0] < 0.4 < logs["bce_dice"][0]
    with pytest.raises(ValueError, match="`loss` must be one of mse, bce_dice, found 'dice'"):
        arguments(tmp_path, loss="dice")


def mean_error(prediction):
    return {"mse": prediction.predictions[:, 0].mean()}


def evaluate_again(trainer):
    """The loss of the whole evaluation set by the function itself."""
    model, data = trainer.model.eval(), trainer.eval_dataset
    with torch.no_grad():
        logits = model(pixel_values=data.pixels).logits
    logits = torch.nn.functional.interpolate(logits, size=data.labels.shape[-2:], mode="bilinear")
    return pytest.approx(LOSSES[trainer.args.loss](logits, data.labels).mean().item(), rel=1e-5)


def test_a_step_that_is_not_finite_ends_the_run(tmp_path):
    data = Tensors(4)
    data.pixels[2, 0, 0, 0] = float("inf")
    model = new_model()
    trainer = ArtifactDetectorTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=data)
    with pytest.raises(FloatingPointError, match=r"gradient's norm is nan in step 1\. The weights were not updated"):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), new_model().parameters()))


def test_collator_prepares_as_the_model_does(model):
    row = next(red_squares(1, side=96))
    batch = ArtifactDetectorCollator(model.config)([row])
    image = torch.from_numpy(np.array(row["image"])).permute(2, 0, 1)[None] / 255
    expected = normalise_images(image, model.config)
    assert batch["pixel_values"].shape == expected.shape == (1, 3, 64, 64)
    assert torch.equal(batch["pixel_values"], expected)
    assert batch["labels"].shape == (1, 1, 64, 64) and batch["labels"].max() == 1


def test_augmentation_moves_the_map_with_the_image(model):
    row = next(red_squares(1))
    plain, mirrored = (
        ArtifactDetectorCollator(model.config, Augmentation(flip_probability=p))([row]) for p in (0.0, 1.0)
    )
    for name in plain:
        assert torch.equal(plain[name].flip(-1), mirrored[name])
    assert not torch.equal(plain["labels"], mirrored["labels"])
    jpeg = ArtifactDetectorCollator(model.config, Augmentation(jpeg_probability=1.0, quality=(10, 10)))([row])
    assert torch.equal(plain["labels"], jpeg["labels"]) and not torch.equal(
        plain["pixel_values"], jpeg["pixel_values"]
    )


def test_evaluation_is_not_augmented(model, tmp_path):
    data = as_dataset(red_squares(4))
    trainer = ArtifactDetectorTrainer(
        model=model,
        args=arguments(tmp_path, augmentation_kwargs={"flip_probability": 1.0}, per_device_eval_batch_size=4),
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
    assert batch["labels"][0, 0, :, :64].min() == 1 and (batch["labels"][0, 0, :, 64:] == -1).all()
    assert batch["pixel_values"][0, :, :, 64:].abs().max() == 0 and batch["labels"][1].min() == 1


def test_padding_counts_in_no_loss():
    """Against a loop over the images, each without what is not its own."""
    model = tiny_detector(image_size=64)
    rows = [*red_squares(1), *red_squares(1, seed=3)]
    rows[1] = {name: image.crop((0, 0, 64, 24)) for name, image in rows[1].items()}
    batch = ArtifactDetectorCollator(model.config)(rows)
    with torch.no_grad():
        outputs = model(**batch)
    confidence = torch.nn.functional.interpolate(
        outputs.logits, size=batch["labels"].shape[-2:], mode="bilinear"
    ).sigmoid()
    sizes = [(64, 64), (64, 160)]  # 24 x 64 pixels become 64 x 160
    errors = [
        (confidence[i, :, :h, :w] - batch["labels"][i, :, :h, :w]).square().mean().item()
        for i, (h, w) in enumerate(sizes)
    ]
    assert batch["labels"].shape == (2, 1, 64, 160) and errors[0] != pytest.approx(errors[1], rel=0.1)
    assert outputs.loss.item() == pytest.approx(np.mean(errors), rel=1e-5)
    assert squared_error(torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), -1.0)).item() == 0


def mixed_shapes():
    """Six images of three shapes, two of them clean, larger than the detector's 64 pixels."""
    for index, row in enumerate(red_squares(6, side=160)):
        box = ((0, 0, 160, 160), (0, 30, 160, 110), (20, 0, 120, 160))[index // 2]
        yield {name: image.crop(box) for name, image in row.items()}


@pytest.mark.parametrize("batch_size", [1, 2, 4, 6])
def test_evaluation_is_inference_image_by_image_whatever_the_batch(tmp_path, batch_size):
    model, rows = tiny_detector(image_size=64), list(mixed_shapes())
    errors, clean_errors, highest = [], [], []
    for row in rows:
        truth = torch.from_numpy(np.array(row["artifact_map"]))[None, None] / 255
        with torch.no_grad():
            found = model.confidence(torch.from_numpy(np.array(row["image"])).permute(2, 0, 1)[None] / 255)
        errors.append((found - truth).square().mean().item())
        highest.append(found.max().item())
        if truth.max() == 0:
            clean_errors.append(errors[-1])
    threshold = float(np.median(highest))
    data = as_dataset(rows)
    args = arguments(tmp_path, per_device_eval_batch_size=batch_size, threshold=threshold)
    metrics = ArtifactDetectorTrainer(model, args, eval_dataset=data).evaluate()
    expected = {
        "eval_mse": np.mean(errors),
        "eval_loss": np.mean(errors),
        "eval_without_artifacts_mse": np.mean(clean_errors),
        "eval_misses": np.mean([c < threshold for c in highest[::2]]),
        "eval_false_alarms": np.mean([c >= threshold for c in highest[1::2]]),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert np.std(errors) > 0.01  # so that another weighting of the images would show


@pytest.mark.parametrize(("size", "side"), [(512, 6), (1024, 3), (100, 1), (40, 1)])
def test_a_thin_artifact_stays_certain(model, tmp_path, size, side):
    """Thinner than a pixel of what the detector sees (64), or just enlarged; soft values are not raised beyond their own."""
    image, artifact_map = Image.new("RGB", (size, size), "gray"), np.zeros((size, size), np.uint8)
    artifact_map[size // 3 : size // 3 + side, size // 2 : size // 2 + side] = 255
    artifact_map[0, 0] = 51
    row = {"image": image, "artifact_map": Image.fromarray(artifact_map)}
    labels = ArtifactDetectorCollator(model.config)([row])["labels"][0, 0]
    assert labels.shape == (64, 64) and labels.max() == 1 and labels[0, 0] == pytest.approx(0.2)
    assert labels[int(64 / 3) - 1 : int(64 / 3) + 2, 31:34].max() == 1
    assert (labels == 1).sum() <= (np.ceil(side * 64 / size) + 1) ** 2  # it grows by less than a pixel
    args = arguments(tmp_path, per_device_eval_batch_size=2)
    clean = {"image": image, "artifact_map": Image.new("L", image.size)}
    metrics = ArtifactDetectorTrainer(model, args, eval_dataset=as_dataset([row, clean])).evaluate()
    assert metrics["eval_images_with_artifacts"] == 1  # not none
    with torch.no_grad():
        found = model.eval().confidence(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255)
    assert metrics["eval_without_artifacts_mse"] == pytest.approx(found.square().mean().item(), rel=1e-4)


def test_masks_of_zero_and_one_are_refused_until_they_are_explained(model, tmp_path):
    full = list(red_squares(4))
    ones = [row | {"artifact_map": row["artifact_map"].point(lambda value: value // 255)} for row in full]
    with pytest.raises(ValueError, match=r"highest value of an 8-bit artifact map is 1.*`map_maximum=1`"):
        ArtifactDetectorTrainer(model, arguments(tmp_path), train_dataset=as_dataset(ones)).train()
    args = arguments(tmp_path, map_maximum=1)
    explained = ArtifactDetectorTrainer(model, args, train_dataset=as_dataset(ones), eval_dataset=as_dataset(ones))
    expected = ArtifactDetectorCollator(model.config)(full)["labels"]
    assert torch.equal(explained.data_collator(ones)["labels"], expected)
    assert torch.equal(explained.eval_collator(ones)["labels"], expected)
    bools = [row | {"artifact_map": row["artifact_map"].convert("1")} for row in full]
    assert torch.equal(ArtifactDetectorCollator(model.config)(bools)["labels"], expected)
    with pytest.raises(ValueError, match="`map_maximum` must be 255, 1 or None"):
        arguments(tmp_path, map_maximum=2)


def test_a_faint_pseudo_label_is_a_confidence_and_no_class(model):
    """Maps with a source are written by stages of the data engine, with 255 for 1.0; a confidence of 1/255 may be their highest."""
    row = next(iter(red_squares(1)))
    row["artifact_map"] = row["artifact_map"].point(lambda value: value // 255)
    labels = ArtifactDetectorCollator(model.config)([row | {"source": "pseudo"}])["labels"]
    assert labels.max() == pytest.approx(1 / 255)


def test_what_does_not_count_is_left_out_of_the_evaluation_of_tensors(tmp_path):
    model, data = tiny_detector(image_size=64), Tensors(3)
    data.labels[:, :, 10:, :] = -1
    metrics = ArtifactDetectorTrainer(
        model,
        arguments(tmp_path, per_device_eval_batch_size=2),
        eval_dataset=data,
        compute_metrics=last_figures,
    ).evaluate()
    with torch.no_grad():
        logits = model(pixel_values=data.pixels).logits
    confidence = torch.nn.functional.interpolate(logits, size=(32, 48), mode="bilinear").sigmoid()
    expected = (confidence - data.labels)[:, :, :10].square().flatten(1).mean(dim=1)
    assert metrics["eval_errors"] == pytest.approx(expected.tolist(), rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(expected.mean().item(), rel=1e-5)


def last_figures(prediction):
    return {"errors": prediction.predictions[:, 0].tolist()}


def test_a_metric_over_no_image_is_nan_and_said(model, tmp_path):
    broken = list(red_squares(4))[::2]
    trainer = ArtifactDetectorTrainer(model, arguments(tmp_path), eval_dataset=as_dataset(broken))
    with pytest.warns(UserWarning, match="no image without artifacts, so that false_alarms and image_auroc are nan"):
        metrics = trainer.evaluate()
    assert np.isnan(metrics["eval_false_alarms"]) and np.isnan(metrics["eval_image_auroc"])
    assert np.isfinite(metrics["eval_mse"]) and metrics["eval_misses"] in (0, 1)
    assert "eval_false_alarms" in trainer.state.log_history[-1]


def test_training_reads_images_as_everybody_does(model):
    """Alpha on white, turned, 16 bits: what the detector is trained on is what `read_image` shows."""
    row = next(red_squares(1, side=96))
    rgba = row["image"].copy()
    rgba.putalpha(row["artifact_map"].point(lambda value: 255 - value))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    row["image"].save(file, "PNG", exif=exif)
    deep = Image.fromarray(np.asarray(row["artifact_map"]).astype(np.uint16) * 257)
    turned = {"image": Image.open(file), "artifact_map": row["artifact_map"].rotate(-90)}
    for one in ({"image": rgba, "artifact_map": deep}, turned, {"image": np.asarray(rgba), "artifact_map": deep}):
        batch = ArtifactDetectorCollator(model.config)([one])
        expected = normalise_images(to_image_tensor(one["image"])[None], model.config)
        assert torch.equal(batch["pixel_values"], expected)
        red = expected[0, 0] - expected[0, 1] > 2
        white = (expected[0] > 2).all(dim=0)
        seen = red | white  # the artifact, red or transparent
        assert (seen == (batch["labels"][0, 0] > 0.5)).float().mean() > 0.93


def test_bad_input_is_named(model, tmp_path):
    args = arguments(tmp_path)
    with pytest.raises(ValueError, match=r"train_dataset` has the columns .*needed are `image` and `artifact_map`"):
        ArtifactDetectorTrainer(model=model, args=args, train_dataset=Dataset.from_dict({"image": [1], "mask": [1]}))
    with pytest.raises(ValueError, match="eval_dataset\\['photos'\\]` is empty"):
        ArtifactDetectorTrainer(model=model, args=args, eval_dataset={"photos": Dataset.from_dict({"image": []})})
    half = as_dataset([row | {"artifact_map": None} if i else row for i, row in enumerate(red_squares(3))])
    with pytest.raises(
        ValueError, match=r"`train_dataset` has 2 rows of 3 without an `artifact_map`, .*diffdoctor data label"
    ):
        ArtifactDetectorTrainer(model="not/loaded", args=args, train_dataset=half)
    with pytest.raises(TypeError, match="must be an artifact detector"):
        ArtifactDetectorTrainer(model=torch.nn.Linear(1, 1), args=args)
    collate = ArtifactDetectorCollator(model.config)
    image = Image.new("RGB", (64, 64))
    with pytest.raises(ValueError, match="64 x 64 pixels has a map of 32 x 64"):
        collate([{"image": image, "artifact_map": Image.new("L", (32, 64))}])
    with pytest.raises(ValueError, match=r"one channel .*found mode RGB"):
        collate([{"image": image, "artifact_map": image}])
    with pytest.raises(TypeError, match="cast_column"):
        collate([{"image": "file.png", "artifact_map": image}])
