# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from diffusers_diffdoctor.rewards import CLIPReward, as_reward


LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny random CLIP with a tokenizer of letters."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = CLIPTextConfig(
        vocab_size=len(words), max_position_embeddings=16, bos_token_id=52, eos_token_id=53, pad_token_id=53, **sizes
    )
    vision = CLIPVisionConfig(image_size=48, patch_size=8, **sizes)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 48, "width": 48}, image_mean=[0.3, 0.4, 0.5]
    )
    return model, CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def blocks(height, width, low=60, high=190):
    """8-bit blocks. Bicubic overshoots at their edges; from 60 to 190 it stays within 8 bits."""
    array = np.random.default_rng(0).integers(low, high + 1, (height // 8, width // 8, 3), dtype=np.uint8)
    array[0, 0], array[0, 1] = high, low
    return np.array(Image.fromarray(array).resize((width, height), Image.NEAREST))


def as_images(array):
    return torch.from_numpy(array).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize(
    ("contrast", "highest", "mean"),
    [
        pytest.param((60, 190), 1.5, 0.5, id="rounding"),
        # PIL also clips between its two passes, whose order depends on its version: a few pixels differ.
        pytest.param((0, 255), 16, 0.7, id="saturated"),
    ],
)
@pytest.mark.parametrize("size", [(64, 64), (40, 64), (120, 72), (56, 56), (200, 88)])
def test_preprocessing_is_that_of_the_processor(clip, size, contrast, highest, mean):
    model, processor = clip
    array = blocks(*size, *contrast)
    expected = processor.image_processor(Image.fromarray(array), return_tensors="pt")["pixel_values"]
    found = CLIPReward(model, processor).preprocess(as_images(array))
    assert found.shape == expected.shape == (1, 3, 48, 48)
    steps = (found - expected).abs() * 255 * torch.tensor(processor.image_processor.image_std).view(3, 1, 1)
    assert steps.max() < highest and steps.mean() < mean


def test_score_is_that_of_the_whole_model(clip):
    """CLIPModel's own forward, with the processor's tensors."""
    model, processor = clip
    arrays, prompts = (
        [blocks(56, 56), blocks(56, 56)[::-1].copy()],
        ["a red cat", "two dogs and a very long tail of words"],
    )
    inputs = processor(
        text=prompts,
        images=[Image.fromarray(array) for array in arrays],
        return_tensors="pt",
        padding=True,
        truncation=True,
        max_length=16,
    )
    with torch.no_grad():
        expected = 100 * (model(**inputs).logits_per_image / model.logit_scale.exp()).diagonal().clamp(min=0)
    images = torch.cat([as_images(array) for array in arrays])
    found = CLIPReward(model, processor)(images, prompts)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)  # at 56 pixels nothing is resized and rounded
    assert found.shape == (2,) and found.max() > 1


def test_gradient_reaches_the_images(clip):
    model, processor = clip
    score = CLIPReward(model, processor).double()
    images = as_images(blocks(64, 64)).double() * 0.6 + 0.2
    images.requires_grad_()
    # A score of 0 has no gradient: take a prompt that fits.
    prompt = next(letter for letter in LETTERS if score(images, [letter]).item() > 1)
    (gradient,) = torch.autograd.grad(score(images, [prompt]).sum(), images)
    assert gradient.abs().sum() > 0
    with torch.no_grad():
        step = 1e-2 * gradient / gradient.abs().max()
        assert score(images + step, [prompt]).item() > score(images, [prompt]).item()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    output = as_reward(score)(images, [prompt])
    assert output.loss.item() == -output.score.item()
    model.float()


def test_tokenizer_alone_is_enough(clip):
    model, processor = clip
    score = CLIPReward(model, processor.tokenizer)
    assert score.preprocess(torch.rand(1, 3, 64, 80)).shape == (1, 3, 48, 48)
    assert score.preprocess.mean[0] == pytest.approx(0.48145466)


def test_bad_input_is_named(clip):
    model, processor = clip
    score = CLIPReward(model, processor)
    with pytest.raises(ValueError, match="one prompt per image: 2 images"):
        score(torch.rand(2, 3, 64, 64), ["a"])
    with pytest.raises(ValueError, match="one prompt per image"):
        score(torch.rand(1, 3, 64, 64), "a")
    with pytest.raises(ValueError, match="images must be float"):
        score(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), ["a"])
    with pytest.raises(TypeError, match="must be a CLIPModel"):
        CLIPReward(torch.nn.Linear(1, 1), processor)
