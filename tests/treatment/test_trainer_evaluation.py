# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Evaluation during treatment: its figures by hand, its files, and that it leaves the training as it was."""

import json

import numpy as np
import pytest
import torch
from fixtures.pipelines import tiny_flux
from fixtures.trainer import (
    HELD_OUT,
    PROMPTS,
    assert_same,
    lora_of,
    rows,
    tiny_detector,
    tiny_trainer,
    trained_names,
)
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import EarlyStoppingCallback, TrainerCallback

from diffusers_diffdoctor.treatment.examine import write_training_report


EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}


def test_figures_are_those_computed_by_hand(tmp_path):
    detector, judge, seen = tiny_detector(), tiny_detector(seed=7), []

    def brightness(images, prompts):
        seen.append((images, list(prompts)))
        return {"brightness": images.mean()}

    parts = {"eval_dataset": rows(HELD_OUT[:2]), "judge": judge, "compute_metrics": brightness}
    trainer = tiny_trainer(tmp_path, parts=parts, eval_num_images=5, per_device_eval_batch_size=2)
    trainer.train()
    figures = trainer.evaluate()

    prompts = [HELD_OUT[i % 2] for i in range(5)]
    images = trainer.rollout.generate(prompts, [1234 + i for i in range(5)])
    for prefix, network in (("eval_", detector), ("eval_judge_", judge)):
        maps = network.confidence(images).detach()
        highest = maps.flatten(1).max(dim=1).values
        assert figures[f"{prefix}max_confidence"] == pytest.approx(highest.mean().item(), rel=1e-4)
        assert figures[f"{prefix}artifact_frequency"] == pytest.approx((highest >= 0.5).float().mean().item())
        assert figures[f"{prefix}area_ratio"] == pytest.approx((maps >= 0.5).float().mean().item(), abs=1e-6)
    assert figures["eval_reward"] == pytest.approx(1 - figures["eval_max_confidence"], rel=1e-4)
    assert figures["eval_brightness"] == pytest.approx(images.mean().item(), rel=1e-5)
    assert seen[0][1] == prompts and seen[0][0].shape == (5, 3, 16, 16)
    again = trainer.evaluate()
    assert {name: again[name] for name in figures if "second" not in name and "runtime" not in name} == {
        name: figures[name] for name in figures if "second" not in name and "runtime" not in name
    }


def test_evaluation_does_not_change_the_training(tmp_path):
    common = {"max_steps": 3, "lora_dropout": 0.3, "log_images": 2}
    plain = tiny_trainer(tmp_path / "plain", parts={"eval_dataset": rows(HELD_OUT)}, **common)
    plain.train()
    evaluated = tiny_trainer(tmp_path / "eval", parts={"eval_dataset": rows(HELD_OUT)}, **common | EVERY_STEP)
    evaluated.train()
    assert_same(lora_of(plain), lora_of(evaluated))


def test_pictures_log_and_report(tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        parts={"eval_dataset": rows(HELD_OUT), "judge": tiny_detector(7)},
        report=True,
        report_to=["tensorboard"],
        log_images=2,
        **EVERY_STEP | {"max_steps": 2, "eval_on_start": True},
    )
    trainer.train()
    sizes = {Image.open(tmp_path / f"eval/step-{step}.png").size for step in (0, 1, 2)}
    assert len(sizes) == 1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == trainer.state.log_history
    assert [line["step"] for line in lines if "eval_judge_artifact_frequency" in line] == [0, 1, 2]
    html = (tmp_path / "training_report.html").read_text()
    assert "data:image/" in html and "Step 2" in html and "untreated → step 2, by the judge" in html
    judged = [line["eval_judge_artifact_frequency"] for line in lines if "eval_judge_artifact_frequency" in line]
    assert f"{judged[0]:.1%} → {judged[-1]:.1%}" in html
    (events,) = (tmp_path / "runs").iterdir()
    log = EventAccumulator(str(events), size_guidance={"images": 0}).Reload()
    assert [event.step for event in log.Images("eval/images")] == [0, 1, 2]
    assert "train/loss/pixel" in log.Tags()["scalars"] and "eval/max_confidence" in log.Tags()["scalars"]


def test_the_training_report_says_which_steps_it_compares(tmp_path):
    """Without `eval_on_start` its first figure is that of a pipeline already treated."""
    log = [{"step": step, "eval_reward": reward} for step, reward in ((5, -0.153), (10, -0.2), (20, -0.091))]
    html = write_training_report(tmp_path, log, "Treatment").read_text()
    assert "-0.153 → -0.091" in html and "step 5 → step 20" in html and "untreated" not in html
    assert 'class="figure good"' in html
    worse = write_training_report(tmp_path, log[::-1], "Treatment").read_text()
    assert 'class="figure bad"' in worse


