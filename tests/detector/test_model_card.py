# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What the detector's card tells, read as the Hub reads it, and that it overwrites nobody's words."""

import json
import re

import pytest
import torch
from datasets import Dataset
from fixtures.segformer import tiny_detector
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image

from diffusers_diffdoctor import ArtifactDetectorTrainer, ArtifactDetectorTrainingArguments
from diffusers_diffdoctor.detector.model_card import data_facts, licence_of, write_card
from diffusers_diffdoctor.evaluation import DetectorFigures


HOSTILE = "<script>alert(1)</script> | [x](javascript:y) {{ 7 }} `z`"
ROWS = [
    {"source": "photo", "generator": None, "year": None},
    {"source": "human", "generator": "SDXL", "year": 2023},
    {"source": "human", "generator": "SDXL", "year": 2024},
    {"source": "pseudo", "generator": HOSTILE, "year": 2025},
    {"source": None, "generator": None, "year": None},
]
FACTS = {
    "rows": 5,
    "sources": {"human": 2, "photo": 1, "pseudo": 1, "not said": 1},
    "generators": {"SDXL": 2, "photographs": 1, HOSTILE: 1, "not said": 1},
    "years": {"SDXL": (2023, 2024), HOSTILE: (2025, 2025)},
}


@pytest.mark.parametrize(
    "make", [Dataset.from_list, list, lambda rows: {"a": rows[:2], "b": Dataset.from_list(rows[2:])}]
)
def test_facts_are_counts_of_the_columns(make):
    facts = data_facts(make(ROWS))
    named = (
        FACTS
        if not isinstance(make(ROWS), dict)
        else FACTS | {"sources": {"human": 2, "photo": 1, "pseudo": 1, "b": 1}}
    )
    assert facts == named


def test_facts_without_columns_and_of_streams():
    assert data_facts(Dataset.from_list([{"image": 1}, {"image": 2}]))["sources"] == {"not said": 2}
    assert data_facts({"mine": [{"image": 1}]})["sources"] == {"mine": 1}
    assert data_facts(Dataset.from_list(ROWS).to_iterable_dataset()) is None
    assert data_facts(torch.utils.data.TensorDataset(torch.zeros(3))) is None
    assert data_facts(None) is None


def record(**more):
    return {"data": FACTS, "started_from": "nvidia/mit-b5", "trained": "2026-11", "step": 30} | more


def evaluation():
    generator = torch.Generator().manual_seed(0)
    truth = (torch.rand(6, 1, 8, 8, generator=generator) > 0.8).float()
    truth[:2] = 0
    figures = DetectorFigures()
    figures.update(
        truth * 0.5 + 0.4 * torch.rand(truth.shape, generator=generator),
        truth,
        [["hand"], [HOSTILE]] * 3,
        ["SDXL"] * 6,
        ["photo"] * 2 + ["human"] * 4,
    )
    computed = json.loads(json.dumps(figures.compute()).replace("NaN", "null"))
    return {"figures": computed, "dataset": "held-out", "threshold": 0.5}


