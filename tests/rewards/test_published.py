# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Scorers of whole images against what their papers say, on tiny random files in the layout of the published ones."""

import math

import numpy as np
import pytest
import torch
from fixtures import scorers
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from diffusers_diffdoctor import miniature
from diffusers_diffdoctor.rewards import (
    AestheticReward,
    CLIPReward,
    CombinedReward,
    EndpointReward,
    HPSv2Reward,
    ImageRewardReward,
    PickScoreReward,
    as_reward,
)


SIDE, SEED = scorers.SIDE, 1
PROMPTS = ["a red cat", "two dogs, and more words than there is room for in this model", ""]


def pictures(height=SIDE, width=SIDE, count=3):
    """8-bit pictures that are smooth, as photographs are, and their floats."""
    noise = np.random.default_rng(0).integers(40, 216, (count, 5, 5, 3), dtype=np.uint8)
    images = [Image.fromarray(one).resize((width, height), Image.BICUBIC) for one in noise]
    return images, torch.stack([torch.from_numpy(np.array(one)) for one in images]).permute(0, 3, 1, 2) / 255


def normalised(images):
    return (images - torch.tensor(scorers.MEAN).view(3, 1, 1)) / torch.tensor(scorers.STD).view(3, 1, 1)


def resized(image, size):
    """(height, width, 3) in [0, 1], by Pillow in floats, which it does not round."""
    channels = [Image.fromarray(np.asarray(one, dtype=np.float32)) for one in image.split()]
    return np.stack([np.asarray(one.resize(size, Image.BICUBIC)) for one in channels], axis=-1) / 255


def cropped(image, corner):
    """The short side to SIDE, then the middle."""
    width, height = image.size
    size = (SIDE, int(SIDE * height / width)) if width <= height else (int(SIDE * width / height), SIDE)
    left, top = (corner((edge - SIDE) / 2) for edge in size)
    return resized(image, size).clip(0, 1)[top : top + SIDE, left : left + SIDE]


def torchvision_pixels(image):
    return cropped(image, round)


def transformers_pixels(image):
    return cropped(image, math.floor)


