# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Prompts that a language model writes, images that a pipeline makes of them, and a local model that chooses by likelihood."""

import argparse
import json
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.rows import photo_bytes, write_rows
from language_server import serve
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from diffdoctor import main
from diffusers_diffdoctor import miniature
from diffusers_diffdoctor.cli import data_categorize
from diffusers_diffdoctor.data import find_shards, synthesize
from diffusers_diffdoctor.data.language import Request
from diffusers_diffdoctor.data.language.local import LocalModel
from diffusers_diffdoctor.data.prompts import PromptRules, flagged_categories, similarity, trigrams
from diffusers_diffdoctor.data.schema import decode_image


def test_rules_of_prompts():
    rules = PromptRules(banned=("nude", "red light"))
    assert rules.wrong("a dog and the house") is None
    assert rules.wrong("denuded hills in the evening") is None  # whole words
    assert rules.wrong("the Red, light!") == rules.wrong("a NUDE on the beach") == "banned word"
    assert (
        rules.wrong("ein Hund auf der Straße mit dem Ball")
        == rules.wrong("собака на улице города")
        == "another language"
    )
    assert rules.wrong("a dog") == "too short" and rules.wrong("dog " * 61) == "too long"
    one, other = trigrams("a red dog, in the garden"), trigrams("A red dog in the garden!")
    assert similarity(one, other) == 1 and similarity(one, trigrams("seven cups under stars")) < 0.2


def test_prompts_by_the_command(tmp_path, capsys):
    (tmp_path / "balance.json").write_text(json.dumps({"flagged": ["hand", "dog"]}))
    (tmp_path / "categories.csv").write_text("name,flag\nhand,high\ncup,\n'=dog,low\n")
    assert flagged_categories(tmp_path / "categories.csv") == ["hand", "=dog"]
    output = tmp_path / "out"
    with serve() as server:
        command = ["data", "prompts", "--balance", str(tmp_path), "--model", "m", "--base-url", server.url]
        command += ["-o", str(output), "--count", "15", "--banned", "nude"]
        assert main(command) == 0
        first, asked = (output / "prompts.jsonl").read_text(), server.total()
        assert main(command) == 0
        assert (output / "prompts.jsonl").read_text() == first and server.total() == asked
    rows = [json.loads(line) for line in first.splitlines()]
    assert [row["category"] for row in rows] == ["hand"] * 15 + ["dog"] * 15
    assert all(row["category"] in row["prompt"] and row["model"] == "m" and row["seed"] >= 0 for row in rows)
    assert max(similarity(trigrams(a["prompt"]), trigrams(b["prompt"])) for a, b in combinations(rows, 2)) < 0.7
    counts = json.loads((output / "prompts.json").read_text())
    assert counts["written"] == counts["taken"] + sum(counts["rejected"].values()) and counts["taken"] == 30
    assert {"banned word", "another language", "like another", "too short"} <= set(counts["rejected"])


def test_synthesize_is_what_the_pipeline_makes(tmp_path, capsys):
    from diffusers import DiffusionPipeline

    folder = str(miniature.load("pipeline"))
    prompt = miniature.prompts("final")[0]["prompt"]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": prompt, "category": "hand", "seed": 7}) + "\n")
    command = ["data", "synthesize", str(tmp_path / "prompts.jsonl"), "--pipeline", folder, "--steps", "1", "2"]
    command += ["-o", str(tmp_path / "out"), "--device", "cpu", "--width", "64", "--height", "64"]
    command += ["--pipeline-kwargs", '{"max_sequence_length": 12}']
    assert main([*command, "--rank", "0", "--world-size", "2"]) == 0
    assert "Others are not yet" in capsys.readouterr().out
    assert main([*command, "--rank", "1", "--world-size", "2"]) == 0
    assert "2 in = 2 out + 0 quarantined" in capsys.readouterr().out
    rows = [row for shard in find_shards(tmp_path / "out") for row in shard.read()]
    assert [(row["steps"], row["seed"], row["category"], row["generator"]) for row in rows] == [
        (steps, 7, ["hand"], "pipeline") for steps in (1, 2)
    ]
    pipeline = DiffusionPipeline.from_pretrained(folder)
    generator = torch.Generator().manual_seed(7)
    options = {"width": 64, "height": 64, "max_sequence_length": 12}
    image = pipeline(prompt, num_inference_steps=2, generator=generator, **options).images[0]
    assert np.array_equal(np.asarray(decode_image(rows[1])), np.asarray(image))
    for more, words in (("3", "must be a JSON object"), ('{"width": 3}', "`pipeline_kwargs` has 'width'")):
        try:
            assert main([*command, "--pipeline-kwargs", more]) == 1
        except SystemExit as end:
            assert end.code == 2
        assert words in capsys.readouterr().err


