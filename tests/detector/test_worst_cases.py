# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
import torch
from fixtures.runs import detector, squares
from fixtures.segformer import tiny_detector
from PIL import Image

from diffusers_diffdoctor.detector import ArtifactDetectorTrainer, ArtifactDetectorTrainingArguments
from diffusers_diffdoctor.detector.worst_cases import PICTURES, WorstCases, write_picture
from diffusers_diffdoctor.pictures import MARGIN
from diffusers_diffdoctor.training.pushing import NOT_UPLOADED


def case(number, error, shade=0.5, size=(8, 12)):
    return number, error, torch.full((3, *size), shade), torch.zeros(1, *size), torch.zeros(1, *size)


def test_the_worst_are_kept_whatever_the_order_and_the_process():
    errors = np.random.default_rng(0).permutation(30) / 30
    whole, parts = WorstCases(5), [WorstCases(5), WorstCases(5)]
    for number, error in enumerate(errors):
        whole.add(*case(number, error))
        parts[number % 2].add(*case(number, error))
    parts[0].merge(parts[1])
    expected = np.argsort(-errors)[:5].tolist()
    assert [found.number for found in whole.cases] == [found.number for found in parts[0].cases] == expected
    nothing = WorstCases(0)
    nothing.add(*case(0, 1.0))
    assert nothing.cases == [] and write_picture(nothing, "nowhere", "eval", 1) is None


def test_large_images_are_kept_small_and_what_does_not_count_as_sound():
    cases = WorstCases(1)
    truth = torch.full((1, 900, 450), -1.0)
    truth[:, :450] = 1
    cases.add(3, 0.25, torch.rand(3, 1024, 512), truth, torch.full((1, 900, 450), 0.5))
    (found,) = cases.cases
    assert found.image.shape == (3, 256, 128) and found.truth.shape == found.confidence.shape == (1, 256, 128)
    assert found.truth[0, 0].min() == 255 and found.truth[0, -1].max() == 0
    assert found.caption == "row 3: error 0.2500, highest confidence 0.50, in truth 1.00"


def test_the_picture_shows_image_truth_and_diagnosis(tmp_path):
    cases = WorstCases(2)
    _, _, image, truth, confidence = case(0, 0.1, shade=0.5, size=(192, 192))
    truth[:, :96], confidence[:, 96:] = 1, 1
    cases.add(0, 0.1, image, truth, confidence)
    path = write_picture(cases, tmp_path, "eval", 7)
    assert path == tmp_path / "worst_cases/eval-00000007.png"
    picture = np.asarray(Image.open(path)).astype(int)
    tiles = [picture[-MARGIN - 192 : -MARGIN, x : x + 192] for x in (12, 12 + 196, 12 + 2 * 196)]
    assert np.abs(tiles[0] - 128).max() <= 1  # the image itself
    red = [tile[..., 0] - tile[..., 1] > 60 for tile in tiles]
    assert red[1][:90].all() and not red[1][100:].any()
    assert red[2][100:].all() and not red[2][:90].any()


def test_old_pictures_make_room(tmp_path):
    cases = WorstCases(1)
    cases.add(*case(0, 0.1))
    for step in range(PICTURES + 3):
        write_picture(cases, tmp_path, "eval_a", step)
    write_picture(cases, tmp_path, "eval_b", 0)
    names = sorted(path.name for path in (tmp_path / "worst_cases").iterdir())
    assert len(names) == PICTURES + 1 and names[0] == "eval_a-00000003.png" and names[-1] == "eval_b-00000000.png"


def test_an_evaluation_draws_the_rows_of_highest_error(tmp_path):
    rows = [row | {"category": ["square"] if i % 2 == 0 else []} for i, row in enumerate(squares(7))]
    trainer = ArtifactDetectorTrainer(
        tiny_detector(image_size=32),
        ArtifactDetectorTrainingArguments(
            output_dir=str(tmp_path), per_device_eval_batch_size=2, worst_cases=3, use_cpu=True
        ),
        eval_dataset={"a b": rows},
        compute_metrics=lambda prediction: {"errors": prediction.predictions[:, 0].tolist()},
    )
    errors = trainer.evaluate()["eval_a b_errors"]
    assert [found.number for found in trainer._evaluation.worst.cases] == np.argsort(-np.array(errors))[:3].tolist()
    (path,) = (tmp_path / "worst_cases").iterdir()
    assert path.name.startswith("eval_a_b") and path.name.endswith("-00000000.png")
    assert trainer.figures["eval_a b"]["categories"]["square"]["images"] == 4


def test_pictures_are_of_this_run_and_stay_here(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 2, "max_steps": 3, "worst_cases": 2}
    trainer = detector(tmp_path, **settings)
    trainer.train()
    steps = [path.name for path in sorted((tmp_path / "worst_cases").iterdir())]
    assert steps == [f"eval-0000000{step}.png" for step in (1, 2, 3)]
    resumed = detector(tmp_path, **settings | {"max_steps": 2, "overwrite_output_dir": True})
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not (tmp_path / "worst_cases/eval-00000003.png").exists()
    assert (tmp_path / "worst_cases/eval-00000002.png").exists()
    assert any(pattern == "worst_cases/*" for pattern in NOT_UPLOADED)


@pytest.mark.parametrize("changes", [{"worst_cases": -1}, {"threshold": 0.0}])
def test_bad_settings_are_refused(tmp_path, changes):
    (name,) = changes
    with pytest.raises(ValueError, match=f"`{name}`"):
        ArtifactDetectorTrainingArguments(output_dir=str(tmp_path), **changes)
