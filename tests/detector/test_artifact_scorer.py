# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""One number per image, on a detector's encoder and from its labels."""

import pytest
import torch
from datasets import Dataset
from fixtures.segformer import tiny_detector
from PIL import Image, ImageDraw
from transformers import AutoConfig, AutoModelForSemanticSegmentation, PvtV2Config

from diffusers_diffdoctor.detector import (
    ArtifactDetectorTrainer,
    ArtifactDetectorTrainingArguments,
    ArtifactScorer,
    ArtifactScorerConfig,
)
from diffusers_diffdoctor.images import to_image_tensor
from diffusers_diffdoctor.rewards import ArtifactReward, ArtifactScorerReward, CombinedReward, as_reward


SIDES = (0, 16, 32, 48)  # of a black square in 64 x 64 pixels, which is what is wrong
SHARES = torch.tensor([side**2 / 64**2 for side in SIDES])


def rows():
    result = []
    for side in SIDES:
        image, artifacts = Image.new("RGB", (64, 64), "lightgray"), Image.new("L", (64, 64))
        if side:
            ImageDraw.Draw(image).rectangle((8, 8, 7 + side, 7 + side), "black")
            ImageDraw.Draw(artifacts).rectangle((8, 8, 7 + side, 7 + side), 255)
        result.append({"image": image, "artifact_map": artifacts})
    return Dataset.from_list(result)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """By the trainer of detectors, as it is."""
    folder = tmp_path_factory.mktemp("scorer")
    torch.manual_seed(0)
    trainer = ArtifactDetectorTrainer(
        model=ArtifactScorer.from_detector(tiny_detector()),
        args=ArtifactDetectorTrainingArguments(
            output_dir=str(folder),
            max_steps=100,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            augmentation="none",
            crop_probability=0.0,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=rows(),
        eval_dataset=rows(),
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    return folder, trainer.model.eval(), metrics


def test_the_detectors_trainer_teaches_the_share(trained):
    folder, model, metrics = trained
    images = torch.stack([to_image_tensor(row["image"]) for row in rows()])
    with torch.no_grad():
        found = model.share(images)
    torch.testing.assert_close(found, SHARES, atol=0.03, rtol=0)
    # (c - t)^2 over all pixels is the error of the share, and what no constant can know
    expected = ((found - SHARES).square() + SHARES * (1 - SHARES)).mean().item()
    assert metrics["eval_loss"] == pytest.approx(expected, abs=1e-4)
    again = AutoModelForSemanticSegmentation.from_pretrained(folder).eval()
    assert isinstance(again, ArtifactScorer) and isinstance(AutoConfig.from_pretrained(folder), ArtifactScorerConfig)
    assert torch.equal(again.share(images), model.share(images))
    assert "share of its pixels" in (folder / "README.md").read_text()


def test_a_scorer_is_a_reward_of_whole_images(trained):
    folder, model, _ = trained
    images = torch.stack([to_image_tensor(row["image"]) for row in rows()]).requires_grad_()
    output = CombinedReward([model])(images, [""] * 4)
    torch.testing.assert_close(output.score, 1 - model.share(images).detach())
    assert output.map is None and torch.equal(output.loss.detach(), -output.score)
    (gradient,) = torch.autograd.grad(output.loss.sum(), images)
    assert gradient.isfinite().all() and (gradient.flatten(1).abs().amax(1) > 0).all()
    with torch.no_grad():
        step = 1e-2 * gradient / gradient.abs().max()
        assert CombinedReward([model])((images - step).clamp(0, 1), [""] * 4).loss.sum() < output.loss.sum()
    for name in (f"artifact_scorer={folder}", model):
        reward = as_reward(name)
        assert not isinstance(reward, ArtifactReward) and reward.__name__ == "artifact_scorer"
        torch.testing.assert_close(reward(images.detach(), [""] * 4).score, output.score)
    assert not any(parameter.requires_grad for parameter in ArtifactScorerReward(model).parameters())
    with pytest.raises(ValueError, match="No artifact_scorer is published: say where yours is"):
        as_reward("artifact_scorer")


def test_the_encoder_is_the_detectors():
    backbone = PvtV2Config(
        depths=[1] * 4, hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2], mlp_ratios=[1] * 4
    )
    for detector in (tiny_detector(), tiny_detector(backbone_config=backbone)):
        scorer = ArtifactScorer.from_detector(detector).eval()
        theirs = {k: v for k, v in detector.state_dict().items() if not k.startswith("decode_head.")}
        own = scorer.state_dict()
        assert theirs and all(torch.equal(own[key], value) for key, value in theirs.items())
        assert set(own) - set(theirs) == {"decode_head.classifier.weight", "decode_head.classifier.bias"}
        share = scorer.share(torch.rand(2, 3, 64, 96))
        assert share.shape == (2,) and 0 < share.min() and share.max() < 1
