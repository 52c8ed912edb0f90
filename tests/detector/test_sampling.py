# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from fixtures.runs import squares
from fixtures.segformer import tiny_detector
from torch.utils.data import DataLoader

from diffusers_diffdoctor.detector import ArtifactDetectorTrainer, ArtifactDetectorTrainingArguments
from diffusers_diffdoctor.detector.sampling import DRAW, DrawnRows, EpochSampler


def test_every_row_comes_once_an_epoch_in_an_order_of_its_own():
    sampler = EpochSampler(50, seed=3)
    first = list(sampler)
    assert list(sampler) == first == list(EpochSampler(50, seed=3))
    sampler.epoch = 1
    second = list(sampler)
    for epoch, draws in enumerate((first, second)):
        assert sorted(draw.number for draw in draws) == list(range(50)) == [draw.place for draw in draws]
        assert {draw.epoch for draw in draws} == {epoch}
    orders = [[draw.number for draw in draws] for draws in (first, second, EpochSampler(50, seed=4))]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert [draw.number for draw in EpochSampler(5, shuffle=False)] == list(range(5))


def same(rows):
    return rows


def test_rows_carry_their_draw_into_workers_that_persist():
    sampler = EpochSampler(4)
    loader = DataLoader(
        DrawnRows([{"value": number} for number in range(4)]),
        sampler=sampler,
        batch_size=2,
        num_workers=2,
        persistent_workers=True,
        collate_fn=same,
    )
    for epoch in range(3):
        sampler.epoch = epoch
        rows = [row for batch in loader for row in batch]
        assert [row[DRAW] for row in rows] == list(sampler) and {row[DRAW].epoch for row in rows} == {epoch}
        assert all(row["value"] == row[DRAW].number for row in rows)


def trained(folder, resume=False, **changes):
    args = ArtifactDetectorTrainingArguments(
        output_dir=str(folder),
        overwrite_output_dir=True,
        per_device_train_batch_size=2,
        flip_probability=0.5,
        jpeg_probability=0.5,
        learning_rate=1e-3,
        max_steps=5,
        save_steps=3,
        save_strategy="steps",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **changes,
    )
    trainer = ArtifactDetectorTrainer(tiny_detector(image_size=32, classifier_dropout_prob=0.3), args, squares(4))
    torch.manual_seed(0)
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model.state_dict()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than there are cores
def test_workers_change_nothing(tmp_path):
    """Three epochs with dropout, in workers that live through all of them; and resumed in the middle of one."""
    plain = trained(tmp_path / "plain")
    settings = {"dataloader_num_workers": 4, "dataloader_persistent_workers": True}
    beside = trained(tmp_path / "workers", **settings)
    resumed = trained(tmp_path / "workers", resume=str(tmp_path / "workers/checkpoint-3"), **settings)
    for name, value in plain.items():
        assert torch.equal(value, beside[name]) and torch.equal(value, resumed[name]), name
    other = trained(tmp_path / "other", data_seed=1)
    assert any(not torch.equal(value, other[name]) for name, value in plain.items())


def test_strategies_that_need_lengths_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"train_sampling_strategy.*group_by_length"):
        ArtifactDetectorTrainingArguments(output_dir=str(tmp_path), train_sampling_strategy="group_by_length")