def padded_pixels(image):
    """The long side to SIDE, the image in the middle of black."""
    scale = SIDE / max(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    square = np.zeros((SIDE, SIDE, 3), dtype=np.float32)
    left, top = (SIDE - width) // 2, (SIDE - height) // 2
    square[top : top + height, left : left + width] = resized(image, (width, height))
    return square


def pixel_values(images, pixels):
    return normalised(torch.from_numpy(np.stack([pixels(image) for image in images])).permute(0, 3, 1, 2))


@pytest.fixture(scope="module")
def hpsv2(tmp_path_factory):
    folder = scorers.write_hpsv2(tmp_path_factory.mktemp("hpsv2"))
    reward = HPSv2Reward.from_pretrained(folder)
    state = scorers.open_clip_state(len(reward.tokenizer))

    def expected(pixels, prompts):
        ids = reward.tokenizer(prompts, truncation=True, max_length=scorers.CONTEXT)["input_ids"]
        return scorers.open_clip_cosine(state, pixels, ids, reward.tokenizer.eos_token_id)

    return folder, reward, expected, padded_pixels


@pytest.fixture(scope="module")
def image_reward(tmp_path_factory):
    folder = scorers.write_image_reward(tmp_path_factory.mktemp("image_reward"))
    reward = ImageRewardReward.from_pretrained(folder)
    state = scorers.image_reward_state()

    def expected(pixels, prompts):
        ids = reward.tokenizer(prompts, truncation=True, max_length=35)["input_ids"]
        return scorers.image_reward(state, pixels, ids)

    return folder, reward, expected, torchvision_pixels


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP in transformers' layout, with OpenAI's activation, and its processor."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = scorers.clip_tokenizer(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        "vocab_size": 54,
        "max_position_embeddings": 16,
        "bos_token_id": 52,
        "eos_token_id": 53,
        "pad_token_id": 53,
    }
    torch.manual_seed(SEED)
    model = CLIPModel(
        CLIPConfig(
            text_config=text | sizes, vision_config={"image_size": SIDE, "patch_size": 8} | sizes, projection_dim=16
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
        model.logit_scale.fill_(3.0)
    model.save_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def clip_outputs(folder, pixels, prompts):
    """transformers' own."""
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    inputs = processor(text=prompts, return_tensors="pt", padding=True, truncation=True, max_length=16)
    with torch.no_grad():
        return model(pixel_values=pixels, **inputs)


@pytest.fixture(scope="module")
def pickscore(clip_folder):
    reward = PickScoreReward.from_pretrained(clip_folder)

    def expected(pixels, prompts):
        return clip_outputs(clip_folder, pixels, prompts).logits_per_image.diagonal()

    return clip_folder, reward, expected, transformers_pixels


@pytest.fixture(scope="module")
def clip(clip_folder):
    reward = CLIPReward.from_pretrained(clip_folder)

    def expected(pixels, prompts):
        logits = clip_outputs(clip_folder, pixels, prompts).logits_per_image.diagonal()
        return 100 * (logits / math.exp(3)).clamp(min=0)

    return clip_folder, reward, expected, transformers_pixels


@pytest.fixture(scope="module")
def aesthetic(clip_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("aesthetic") / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(scorers.head_state(16), path)
    reward = AestheticReward.from_pretrained(path, clip=clip_folder)

    def expected(pixels, prompts):
        return scorers.head(scorers.head_state(16), clip_outputs(clip_folder, pixels, prompts).image_embeds)

    return path, reward, expected, transformers_pixels


ALL = ["hpsv2", "image_reward", "pickscore", "clip", "aesthetic"]


@pytest.mark.parametrize("name", ALL)
def test_scores_are_those_of_the_paper(name, request):
    _, reward, expected, _ = request.getfixturevalue(name)
    _, floats = pictures()
    with torch.no_grad():
        found = reward(floats, PROMPTS)
    torch.testing.assert_close(found, expected(normalised(floats), PROMPTS), atol=1e-4, rtol=1e-4)
    assert found.shape == (3,) and found.std() > 1e-3, "scores that are all the same prove nothing"


@pytest.mark.parametrize("size", [(64, 64), (48, 90), (91, 50), (24, 24)])
@pytest.mark.parametrize("name", ALL)
def test_the_preprocessing_is_that_of_the_original(name, size, request):
    _, reward, expected, pixels = request.getfixturevalue(name)
    images, floats = pictures(*size)
    with torch.no_grad():
        found = reward(floats, PROMPTS)
    torch.testing.assert_close(found, expected(pixel_values(images, pixels), PROMPTS), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("size", [(160, 100)])
def test_rounding_to_8_bits_hardly_moves_the_score_of_a_trained_model(size):
    """Pillow rounds the resized picture, which no gradient would pass; of a trained CLIP the score stays, to 1e-3."""
    folder = miniature.load("clip")
    rows = miniature.regularization_dataset(8)
    images = [row["image"].convert("RGB").resize(size, Image.BICUBIC) for row in rows]
    floats = torch.stack([torch.from_numpy(np.array(one)) for one in images]).permute(0, 3, 1, 2) / 255
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    inputs = CLIPProcessor.from_pretrained(folder)(
        text=list(rows["prompt"]), images=images, return_tensors="pt", padding=True
    )
    with torch.no_grad():
        expected = 100 * model(**inputs).logits_per_image.diagonal() / model.logit_scale.exp()
        found = CLIPReward.from_pretrained(folder)(floats, list(rows["prompt"]))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_gradients_reach_the_pixels(name, request):
    _, reward, _, _ = request.getfixturevalue(name)
    floats = pictures(48, 40)[1].requires_grad_()
    reward.train()
    assert not reward.training and not any(parameter.requires_grad for parameter in reward.parameters())
    scores = reward(floats, PROMPTS)
    # a CLIP score of 0 has no gradient
    chosen = scores.detach() != 0
    assert chosen.any()
    (gradient,) = torch.autograd.grad(scores.sum(), floats)
    assert gradient.isfinite().all() and (gradient[chosen].flatten(1).abs().amax(1) > 0).all()
    step = 1e-3 * gradient / gradient.abs().max()
    with torch.no_grad():
        gained = (reward(floats + step, PROMPTS) - reward(floats - step, PROMPTS)).sum() / 2
    torch.testing.assert_close(gained, (gradient * step).sum(), rtol=0.05, atol=1e-5)
    assert torch.equal(as_reward(reward)(floats, PROMPTS).loss, -scores)


def saved(path, state):
    torch.save({"state_dict": state} if path.name.startswith("HPS") else state, path)
    return path


def cut(state):
    return {key: value for key, value in state.items() if key != next(iter(state))}


def grown(state):
    return state | {"surplus.weight": torch.zeros(2)}


def bent(state):
    key = next(iter(state))
    return state | {key: torch.zeros(*(side + 1 for side in state[key].shape))}


def broken(state):
    key = list(state)[-1]
    return state | {key: torch.full_like(state[key], float("nan"))}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, "(1 missing|has no tensor).*{first}"),
        (grown, r"1 unexpected \(surplus.weight\)"),
        (bent, "(1 of another shape|{first})"),
        (broken, r"not finite in {last}"),
    ],
)
@pytest.mark.parametrize("name", ["hpsv2", "image_reward", "aesthetic"])
def test_wrong_files_are_refused_by_name(name, change, message, tmp_path, clip_folder):
    state = {
        "hpsv2": lambda: scorers.open_clip_state(54),
        "image_reward": scorers.image_reward_state,
        "aesthetic": lambda: scorers.head_state(16),
    }[name]()
    state = {key: state[key] for key in sorted(state, key=lambda key: "attn" not in key and "layers.2" not in key)}
    wrong = change(state)
    message = message.replace("{first}", next(iter(state))).replace("{last}", list(state)[-1])
    with pytest.raises(ValueError, match=message) as caught:
        if name == "hpsv2":
            HPSv2Reward.from_pretrained(scorers.write_hpsv2(tmp_path, wrong))
        elif name == "image_reward":
            ImageRewardReward.from_pretrained(scorers.write_image_reward(tmp_path, wrong))
        else:
            AestheticReward.from_pretrained(saved(tmp_path / "aesthetic-model.pth", wrong), clip=clip_folder)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("reward", [CLIPReward, PickScoreReward])
def test_a_clip_with_other_tensors_is_refused(reward, clip_folder, tmp_path):
    model = CLIPModel.from_pretrained(clip_folder)
    state = model.state_dict()
    del state["visual_projection.weight"]
    model.save_pretrained(tmp_path, state_dict=state | {"odd.weight": torch.zeros(1)})
    with pytest.raises(
        ValueError, match=r"1 missing \(visual_projection.weight\), 1 unexpected \(odd.weight\)"
    ) as caught:
        reward.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_what_is_no_checkpoint_is_named(tmp_path, clip_folder):
    path = tmp_path / "HPS_v2.1_compressed.pt"
    with pytest.raises(FileNotFoundError, match=r"has no HPS_v2.1_compressed.pt"):
        HPSv2Reward.from_pretrained(tmp_path)
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=r"HPS_v2.1_compressed.pt is not a PyTorch state dict"):
        HPSv2Reward.from_pretrained(path)
    torch.save({"state_dict": {"w": [1, 2]}}, path)
    with pytest.raises(ValueError, match="expected was a state dict of tensors"):
        HPSv2Reward.from_pretrained(path)
    torch.save(scorers.image_reward_state(), tmp_path / "ImageReward.pt")
    with pytest.raises(FileNotFoundError, match=r"has no med_config.json"):
        ImageRewardReward.from_pretrained(tmp_path / "ImageReward.pt")
    (tmp_path / "med_config.json").write_text('{"hidden_size": 24}')
    with pytest.raises(ValueError, match=r"med_config.json is no description of a BERT.*intermediate_size"):
        ImageRewardReward.from_pretrained(tmp_path / "ImageReward.pt")
    torch.save(scorers.head_state(20), tmp_path / "aesthetic-model.pth")
    with pytest.raises(ValueError, match="reads embeddings of 20 numbers, but `clip`"):
        AestheticReward.from_pretrained(tmp_path, clip=clip_folder)


