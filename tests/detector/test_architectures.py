# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Other encoders under SegFormer's decode head, and where training begins."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from fixtures.runs import squares
from fixtures.segformer import TINY, old_state_dict, tiny_detector
from fixtures.trainer import assert_same
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSemanticSegmentation, SegformerForImageClassification, pipeline

from diffusers_diffdoctor.detector import (
    ArtifactDetectorConfig,
    ArtifactDetectorForSemanticSegmentation,
    ArtifactDetectorImageProcessor,
    ArtifactDetectorTrainer,
    ArtifactDetectorTrainingArguments,
)
from diffusers_diffdoctor.detector.architectures import ARCHITECTURES, load_detector, new_detector
from diffusers_diffdoctor.rewards import ArtifactReward


# model type -> configuration, class of a classifier with that encoder
ENCODERS = {
    "pvt_v2": (
        transformers.PvtV2Config(hidden_sizes=[8, 16, 16, 32], depths=[1] * 4, num_attention_heads=[1, 1, 2, 2]),
        transformers.PvtV2ForImageClassification,
    ),
    "swinv2": (
        transformers.Swinv2Config(embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4, image_size=64),
        transformers.Swinv2ForImageClassification,
    ),
    "swin": (
        transformers.SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4, image_size=64),
        transformers.SwinForImageClassification,
    ),
    "convnext": (
        transformers.ConvNextConfig(hidden_sizes=[8, 16, 16, 32], depths=[1] * 4),
        transformers.ConvNextForImageClassification,
    ),
    "resnet": (
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1] * 4, layer_type="basic"),
        transformers.ResNetForImageClassification,
    ),
}
CHANGES = {"image_size": 64, "decoder_hidden_size": 16}
each = pytest.mark.parametrize("kind", list(ENCODERS))