def test_a_pipeline_that_fails_stops_no_other_and_is_tried_again(tmp_path, capsys, monkeypatch):
    whole = miniature.load("pipeline")
    broken, moody = tmp_path / "broken", tmp_path / "moody"
    for folder in (broken, moody):
        shutil.copytree(whole, folder)
    weights = broken / "vae/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    prompts = [{"prompt": one["prompt"], "seed": i} for i, one in enumerate(miniature.prompts("final")[:3])]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in prompts))
    loads = []
    load = synthesize._load

    def loaded(name, *place):
        """The pipeline "moody" cannot stand the second prompt."""
        loads.append(Path(name).name)
        pipeline = load(name, *place)
        if Path(name) != moody or (moody / "calm").exists():
            return pipeline

        def call(prompt, **options):
            if prompts[1]["prompt"] in prompt:
                raise RuntimeError(f"not this one, in {moody}")
            return pipeline(prompt=prompt, **options)

        return call

    monkeypatch.setattr(synthesize, "_load", loaded)
    monkeypatch.setattr(synthesize, "_held", {})
    out = tmp_path / "out"
    command = ["data", "synthesize", str(tmp_path / "prompts.jsonl"), "--steps", "1", "--shard-rows", "2"]
    command += ["-o", str(out), "--device", "cpu", "--width", "32", "--height", "32"]
    command += ["--pipeline", str(broken), str(moody), str(whole)]
    assert main(command) == 1
    said = capsys.readouterr().out
    assert "9 in = 5 out + 4 quarantined" in said and "4 of them failed and might succeed" in said
    assert "broken failed: `pipeline`" in said and "moody failed: not this one, in moody: 1" in said
    assert loads == ["broken", "broken", "moody", "pipeline"]  # the first has two shards
    rows = [(row["generator"], row["seed"]) for shard in find_shards(out) for row in shard.read()]
    assert rows == [("moody", 0), ("moody", 2)] + [("pipeline", i) for i in range(3)]
    kept = "".join(file.read_text() for name in ("*.jsonl", "*.json", "README.md") for file in out.rglob(name))
    assert str(tmp_path) not in kept

    # the next run does what is missing: all of the broken one, and the other's shard with the second prompt
    shutil.copy(whole / "vae" / weights.name, weights)
    (moody / "calm").touch()
    times = {file.name: file.stat().st_mtime_ns for file in (out / "data").iterdir()}
    loads.clear()
    assert main(command) == 0
    assert "9 in = 9 out + 0 quarantined" in capsys.readouterr().out and loads == ["broken", "moody"]
    done = {file.name for file in (out / "data").iterdir() if file.stat().st_mtime_ns != times[file.name]}
    assert sorted(name[6:11] for name in done) == ["00000", "00001", "00002"]
    images = {}
    for row in (row for shard in find_shards(out) for row in shard.read()):
        images.setdefault(row["seed"], []).append(np.asarray(decode_image(row)))
    assert all(
        len(same) == 3 and np.array_equal(same[0], same[1]) and np.array_equal(same[0], same[2])
        for same in images.values()
    )
    loads.clear()
    assert main(command) == 0 and loads == []


def test_pipelines_that_end_in_the_same_name_are_refused(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a cup\n")
    names = [str(tmp_path / "one/flux"), str(tmp_path / "two/flux")]
    command = ["data", "synthesize", str(tmp_path / "p.txt"), "--pipeline", *names, "--steps", "1"]
    assert main([*command, "-o", str(tmp_path / "out")]) == 1
    assert "`pipelines` must end in different names, found flux, flux: rename a folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "line, words", [('{"prompt": 3}', "line 1"), ('{"prompt": "a", "seed": -1}', "seed"), ("", "no prompts")]
)
def test_wrong_prompt_files_are_named(tmp_path, capsys, line, words):
    (tmp_path / "p.jsonl").write_text(line + "\n")
    command = [
        "data",
        "synthesize",
        str(tmp_path / "p.jsonl"),
        "--pipeline",
        "x",
        "--steps",
        "1",
        "-o",
        str(tmp_path / "o"),
    ]
    assert main(command) == 1 and words in capsys.readouterr().err