def page_of(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_card_tells_what_it_learned_from_and_how_well_it_does(tmp_path):
    measured = evaluation()
    assert write_card(tmp_path, tiny_detector(), "user/detector", record=record(), evaluation=measured)
    text = page_of(tmp_path)
    assert "5 images. Trained in 2026-11 from nvidia/mit-b5, whose licence it inherits" in text.replace("&#45;", "-")
    assert "| SDXL | 2 | 2023 to 2024 |" in text and "| human | 2 |" in text and "| photographs | 1 |  |" in text
    assert "grows stale" in text and "Measured on held-out" in text.replace("&#45;", "-")
    everything = measured["figures"]["all"]
    assert f"| all | 6 | {everything['mse']:.4f} | {everything['kl_misses']:.4f} |" in text
    assert "| generator SDXL | 6 |" in text and "| category hand | 3 |" in text and "| photographs | 2 |" in text
    card = ModelCard(text).data
    assert card.license == "other" and card.license_name == "nvidia-source-code-license"
    assert card.base_model == "nvidia/mit-b5" and "artifact-detection" in card.tags
    found = {result.metric_type: result.metric_value for result in card.eval_results}
    assert found["mse"] == everything["mse"] and found["pixel_ap"] == everything["pixel_ap"] and len(found) == 9


def test_nothing_of_a_name_takes_effect(tmp_path):
    hostile = record(started_from=HOSTILE, trained=HOSTILE)
    write_card(tmp_path, tiny_detector(), record=hostile, evaluation=evaluation() | {"dataset": HOSTILE})
    card = ModelCard(page_of(tmp_path))
    assert card.data.eval_results[0].dataset_name == HOSTILE and card.data.base_model is None
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(card.text)
    inline = [child for token in tokens for child in token.children or ()]
    assert {token.type for token in inline} == {"text", "softbreak", "code_inline", "link_open", "link_close"}
    assert [token.content.split(":")[0] for token in tokens if token.type == "html_block"] == ["<!-- as written"]
    cells = ["".join(child.content for child in token.children) for token in tokens if token.type == "inline"]
    assert HOSTILE in cells and f"category {HOSTILE}" in cells


def test_the_last_evaluation_of_a_training_is_shown(tmp_path):
    def entry(step, mse):
        figures = {"images": 6, "mse": mse, "kl_misses": 0.5, "photographs_images": 2, "photographs_mse": 0.01}
        return {"step": step, "eval_runtime": 3.0, "eval_misses": float("nan")} | {
            f"eval_{set_}{key}": value for key, value in figures.items() for set_ in ("", "large_")
        }

    # the last one was after the best, which was loaded
    log = [
        {"step": 10, "loss": 1.0},
        entry(10, 0.9),
        entry(30, 0.123),
        entry(40, 0.8),
        {"step": 40, "train_loss": 2.0},
    ]
    write_card(tmp_path, tiny_detector(), record=record(started_from=None, data=None), log_history=log)
    text = page_of(tmp_path)
    assert text.count("| all | 6 | 0.1230 | 0.5000 |") == 2 and text.count("| photographs | 2 | 0.0100 |  |") == 2
    assert "\nlarge:\n" in text and "runtime" not in text and "0.8000" not in text
    assert "Trained in 2026-11 from random weights." in text.replace("&#45;", "-")
    results = ModelCard(text).data.eval_results
    assert {(result.dataset_name, result.metric_type, result.metric_value) for result in results} == {
        (name, *figure) for name in ("held-out images", "large") for figure in (("mse", 0.123), ("kl_misses", 0.5))
    }


def test_a_card_that_somebody_edited_is_kept(tmp_path):
    model = tiny_detector()
    model.save_pretrained(tmp_path)
    plain = page_of(tmp_path)
    assert "What it learned from" not in plain and "grows stale" in plain
    assert write_card(tmp_path, model, record=record())  # nobody has touched it
    told = page_of(tmp_path)
    assert "What it learned from" in told and write_card(tmp_path, model, record=record(trained="2027-01"))
    for edited in (told.replace("## Limits", "## Limits\n\nMine."), told + "\nMine.", "mine"):
        (tmp_path / "README.md").write_text(edited, encoding="utf-8")
        assert not write_card(tmp_path, model, record=record())
        assert page_of(tmp_path) == edited


def test_paths_of_this_machine_stay_here(tmp_path):
    write_card(tmp_path, tiny_detector(), record=record(started_from=str(tmp_path / "secret/start")))
    text = page_of(tmp_path)
    assert "from start" in text and "secret" not in text and str(tmp_path) not in text


def test_a_trained_detector_carries_its_card(tmp_path):
    rows = [
        {
            "image": Image.new("RGB", (32, 32), (8 * i, 0, 0)),
            "artifact_map": Image.new("L", (32, 32), 255 * (i % 2)),
            "source": "human",
            "generator": ["SDXL", "FLUX"][i % 2],
        }
        for i in range(4)
    ]
    settings = {"use_cpu": True, "report_to": "none", "max_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = ArtifactDetectorTrainer(
        tiny_detector(),
        ArtifactDetectorTrainingArguments(output_dir=str(tmp_path), save_strategy="steps", save_steps=1, **settings),
        train_dataset=rows,
        eval_dataset=rows,
    )
    trainer.train()
    (logged,) = [entry for entry in trainer.state.log_history if "eval_mse" in entry]
    for folder in (tmp_path / "checkpoint-1", tmp_path):
        if folder == tmp_path:
            trainer.save_model()
        text = page_of(folder)
        assert "4 images. Trained in 20" in text and "| SDXL | 2 |" in text and "| human | 4 |" in text
        assert f"| all | 4 | {logged['eval_mse']:.4f} |" in text and "| without artifacts | 2 |" in text
    assert json.loads((tmp_path / "training.json").read_text())["data"]["generators"] == {"SDXL": 2, "FLUX": 2}
    trainer.hub_model_id = "user/detector"
    trainer.create_model_card()
    assert 'model="user/detector"' in page_of(tmp_path)


def test_licences():
    assert licence_of("nvidia/mit-b0")[0] == licence_of("nvidia/segformer-b5-x")[0] == "nvidia-source-code-license"
    assert licence_of("facebook/dinov2-base") is licence_of(None) is None


def test_without_knowledge_it_is_the_plain_card(tmp_path):
    write_card(tmp_path, tiny_detector(), "x")
    assert page_of(tmp_path) == tiny_detector().model_card("x")
    assert not re.search(r"^## (Figures|What)", page_of(tmp_path), re.M)