def backbone_detector(kind="pvt_v2", **changes):
    """In evaluation mode; its confidences vary."""
    torch.manual_seed(0)
    config = ArtifactDetectorConfig(backbone_config=ENCODERS[kind][0].to_dict(), **CHANGES | changes)
    model = ArtifactDetectorForSemanticSegmentation(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@each
def test_the_contract_of_a_detector_holds(kind):
    """Logits at a quarter, full-size confidences in [0, 1], gradient to the images."""
    model = backbone_detector(kind)
    assert model(torch.randn(2, 3, 64, 96)).logits.shape == (2, 1, 16, 24)
    images = torch.rand(2, 3, 50, 70, requires_grad=True)
    confidence = model.confidence(images)
    assert confidence.shape == (2, 1, 50, 70) and 0 <= confidence.min() < confidence.max() <= 1
    confidence.sum().backward()
    assert images.grad.abs().min() > 0
    loss = model(torch.randn(2, 3, 64, 64), torch.rand(2, 1, 64, 64)).loss
    assert loss.ndim == 0 and torch.isfinite(loss)


@each
def test_a_saved_detector_is_loaded_as_any_other(tmp_path, kind):
    model = backbone_detector(kind)
    model.save_pretrained(tmp_path)
    ArtifactDetectorImageProcessor.for_detector(model.config).save_pretrained(tmp_path)
    images = torch.rand(1, 3, 40, 56)
    for load in (
        ArtifactDetectorForSemanticSegmentation.from_pretrained,
        AutoModelForSemanticSegmentation.from_pretrained,
    ):
        loaded, info = load(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert torch.equal(loaded.eval().confidence(images), model.confidence(images))
    assert loaded.config.backbone_config.model_type == kind
    assert len(loaded.config.backbone_config.out_features) == 4
    assert f"SegFormer's decode head on {kind}" in (tmp_path / "README.md").read_text()


def test_the_decode_head_is_that_of_segformer():
    """Against its definition: each map projected, enlarged, all fused, normalised, classified."""
    model = backbone_detector()
    pixels = torch.randn(1, 3, 64, 64)
    head, maps = model.decode_head, model.backbone(pixels).feature_maps
    projected = []
    for layer, one in zip(head.linear_projections, maps):
        values = layer.proj(one.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        projected.append(nn.functional.interpolate(values, (16, 16), mode="bilinear", align_corners=False))
    fused = head.linear_fuse(torch.cat(projected[::-1], dim=1))
    torch.testing.assert_close(head.classifier(head.batch_norm(fused).relu()), model(pixels).logits)
    assert [layer.proj.in_features for layer in head.linear_projections] == [8, 16, 16, 32]


def test_it_is_diagnosed_with_and_treated_against(tmp_path):
    model = backbone_detector()
    model.save_pretrained(tmp_path)
    ArtifactDetectorImageProcessor.for_detector(model.config).save_pretrained(tmp_path)
    found = pipeline("artifact-detection", model=str(tmp_path))(squares(1)[0]["image"])
    assert found["artifact_map"].size == (32, 32) and 0 < found["max_confidence"] < 1
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    output = ArtifactReward(model)(images, ["a", "b"])
    output.loss.sum().backward()
    assert images.grad.abs().sum() > 0


def test_it_loads_without_this_package(tmp_path):
    backbone_detector().save_pretrained(tmp_path / "detector")
    code = (
        "import sys, torch; sys.modules['diffusers_diffdoctor'] = None\n"
        "from transformers import AutoModelForSemanticSegmentation as Auto\n"
        f"model = Auto.from_pretrained({str(tmp_path / 'detector')!r}, trust_remote_code=True).eval()\n"
        "print(tuple(model.confidence(torch.rand(1, 3, 32, 32)).shape), type(model.backbone).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[0] == "(1, 1, 32, 32) PvtV2Backbone"


def test_encoders_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"model type 'dinov2' has a patch_size of 14, .*divides 32"):
        ArtifactDetectorConfig(backbone_config=transformers.Dinov2Config(patch_size=14))
    with pytest.raises(ValueError, match=r"model type 'bert', which is no encoder of `AutoBackbone`"):
        ArtifactDetectorConfig(backbone_config=transformers.BertConfig())
    odd = ArtifactDetectorConfig(
        backbone_config=transformers.ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4, patch_size=2), **CHANGES
    )
    ArtifactDetectorForSemanticSegmentation(odd)(torch.randn(1, 3, 64, 64))
    odd.backbone_config.patch_size = 5
    with pytest.raises(ValueError, match=r"'convnext' makes a map of 12 x 12 of an input of 64 x 64"):
        ArtifactDetectorForSemanticSegmentation(odd)(torch.randn(1, 3, 64, 64))


# --- where training begins -----------------------------------------------------------------------------------------------


def test_sizes_are_those_of_the_paper():
    """Millions of parameters of encoders with heads, SegFormer's own table of ADE20K, whose 150 classes have 0.1 M in larger heads."""
    published = {"b0": 3.8, "b1": 13.7, "b2": 27.5, "b3": 47.3, "b4": 64.1, "b5": 84.7}
    with torch.device("meta"):
        for name in ARCHITECTURES:
            parameters = sum(parameter.numel() for parameter in new_detector(name).parameters()) / 1e6
            assert parameters == pytest.approx(published[name], abs=0.2), name
    assert new_detector("b0", image_size=256).config.image_size == 256


@each
def test_a_pretrained_encoder_gets_a_head(tmp_path, kind):
    config, model_class = ENCODERS[kind]
    torch.manual_seed(1)
    classifier = model_class(config)
    classifier.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    model = load_detector(tmp_path, **CHANGES)
    there = {name.split(".", 1)[1]: value for name, value in classifier.state_dict().items() if name.startswith(kind)}
    own = {name: value for name, value in model.backbone.state_dict().items() if "hidden_states_norms" not in name}
    own = {name.removeprefix(f"{kind}."): value for name, value in own.items()}
    assert len(own) > 20 and own.keys() <= there.keys()
    assert_same(own, {name: there[name] for name in own})
    assert model.config.image_mean == [0.5] * 3 and model.config.image_size == 64
    assert model(torch.randn(1, 3, 64, 64)).logits.shape == (1, 1, 16, 16)


@pytest.mark.parametrize("old_names", [False, True])
def test_a_pretrained_segformer_encoder_gets_a_head(tmp_path, old_names):
    """As `nvidia/mit-b5`: a classifier of 1000 classes, in files with the names of earlier versions of transformers."""
    torch.manual_seed(1)
    config = transformers.SegformerConfig(
        **{key: value for key, value in TINY.items() if key != "image_size"}, num_labels=1000
    )
    classifier = SegformerForImageClassification(config)
    classifier.save_pretrained(tmp_path)
    if old_names:
        save_file(old_state_dict(classifier), tmp_path / "model.safetensors", {"format": "pt"})
    model = load_detector(tmp_path, image_size=128)
    assert_same(dict(model.segformer.state_dict()), dict(classifier.segformer.state_dict()))
    assert model.config.num_labels == 1 and model.config.image_size == 128 and model.config.decoder_hidden_size == 16
    assert model.config.name_or_path == str(tmp_path)


def test_a_detector_is_loaded_as_it_is(tmp_path):
    tiny_detector().save_pretrained(tmp_path)
    model = load_detector(tmp_path, image_size=96)
    assert_same(dict(model.state_dict()), dict(tiny_detector().state_dict()))
    assert model.config.image_size == 96


def test_half_an_encoder_is_refused(tmp_path):
    config, model_class = ENCODERS["pvt_v2"]
    model_class(config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in weights if name.endswith("mlp.dense1.weight"))
    save_file(
        {name: value for name, value in weights.items() if name != gone},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(
        ValueError, match=r"`model` '.*' cannot be loaded .*no weights of 1 tensors of the encoder, such as .*dense1"
    ):
        load_detector(tmp_path)


def test_the_trainer_starts_from_an_encoder_and_trains_all_of_it(tmp_path):
    config, model_class = ENCODERS["pvt_v2"]
    torch.manual_seed(1)
    model_class(config).save_pretrained(tmp_path / "encoder")
    args = {
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "learning_rate": 1e-3,
        "image_size_min": 32,
        "image_size_max": 64,
    }
    runs = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        arguments = ArtifactDetectorTrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=2, save_steps=1, save_strategy="steps", seed=seed, **args
        )
        trainer = ArtifactDetectorTrainer(str(tmp_path / "encoder"), arguments, squares(4), squares(2))
        start = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
        trainer.train()
        runs.append(start)
    assert_same(runs[0], runs[1])  # the head's random weights follow from the seed
    assert not torch.equal(runs[0]["decode_head.classifier.weight"], runs[2]["decode_head.classifier.weight"])
    frozen = [name for name, value in trainer.model.named_parameters() if torch.equal(value, start[name])]
    assert not [name for name in frozen if "hidden_states_norms" not in name]
    trainer.save_model()
    assert str(tmp_path) not in (tmp_path / "c/config.json").read_text()  # whose names are private
    assert "SegFormer's decode head on pvt_v2" in (tmp_path / "c/README.md").read_text()
    resumed = ArtifactDetectorTrainer(str(tmp_path / "c/checkpoint-1"), arguments, squares(4))
    resumed.args.overwrite_output_dir = True
    resumed.train(resume_from_checkpoint=str(tmp_path / "c/checkpoint-1"))
    assert_same(dict(trainer.model.state_dict()), dict(resumed.model.state_dict()))