def test_version_2_0_is_a_file_of_its_own(tmp_path):
    scorers.write_hpsv2(tmp_path)
    (tmp_path / "HPS_v2.1_compressed.pt").rename(tmp_path / "HPS_v2_compressed.pt")
    assert (
        HPSv2Reward.from_pretrained(tmp_path, "HPS_v2_compressed.pt").model.config.projection_dim == scorers.EMBEDDING
    )


def test_rewards_have_names(tmp_path, clip_folder):
    scorers.write_hpsv2(tmp_path)
    rewards = CombinedReward(
        [f"hpsv2={tmp_path}", f"pickscore={clip_folder}", f"hpsv2={tmp_path}", "http://localhost:1"]
    )
    assert rewards.names == ["hpsv2", "pickscore", "hpsv2_1", "endpoint"]
    assert isinstance(rewards.rewards[0].function, HPSv2Reward)
    assert isinstance(rewards.rewards[3].function, EndpointReward)
    with torch.no_grad():
        expected = HPSv2Reward.from_pretrained(tmp_path)(pictures()[1], PROMPTS)
        torch.testing.assert_close(as_reward(f"hpsv2={tmp_path}")(pictures()[1], PROMPTS).score, expected)
    (tmp_path / "mine.py").write_text("def dark(images, prompts):\n    return 1 - images.mean(dim=(1, 2, 3))\n")
    images = pictures()[1]
    torch.testing.assert_close(
        as_reward(f"{tmp_path}/mine.py:dark")(images, PROMPTS).score, 1 - images.mean(dim=(1, 2, 3))
    )
    for wrong, message in (
        (f"{tmp_path}/mine.py:bright", "has no function 'bright'"),
        ("hspv2", "no reward 'hspv2', did you mean 'hpsv2'"),
        ("detector", "Name one of aesthetic, artifact_scorer, clip"),
        ("", "no reward ''"),
    ):
        with pytest.raises(ValueError, match=message):
            as_reward(wrong)
    with pytest.raises(FileNotFoundError, match=r"there is no file 'none.py'"):
        as_reward("none.py:dark")
    with pytest.raises(FileNotFoundError, match=r"has no HPS_v2.1_compressed.pt"):
        as_reward(f"hpsv2={clip_folder}")