def test_the_best_lora_is_kept_and_training_stops_when_it_gets_worse(tmp_path):
    judged = iter([0.1, 0.5, 0.2, 0.3, 0.4, 0.5, 0.6])  # the first is that of the untreated pipeline

    def hand_written(images, prompts):
        return {"judged": next(judged)}

    trainer = tiny_trainer(
        tmp_path,
        parts={
            "eval_dataset": rows(HELD_OUT),
            "compute_metrics": hand_written,
            "callbacks": [EarlyStoppingCallback(early_stopping_patience=2)],
        },
        **EVERY_STEP | {"max_steps": 6},
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="judged",
        greater_is_better=False,
        ema_decay=0.9,
    )
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.state.best_metric == 0.2
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    best = load_file(tmp_path / "checkpoint-2/pytorch_lora_weights.safetensors")
    assert_same({f"transformer.{name}": value for name, value in lora_of(trainer).items()}, best)
    trainer.save_model()
    assert_same(load_file(tmp_path / "pytorch_lora_weights.safetensors"), best)


def pixels(folder, side, count):
    """The card's pictures, (B, 3, H, W) in [0, 1]."""
    images = [np.array(Image.open(folder / f"images/{side}_{i}.png")) for i in range(count)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def test_the_card_of_the_best_lora_tells_of_that_lora(tmp_path):
    """Figures, pictures and step, though the run went on and got worse."""
    judged = iter([0.9, 0.5, 0.2, 0.3, 0.4])
    parts = {"eval_dataset": rows(HELD_OUT), "compute_metrics": lambda images, prompts: {"judged": next(judged)}}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "judged", "greater_is_better": False}
    saved = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 0.3, "log_images": 2, "ema_decay": 0.5}
    trainer = tiny_trainer(tmp_path, parts=parts, **EVERY_STEP | {"max_steps": 4}, **best, **saved)
    last = []

    class AtTheEnd(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                last.append(trainer.generate(HELD_OUT[:2], [1234, 1235]))

    trainer.add_callback(AtTheEnd())
    trainer.train()
    trainer.save_model()
    of_best = trainer.generate(HELD_OUT[:2], [1234, 1235])
    assert (last[0] - of_best).abs().max() > 0.01
    assert (pixels(tmp_path, "after", 2) - of_best).abs().max() < 0.003  # 8 bits
    assert (
        pixels(tmp_path, "before", 2) - trainer.generate(HELD_OUT[:2], [1234, 1235], treated=False)
    ).abs().max() < 0.003
    entries = {entry["step"]: entry for entry in trainer.state.log_history if "eval_reward" in entry}
    card = (tmp_path / "README.md").read_text()
    assert f"| reward | {entries[0]['eval_reward']:.4g} | {entries[2]['eval_reward']:.4g} |" in card
    assert "| figure | step 0 | step 2 |" in card and "| `updates` | 2 |" in card
    assert json.loads((tmp_path / "treatment.json").read_text())["step"] == 2


def test_a_card_written_after_the_last_evaluation_says_so(tmp_path):
    class StopAt3(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    parts = {"eval_dataset": rows(HELD_OUT), "callbacks": [StopAt3()]}
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.3, "log_images": 1}
    trainer = tiny_trainer(tmp_path, parts=parts, max_steps=8, **evaluated)
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    assert "| figure | step 0 | step 2 |" in card and "The LoRA here was trained further, for 3 steps." in card
    assert (pixels(tmp_path, "after", 1) - trainer.generate(HELD_OUT[:1], [1234])).abs().max() < 0.003


def test_the_untreated_pipeline_is_measured_once_as_step_0(tmp_path):
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    parts = {"eval_dataset": rows(HELD_OUT), "judge": tiny_detector(7)}
    trainer = tiny_trainer(tmp_path, parts=parts, max_steps=2, **evaluated)
    images = trainer.generate(HELD_OUT, [1234, 1235, 1236], treated=False)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["step"] == 0
    for prefix, detector in (("eval_", tiny_detector()), ("eval_judge_", tiny_detector(7))):
        highest = detector.confidence(images).detach().flatten(1).amax(1).mean().item()
        assert first[f"{prefix}max_confidence"] == pytest.approx(highest, rel=1e-4)
    resumed = tiny_trainer(tmp_path, parts=parts, report=True, max_steps=4, **evaluated)
    resumed.train(resume_from_checkpoint=True)
    steps = [entry["step"] for entry in resumed.state.log_history if "eval_reward" in entry]
    assert steps == [0, 2, 4] and resumed.state.log_history[0] == first
    last = resumed.state.log_history[-2]
    assert last["step"] == 4
    report = (tmp_path / "training_report.html").read_text()
    assert f"{first['eval_reward']:.3f} → {last['eval_reward']:.3f}" in report


def test_several_sets_of_held_out_prompts(tmp_path):
    trainer = tiny_trainer(
        tmp_path, parts={"eval_dataset": {"hands": rows(HELD_OUT[:1]), "seen": rows(PROMPTS[:1])}}, log_images=1
    )
    figures = trainer.evaluate()
    assert figures["eval_hands_reward"] != figures["eval_seen_reward"]
    assert (tmp_path / "eval-hands/step-0.png").exists() and (tmp_path / "eval-seen/step-0.png").exists()


SETS = [
    "../../x",
    "a/b",
    "",
    "eval",
    "x" * 300,
    "手",
    "脚",
    "a b",
    "a_b",
    "..",
    "/tmp/y",
    "a\0b",
    "hands",
    "_partial-x",
]


@pytest.mark.slow
def test_names_of_sets_stay_in_the_output_folder(tmp_path):
    folder = tmp_path / "a/b/out"
    parts = {"eval_dataset": {name: rows(HELD_OUT[:1]) for name in SETS}}
    trainer = tiny_trainer(folder, parts=parts, report=True, log_images=1, eval_num_images=1)
    figures = trainer.evaluate()
    assert {f"eval_{name}_reward" for name in SETS if name} | {"eval_reward"} <= figures.keys()
    assert [path for path in tmp_path.rglob("*") if folder not in (path, *path.parents)] == [
        folder.parents[1],
        folder.parent,
    ]
    drawn = [path.relative_to(folder).as_posix() for path in folder.rglob("step-0.png")]
    assert len(drawn) == len(SETS) and all(name.count("/") == 1 for name in drawn)
    assert {"eval/step-0.png", "eval-eval/step-0.png", "eval-hands/step-0.png", "eval-a_b/step-0.png"} <= set(drawn)
    report = (folder / "training_report.html").read_text()
    assert report.count("<h2>Step 0") == len(SETS) and "<h2>Step 0, hands</h2>" in report


def test_a_report_passes_over_what_is_no_picture_of_its_own(tmp_path):
    for name in (
        "eval/step-x.png",
        "eval/step-1-2.png",
        "eval/step--3.png",
        "evaluation/step-4.png",
        "eval/step-5.png",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    report = write_training_report(tmp_path, [], "<b>|title").read_text()
    assert report.count("<h2>") == 1 and "<h2>Step 5</h2>" in report and "<h1>&lt;b&gt;|title</h1>" in report


def test_a_reward_without_a_map_is_evaluated_by_its_score(tmp_path):
    def redness(images, prompts):
        return images[:, 0].mean(dim=(1, 2))

    parts = {"eval_dataset": rows(HELD_OUT), "reward_funcs": redness, "regularization_dataset": None}
    trainer = tiny_trainer(tmp_path, parts=parts, log_images=2)
    figures = trainer.evaluate()
    images = trainer.generate(HELD_OUT, [1234, 1235, 1236])
    assert figures["eval_reward"] == pytest.approx(images[:, 0].mean().item(), rel=1e-5)
    assert "eval_artifact_frequency" not in figures
    assert (tmp_path / "eval/step-0.png").exists()


def test_the_model_card_says_what_was_done(tmp_path):
    trainer = tiny_trainer(
        tmp_path / "healed",
        parts={"eval_dataset": rows([*HELD_OUT, "a | b"]), "judge": tiny_detector(7)},
        log_images=2,
        hub_model_id="somebody/healed",
        **EVERY_STEP,
    )
    trainer.base["pipeline"] = "black-forest-labs/FLUX.1-schnell"
    trainer.train()
    trainer.save_model()
    card = ModelCard.load(tmp_path / "healed/README.md")
    assert card.data.base_model == "black-forest-labs/FLUX.1-schnell"
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "text-to-image"
    assert {"diffusers", "lora", "text-to-image", "diffdoctor", "template:diffusion-lora"} <= set(card.data.tags)
    assert [entry["text"] for entry in card.data.widget] == HELD_OUT[:2]
    for entry in card.data.widget:
        assert (tmp_path / "healed" / entry["output"]["url"]).is_file()
    before, after = (Image.open(tmp_path / f"healed/images/{side}_0.png") for side in ("before", "after"))
    assert before.size == after.size == (16, 16)
    for text in (
        'pipe.load_lora_weights("somebody/healed")',
        'DiffusionPipeline.from_pretrained("black-forest-labs/FLUX.1-schnell"',
        "| judge artifact frequency |",
        "rank 2, alpha 2",
        "| `updates` | 3 |",
        "2501.12382",
    ):
        assert text in card.text, text
    record = json.loads((tmp_path / "healed/treatment.json").read_text())
    assert record["step"] == 3 and record["args"]["gradient_fraction"] == 0.25


def test_generate_takes_the_lora_away_and_brings_it_back(tmp_path):
    trainer = tiny_trainer(tmp_path, learning_rate=0.3)
    trained = trained_names(trainer)
    untouched = trainer.generate(PROMPTS[:2], [0, 1])
    trainer.train()
    treated = trainer.generate(PROMPTS[:2], [0, 1])
    assert (treated - untouched).abs().max() > 1e-4
    assert torch.equal(trainer.generate(PROMPTS[:2], [0, 1], treated=False), untouched)
    assert torch.equal(trainer.generate(PROMPTS[:2], [0, 1]), treated)
    assert trained_names(trainer) == trained and len(trained) == len(lora_of(trainer))


def test_a_card_of_ones_own_reward_names_no_detector_and_no_loss_that_was_left_out(tmp_path):
    def redness(images, prompts):
        return images[:, 0].mean(dim=(1, 2))

    trainer = tiny_trainer(tmp_path, parts={"reward_funcs": redness, "regularization_dataset": None}, max_steps=1)
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    assert "without an artifact detector" in card and "detector looked" not in card and "1 x redness" in card
    assert "offline_weight" not in card and "| `offline loss` | left out |" in card and "pixel_threshold" not in card
    trainer = tiny_trainer(tmp_path / "with", max_steps=1)
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "with/README.md").read_text()
    assert "an artifact detector looked" in card and f"| `offline_weight` | {trainer.args.offline_weight} |" in card


def test_a_cards_code_draws_what_the_trainer_draws(tmp_path, monkeypatch):
    """Run as it stands, but for the LoRA's place: size, steps and guidance are those of the training."""
    monkeypatch.chdir(tmp_path)  # a base that is a folder is called by its name
    pipeline = tiny_flux()
    pipeline.save_pretrained(tmp_path / "base")
    trainer = tiny_trainer(tmp_path / "out", str(tmp_path / "base"), learning_rate=0.3, num_inference_steps=3)
    trainer.train()
    trainer.save_model()
    code = (tmp_path / "out/README.md").read_text().partition("```python\n")[2].partition("```")[0]
    assert "height=16, width=16, num_inference_steps=3" in code
    for name, folder in (("your-name/out", "out"), ("base", "base")):
        assert f'("{name}"' in code
        code = code.replace(f'("{name}"', f'("{tmp_path / folder}"')
    exec(code, drawn := {})
    assert drawn["image"].size == (16, 16)
    generator = torch.Generator().manual_seed(5)
    line = code.strip().splitlines()[-1].replace(").images[0]", ", generator=generator, output_type='pt').images[0]")
    exec(line, drawn | {"generator": generator}, again := {})
    assert (again["image"] - trainer.generate([PROMPTS[0]], [5])[0]).abs().max() < 1e-3


def test_without_step_0_no_figure_stands_beside_the_last(tmp_path):
    trainer = tiny_trainer(tmp_path, parts={"eval_dataset": rows(HELD_OUT)}, max_steps=1)
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    assert "| figure | step 1 |" in card and "step 0" not in card
    assert all(
        line.count("|") == 3 for line in card.partition("## Figures")[2].splitlines()[:12] if line.startswith("|")
    )


def test_the_plan_says_where_the_size_comes_from(tmp_path):
    assert "16x16 pixels per update" in tiny_trainer(tmp_path).plan
    plan = tiny_trainer(tmp_path, resolution=None, height=16).plan
    size = tiny_flux().default_sample_size * tiny_flux().vae_scale_factor
    assert f"16x{size} pixels (the pipeline's default of `width`; `resolution` sets both) per update" in plan
