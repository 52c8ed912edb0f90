# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Which scale of a LoRA is best: what is measured, what is chosen, and that the written weights draw what was measured."""

import json

import pytest
import torch
from fixtures.pipelines import tiny_flux
from fixtures.trainer import HELD_OUT, scatter, tiny_detector, tiny_trainer

from diffdoctor import main
from diffusers_diffdoctor.rollout import DifferentiableRollout
from diffusers_diffdoctor.treatment.adapter import load_saved_lora
from diffusers_diffdoctor.treatment.sweep import (
    SavedTreatment,
    ScaleFigures,
    best_scale,
    sweep_scales,
    write_scaled,
)


@pytest.fixture(scope="module")
def treated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("treated")
    trainer = tiny_trainer(
        folder / "lora", max_steps=1, parts={"regularization_dataset": None}, free_text_encoders=False
    )
    scatter(trainer, 1.0)
    trainer.save_model()
    images = {scale: trainer.generate(HELD_OUT[:2], [5, 6], treated=scale == 1) for scale in (0, 1)}
    tiny_flux().save_pretrained(folder / "pipeline")
    return folder, images


def test_a_saved_treatment_draws_at_any_scale(treated):
    folder, images = treated
    saved = SavedTreatment(str(folder / "pipeline"), folder / "lora")
    for scale in (0, 1):
        torch.testing.assert_close(saved.draw(scale, HELD_OUT[:2], [5, 6]), images[scale], rtol=0, atol=2e-5)
    assert (images[0] - images[1]).abs().mean() > 1e-3
    for layer in saved.layers:  # half of it, in another way
        for factor in layer.lora_B.values():
            factor.weight.data *= 0.5
    half = saved.draw(1, HELD_OUT[:2], [5, 6])
    for layer in saved.layers:
        for factor in layer.lora_B.values():
            factor.weight.data *= 2
    torch.testing.assert_close(saved.draw(0.5, HELD_OUT[:2], [5, 6]), half, rtol=0, atol=2e-5)


class Judge:
    """The confidence is the image's brightness."""

    def confidence(self, images):
        return images.mean(1, keepdim=True)


def test_the_figures_are_those_of_the_images():
    prompts = ["a", "a", "b", "b"]

    def draw(scale):  # at scale 1 half of the images are bright, at 2 none; at 2 all seeds are one image
        bright = {0.0: [0.9, 0.8, 0.9, 0.8], 1.0: [0.9, 0.2, 0.9, 0.2], 2.0: [0.1, 0.1, 0.1, 0.1]}[scale]
        return torch.tensor(bright).view(4, 1, 1, 1).expand(4, 3, 4, 4)

    found = sweep_scales(
        draw,
        [2, 1],
        prompts,
        Judge(),
        fidelity=lambda images, prompts: images.mean((1, 2, 3)) * 0 + len(prompts),
        features=lambda images: images.mean((1, 2, 3))[:, None],
        batch_size=3,
    )
    assert [(one.scale, one.frequency) for one in found] == [(0.0, 1.0), (1.0, 0.5), (2.0, 0.0)]
    assert [round(one.diversity, 5) for one in found] == [0.1, 0.7, 0.0]
    assert found[0].fidelity == pytest.approx(2.5)  # three and one
    assert best_scale(found).scale == 1.0
    with pytest.raises(ValueError, match=r"`scales` is \[0\]"):
        sweep_scales(draw, [0], prompts, Judge())


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ([(0, 0.8, 30.0), (0.5, 0.4, 29.9), (1, 0.1, 29.0)], 0.5),
        ([(0, 0.8, 30.0), (0.5, 0.1, 30.0), (1, 0.1, 31.0)], 0.5),
        ([(0, 0.8, None), (0.5, 0.4, None), (1, 0.1, None)], 1),
        ([(0, 0.1, 30.0), (0.5, 0.4, 30.0)], 0),
    ],
)
def test_the_best_scale_heals_most_of_those_that_keep_fidelity(figures, expected):
    assert best_scale([ScaleFigures(*one) for one in figures]).scale == expected


def test_the_written_lora_is_the_best_scale_and_says_so(treated, tmp_path, capsys):
    folder, _ = treated
    tiny_detector(1).save_pretrained(tmp_path / "judge")
    (tmp_path / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in HELD_OUT[:2]))
    figures = [ScaleFigures(0, 0.9), ScaleFigures(0.5, 0.3), ScaleFigures(1, 0.4)]
    write_scaled(folder / "lora", tmp_path / "scaled", figures)
    half = SavedTreatment(str(folder / "pipeline"), folder / "lora").draw(0.5, HELD_OUT[:1], [5])
    plain = tiny_flux()
    load_saved_lora(plain, "transformer", str(tmp_path / "scaled"))
    size = {"height": half.shape[2], "width": half.shape[3], "max_sequence_length": 16}
    steps = json.loads((folder / "lora/treatment.json").read_text())["args"]["num_inference_steps"]
    drawn = DifferentiableRollout(plain, num_inference_steps=steps, **size).generate(HELD_OUT[:1], [5])
    torch.testing.assert_close(drawn, half, rtol=0, atol=2e-5)
    card = (tmp_path / "scaled/README.md").read_text()
    assert "times 0.5" in card and "| **0.5** | 30.0% |" in card and card.count("## Which scale") == 1
    assert [one["scale"] for one in json.loads((tmp_path / "scaled/scales.json").read_text())] == [0, 0.5, 1]
    for wrong, message in (
        ((folder / "lora", figures), "the folder of the LoRA itself"),
        ((tmp_path / "none", [ScaleFigures(0, 0.1), ScaleFigures(1, 0.5)]), "the untreated pipeline is best"),
    ):
        with pytest.raises(ValueError, match=message):
            write_scaled(folder / "lora", *wrong)
    command = (
        f"export-lora {folder / 'lora'} --sweep 0.5 1 --pipeline {folder / 'pipeline'} --judge {tmp_path / 'judge'}"
    )
    command += f" --prompts {tmp_path / 'prompts.txt'} --images 2 --device cpu --output {tmp_path / 'by_command'}"
    status = main(command.split())
    assert "| scale | judged wrong |" in capsys.readouterr().out
    assert (status == 0) == (tmp_path / "by_command/README.md").is_file()


def test_a_sweep_says_what_it_needs(tmp_path, capsys):
    for rest, message in (("", "needs `--pipeline`"), ("--pipeline p", "needs a `--judge`")):
        assert main(f"export-lora {tmp_path} --sweep 1 {rest}".split()) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"has no LoRA with a treatment\.json"):
        SavedTreatment(tiny_flux(), tmp_path)
