# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from fixtures.runs import squares
from fixtures.segformer import tiny_detector
from torch.utils.data import BatchSampler, DataLoader

from diffusers_diffdoctor.detector import (
    ArtifactDetectorCollator,
    ArtifactDetectorTrainer,
    ArtifactDetectorTrainingArguments,
)
from diffusers_diffdoctor.detector.sampling import DRAW, DrawnRows, EpochSampler, GroupSampler, groups_of


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
        augmentation="strong",
        shrink_probability=0.5,
        crop_probability=0.5,
        image_size_min=32,
        image_size_max=64,
        learning_rate=1e-3,
        max_steps=5,
        save_steps=3,
        save_strategy="steps",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **changes,
    )
    trainer = ArtifactDetectorTrainer(
        tiny_detector(image_size=32, classifier_dropout_prob=0.3), args, squares(4, side=48)
    )
    torch.manual_seed(0)
    trainer.train(resume_from_checkpoint=resume)
    # torch waits five seconds for each worker whose loader is collected as part of a cycle
    trainer.callback_handler.train_dataloader.base_dataloader._iterator = None
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


# --- groups --------------------------------------------------------------------------------------------------------------


def numbers(sampler, epoch):
    sampler.epoch = epoch
    draws = list(sampler)
    assert [draw.place for draw in draws] == list(range(len(sampler))) and {draw.epoch for draw in draws} == {epoch}
    return [draw.number for draw in draws]


def test_sources_are_drawn_by_their_weights_and_each_row_before_any_again():
    sources = ["human"] * 7 + ["photo"] * 40 + ["pseudo"] * 53
    sampler = GroupSampler(groups_of(sources, weights={"human": 1, "photo": 2, "pseudo": 1}), 100, seed=5)
    seen = {"human": [], "photo": [], "pseudo": []}
    for epoch in range(3):
        order = numbers(sampler, epoch)
        for number in order:
            seen[sources[number]].append(number)
        assert {name: len(rows) for name, rows in seen.items()} == {
            name: (epoch + 1) * count for name, count in (("human", 25), ("photo", 50), ("pseudo", 25))
        }
        assert len({sources[number] for number in order[:20]}) == 3  # mixed, not one after the other
    for name, rows in seen.items():
        size = sources.count(name)
        for start in range(0, len(rows) - size + 1, size):
            assert len(set(rows[start : start + size])) == size, name
    assert seen["human"][:7] != seen["human"][7:14]


def test_the_order_follows_from_seed_and_epoch_alone():
    groups = groups_of(["a"] * 5 + ["b"] * 20, weights={"a": 0.5, "b": 0.5})
    first, again, other = (GroupSampler(groups, 25, seed) for seed in (0, 0, 1))
    later = numbers(first, 3)
    assert numbers(again, 3) == later and numbers(first, 3) == later
    assert numbers(other, 3) != later != numbers(first, 2)


def test_shares_are_rounded_to_whole_draws_that_add_up():
    for weights in ([1, 1, 1], [3, 2, 2], [0.1, 0.6, 0.3], [5, 1, 1]):
        names = ["a", "b", "c"]
        sampler = GroupSampler(groups_of(names * 3 + ["a"], weights=dict(zip(names, weights))), 10)
        assert sum(sampler.draws) == 10
        for draws, weight in zip(sampler.draws, weights):
            assert abs(draws - 10 * weight / sum(weights)) < 1


def test_classes_of_a_source_are_drawn_equally():
    """A row of two classes is drawn as one of each; rows without one are a class."""
    classes = [["hand"]] * 6 + [["hand", "face"]] * 2 + [[]] * 12
    sampler = GroupSampler(groups_of(None, classes), 300)
    order = numbers(sampler, 0)
    counts = [order.count(number) for number in range(20)]
    assert sampler.draws == [100, 100, 100] and [group.name for group in sampler.groups] == [
        "no class",
        "face",
        "hand",
    ]
    assert all(count in (12, 13) for count in counts[:6])  # an eighth of the hands
    assert all(62 <= count <= 63 for count in counts[6:8])  # and half of the faces
    assert all(count in (8, 9) for count in counts[8:])
    assert "face: 2 rows, 100 draws an epoch (33.3 %), each row 50 times" in sampler.plan()