WORDS = ["<unk>", "<s>", "</s>", "<image>", "<pad>", "hand", "dog", "cup", "red", "which"]


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """A tiny random LLaVA of ten words."""
    torch.manual_seed(0)
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=16, patch_size=8),
        text_config=LlamaConfig(
            **sizes, vocab_size=len(WORDS), initializer_range=1.0, bos_token_id=1, eos_token_id=2, pad_token_id=4
        ),
        image_token_index=3,
        image_token_id=3,
        vision_feature_layer=-1,
    )
    folder = tmp_path_factory.mktemp("seeing")
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ).save_pretrained(folder)
    return str(folder)


def test_likelihood_is_that_of_a_loop_by_hand(seeing):
    model = LocalModel(seeing, likelihood=True)
    request = Request("which", photo_bytes(0), choices=("hand", "red dog", "cup"))
    inputs = model.inputs(request)
    network, by_hand = LlavaForConditionalGeneration.from_pretrained(seeing).eval(), []
    for choice in request.choices:
        ids, total = inputs["input_ids"], 0.0
        for word in [*choice.split(), "</s>"]:  # one token after the other
            with torch.no_grad():
                logits = network(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -1]
            total += logits.log_softmax(-1)[WORDS.index(word)].item()
            ids = torch.cat([ids, torch.tensor([[WORDS.index(word)]])], 1)
        by_hand.append(total)
    assert [model.log_likelihood(inputs, choice) for choice in request.choices] == pytest.approx(by_hand, abs=1e-4)
    best = request.choices[int(np.argmax(by_hand))]
    assert json.loads(model.ask(request).text)["categories"][0] == best


def test_a_random_local_model_is_quarantined_when_it_writes_and_chooses_from_the_vocabulary(tmp_path, seeing, capsys):
    write_rows(tmp_path / "pool/train-00000.parquet", [{"image": photo_bytes(i)} for i in range(3)])
    command = ["data", "categorize", str(tmp_path / "pool"), "--model", seeing, "--local", "--device", "cpu"]
    main([*command, "-o", str(tmp_path / "written")])
    assert "3 in = 0 out + 3 quarantined" in capsys.readouterr().out
    command += ["--vocabulary", "hand", "dog", "--likelihood", "-o", str(tmp_path / "chosen")]
    assert main(command) == 0
    rows = [row for shard in find_shards(tmp_path / "chosen") for row in shard.read()]
    assert len(rows) == 3 and all(row["category"] and {*row["category"]} <= {"hand", "dog"} for row in rows)
    assert main(command) == 0


def test_processes_share_the_images_and_each_has_a_gpu_of_its_own(tmp_path, seeing, capsys, monkeypatch):
    for part in range(2):
        write_rows(tmp_path / f"pool/train-0000{part}.parquet", [{"image": photo_bytes(2 * part + i)} for i in (0, 1)])
    command = ["data", "categorize", str(tmp_path / "pool"), "--model", seeing, "--local", "--likelihood"]
    command += ["--vocabulary", "hand", "dog", "-o", str(tmp_path / "out"), "--device", "cpu"]
    monkeypatch.setenv("WORLD_SIZE", "2")  # as accelerate and torchrun set it
    monkeypatch.setenv("RANK", "1")
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "2 requests" in said and "Others are not yet" in said
    monkeypatch.setenv("RANK", "0")
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "2 requests" in said and "4 in = 4 out + 0 quarantined" in said

    # no GPU here: onto which the model would be loaded
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    parser = argparse.ArgumentParser()
    data_categorize.add_arguments(parser)
    args = parser.parse_args(command[2:-2])
    for local_rank, device in (("0", "cuda"), ("1", "cuda:1")):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        model = data_categorize._local(args)
        assert (model.device, model.dtype) == (device, torch.bfloat16)
