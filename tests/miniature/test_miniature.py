# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
import torch
from datasets import load_dataset

from diffdoctor import main
from diffusers_diffdoctor import miniature
from diffusers_diffdoctor.miniature import build
from diffusers_diffdoctor.miniature.judge import MiniatureJudge
from diffusers_diffdoctor.miniature.renderer import PLAIN_CATEGORIES, PRONE_CATEGORIES, all_prompts


def test_unknown_and_missing_parts_are_named(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="`part` is 'vae', but the miniature consists of"):
        miniature.load("vae")
    monkeypatch.setattr(miniature, "WEIGHTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="diffdoctor miniature build --parts judge"):
        miniature.load("judge")


def test_splits_have_no_prompt_in_common():
    prompts = [row["prompt"] for split in miniature.SPLITS for row in miniature.prompts(split)]
    assert sorted(prompts) == sorted(row["prompt"] for row in all_prompts())
    for split in ("development", "final"):
        assert len(miniature.prompts(split, PRONE_CATEGORIES)) == 72
    assert {row["category"] for row in miniature.prompts("final", PLAIN_CATEGORIES)} == set(PLAIN_CATEGORIES)
    with pytest.raises(ValueError, match="`split` is 'test', but must be one of"):
        miniature.prompts("test")


def test_regularization_scenes_are_of_the_training_split():
    dataset = miniature.regularization_dataset(40)
    allowed = {row["prompt"] for row in miniature.prompts("train")}
    assert len(dataset) == 40 and set(dataset["prompt"]) <= allowed
    assert dataset[0]["image"].size == (64, 64)
    again = miniature.regularization_dataset(40)
    assert np.array_equal(np.asarray(dataset[39]["image"]), np.asarray(again[39]["image"]))


def test_rendered_scenes_are_an_image_folder(tmp_path, capsys):
    assert main(["miniature", "render", "--output", str(tmp_path / "scenes"), "--count", "12"]) == 0
    dataset = load_dataset(
        "imagefolder", data_dir=str(tmp_path / "scenes"), split="train", cache_dir=str(tmp_path / "c")
    )
    assert len(dataset) == 12 and dataset[0]["image"].size == dataset[0]["artifact_map"].size == (64, 64)
    for row in dataset:
        assert (np.asarray(row["artifact_map"]).max() == 255) == bool(row["artifacts"])
    assert main(["miniature", "render", "--output", str(tmp_path / "scenes")]) == 1
    assert "is not empty" in capsys.readouterr().err


def test_the_same_scenes_whatever_the_number_of_workers():
    one, two = (build.render_scenes(6, seed=3, wrong_share=0.5, chunk=2, workers=n) for n in (1, 2))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1]) and one[2] == two[2]


def test_every_caption_has_tokens_of_its_own():
    prompts = [row["prompt"] for row in all_prompts()]
    for tokenizer in (build._clip_tokenizer(), build._t5_tokenizer()):
        rows = [tokenizer(prompt).input_ids for prompt in prompts]
        assert len({tuple(row) for row in rows}) == len(prompts)
        assert max(len(row) for row in rows) <= build.MAX_TOKENS
        assert all(row[-1] == tokenizer.eos_token_id and tokenizer.unk_token_id not in row[:-1] for row in rows)


def test_the_judge_learns_and_keeps_what_it_learned(tmp_path):
    images, maps, _ = build.render_scenes(8, seed=9, wrong_share=1.0, workers=1)
    x, y = images.float() / 255, maps.float() / 255
    torch.manual_seed(0)
    judge = MiniatureJudge(channels=(16, 16, 16, 16))
    before = (judge.confidence(x) - y).square().mean()
    optimizer = torch.optim.Adam(judge.parameters(), lr=5e-3)
    for _ in range(40):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(judge(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = judge.confidence(x)
    assert after.shape == (8, 1, 64, 64) and 0 <= after.min() and after.max() <= 1
    assert (after - y).square().mean() < 0.5 * before
    judge.save_pretrained(tmp_path)
    assert torch.equal(MiniatureJudge.from_pretrained(tmp_path).confidence(x), after)