def test_weights_and_classes_together():
    sources = ["photo"] * 3 + ["human"] * 4
    classes = [[], [], [], ["a"], ["a"], ["a"], ["b"]]
    groups = groups_of(sources, classes, {"photo": 1, "human": 3})
    assert [(group.name, group.share, group.rows.tolist()) for group in groups] == [
        ("human / a", 3 / 8, [3, 4, 5]),
        ("human / b", 3 / 8, [6]),
        ("photo / no class", 1 / 4, [0, 1, 2]),
    ]
    assert [group.name for group in groups_of(sources, None, {"photo": 0, "human": 2})] == ["human"]


def test_weights_that_fit_no_source_are_named():
    with pytest.raises(
        ValueError, match=r"weights of \['humans', 'photo'\], but the sources are \['human', 'photo'\]"
    ):
        groups_of(["human", "photo"], weights={"humans": 1, "photo": 1})
    with pytest.raises(ValueError, match=r"sources are \['None', 'human'\]"):
        groups_of(["human", None], weights={"human": 1})
    with pytest.raises(ValueError, match=r"'human' gets a share of 0\.001 of the 100 draws of an epoch"):
        GroupSampler(groups_of(["human"] * 50 + ["photo"] * 50, weights={"human": 0.001, "photo": 0.999}), 100)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_batches_of_one(processes):
    """By accelerate's own class: what all of them get in a step is what one process with all their batches gets."""
    sampler = GroupSampler(groups_of(["a"] * 6 + ["b"] * 18, weights={"a": 1, "b": 1}), 24)
    sampler.epoch = 2
    shards = [
        list(BatchSamplerShard(BatchSampler(sampler, 2, drop_last=False), processes, rank))
        for rank in range(processes)
    ]
    together = [[draw for batch in batches for draw in batch] for batches in zip(*shards)]
    assert together == list(BatchSampler(sampler, 2 * processes, drop_last=False))


# --- in the trainer ------------------------------------------------------------------------------------------------------


class Recorder(ArtifactDetectorCollator):
    """Keeps the "name" of the rows that it is given."""

    def __init__(self, config):
        super().__init__(config)
        self.names = []

    def __call__(self, rows):
        self.names += [row["name"] for row in rows]
        return super().__call__(rows)


def named(count, name, **columns):
    """Every second one has an artifact."""
    return [row | {"name": f"{name} {i}"} | columns for i, row in enumerate(squares(count))]


def names_of_an_epoch(folder, train_dataset, num_train_epochs=1, **settings):
    model = tiny_detector(image_size=32)
    recorder = Recorder(model.config)
    args = ArtifactDetectorTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        num_train_epochs=num_train_epochs,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    ArtifactDetectorTrainer(model, args, train_dataset, data_collator=recorder).train()
    return recorder.names


@pytest.mark.parametrize("as_column", [False, True], ids=["dictionary", "column"])
def test_datasets_are_mixed_by_their_weights(tmp_path, as_column):
    data = {"human": named(3, "human", source="human"), "photo": named(9, "photo", source="photo")}
    data = data["human"] + data["photo"] if as_column else data
    names = names_of_an_epoch(tmp_path, data, source_weights='{"human": 2, "photo": 1}')
    human = [name for name in names if name.startswith("human")]
    photo = [name for name in names if name.startswith("photo")]
    assert len(human) == 8 and sorted(human[:3]) == sorted(set(human)) and len(photo) == len(set(photo)) == 4


def test_a_dictionary_without_weights_is_every_row_once_an_epoch_in_another_order(tmp_path):
    names = names_of_an_epoch(tmp_path, {"a": named(3, "a"), "b": named(5, "b")}, num_train_epochs=2)
    assert sorted(names[:8]) == sorted(names[8:]) == [*(f"a {i}" for i in range(3)), *(f"b {i}" for i in range(5))]
    assert names[:8] != names[8:]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_images_with_and_without_artifacts_are_balanced(tmp_path, workers):
    rows = [row for i, row in enumerate(named(16, "row")) if i % 2 == 0 or i == 1]  # 8 with, 1 without
    names = names_of_an_epoch(tmp_path, rows, balance="artifacts", dataloader_num_workers=workers)
    if workers == 0:  # the recorder's list stays in the workers
        assert names.count("row 1") in (4, 5) and len(names) == 9


def test_categories_are_balanced(tmp_path):
    rows = Dataset.from_list(
        named(6, "a", category=["a"]) + named(2, "b", category=["b"]),
        features=Features(
            {
                "image": ImageFeature(),
                "artifact_map": ImageFeature(),
                "name": Value("string"),
                "category": List(Value("string")),
            }
        ),
    )
    names = names_of_an_epoch(tmp_path, rows, balance="category")
    assert sum(name.startswith("a") for name in names) == sum(name.startswith("b") for name in names) == 4


def test_weights_and_columns_that_do_not_fit_are_refused_before_training(tmp_path):
    def trainer(data, **settings):
        args = ArtifactDetectorTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **settings)
        return ArtifactDetectorTrainer(tiny_detector(image_size=32), args, data)

    with pytest.raises(ValueError, match=r"weights of \['humans'\], but the sources are \['human'\]"):
        trainer({"human": squares(2)}, source_weights={"humans": 1})
    with pytest.raises(ValueError, match=r"`source_weights` needs a column `source` in `train_dataset`, which has"):
        trainer(squares(2), source_weights={"human": 1})
    with pytest.raises(ValueError, match=r"`balance` needs a column `category`"):
        trainer({"human": squares(2)}, balance="category")
    with pytest.raises(ValueError, match=r"train_dataset\['human'\]` is empty"):
        trainer({"human": []})
    for weights in ("human=1", '{"human": -1}', '{"human": "1"}', "[1, 2]", {"human": float("nan")}):
        with pytest.raises(ValueError, match="`source_weights` must give each source a number of at least 0"):
            trainer(squares(2), source_weights=weights)
    with pytest.raises(ValueError, match="must have a weight above 0"):
        trainer(squares(2), source_weights={"human": 0})
    with pytest.raises(ValueError, match="`balance` must be category or artifacts"):
        trainer(squares(2), balance="classes")
    with pytest.raises(ValueError, match="draw at random"):
        trainer(squares(2), balance="artifacts", train_sampling_strategy="sequential")
    stream = Dataset.from_list([{"image": 1, "artifact_map": 1, "source": "human"}]).to_iterable_dataset()
    with pytest.raises(ValueError, match="rows can be asked for by their number, found IterableDataset"):
        trainer(stream, source_weights={"human": 1}, max_steps=1)
    with pytest.raises(ValueError, match="A dictionary of sources needs a `train_dataset` whose rows"):
        trainer({"human": stream}, max_steps=1)


def test_weights_do_not_stand_in_the_way_of_an_evaluation(tmp_path):
    args = ArtifactDetectorTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, source_weights={"human": 1}, balance="category"
    )
    trainer = ArtifactDetectorTrainer(tiny_detector(image_size=32), args, eval_dataset=squares(2))
    assert trainer.evaluate()["eval_images"] == 2


def test_a_stream_is_trained_on_in_its_own_order(tmp_path):
    rows = Dataset.from_list(
        [{key: row[key] for key in ("image", "artifact_map", "name")} for row in named(5, "row")],
        features=Features({"image": ImageFeature(), "artifact_map": ImageFeature(), "name": Value("string")}),
    )
    assert names_of_an_epoch(tmp_path, rows.to_iterable_dataset(), max_steps=1)[:4] == [f"row {i}" for i in range(4)]
