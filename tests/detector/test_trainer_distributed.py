# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Two processes on the CPU (gloo) train and evaluate as one does."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.runs import detector, squares, state_of
from fixtures.segformer import tiny_detector
from fixtures.trainer import assert_same
from PIL import Image

from diffusers_diffdoctor.detector import ArtifactDetectorTrainer, ArtifactDetectorTrainingArguments


TESTS = Path(__file__).parents[1]
# 8 rows are 4 updates of two processes: the run ends, and is resumed, in the middle of its second epoch.
RUN = {
    "max_steps": 7,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 2,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "save_steps": 3,
    "learning_rate": 1e-2,
    "overwrite_output_dir": True,
}

PROCESS = """
import sys
import torch
from test_trainer_distributed import one_update, run

folder = sys.argv[1]
results = {}
for name, settings in (("average", {}), ("plain", {"ema_decay": None})):
    results[name] = run(f"{folder}/{name}", **settings)
results["resumed"] = run(f"{folder}/average", resume=f"{folder}/average/checkpoint-6")
results["update"] = one_update(f"{folder}/update", batch=2)
torch.save(results, f"{folder}/rank-{results['average']['rank']}.pt")
torch.distributed.destroy_process_group()
"""


def held_out():
    """Seven images of four sizes, with the columns that figures are grouped by."""
    rng, rows = np.random.default_rng(5), []
    for index, size in enumerate([(32, 32), (48, 32), (32, 32), (40, 80), (32, 32), (32, 48), (32, 32)]):
        artifact_map = np.zeros(size, np.uint8)
        if index % 3:
            artifact_map[4:20, 8:24] = 255
        image = rng.integers(0, 256, (*size, 3), np.uint8)
        kind = {
            "category": ["a", "b"][: index % 3],
            "generator": "g" if index else None,
            "source": "human" if index % 3 else "photo",
        }
        rows.append({"image": Image.fromarray(image), "artifact_map": Image.fromarray(artifact_map)} | kind)
    return rows


def run(folder, resume=None, **settings):
    trainer = detector(folder, **RUN | settings)
    trainer.eval_dataset = held_out()
    trainer.train(resume_from_checkpoint=resume)
    return {
        "rank": trainer.args.process_index,
        "world": trainer.args.world_size,
        "state": state_of(trainer),
        "log": [entry for entry in trainer.state.log_history if "eval_mse" in entry],
        "figures": trainer.figures["eval"],
        "worst": [case.number for case in trainer._evaluation.worst.cases],
    }


def one_update(folder, batch):
    """Without batch statistics and dropout, which differ by themselves."""
    model = tiny_detector(image_size=32, drop_path_rate=0.0, classifier_dropout_prob=0.0)
    model.decode_head.batch_norm.train = lambda mode=True: None
    args = ArtifactDetectorTrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0.0,
        per_device_train_batch_size=batch,
        logging_steps=1,
        augmentation="light",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = ArtifactDetectorTrainer(model, args, train_dataset={"a": squares(3), "b": squares(6, seed=1)})
    trainer.train()
    return {"weights": dict(model.named_parameters()), "loss": trainer.state.log_history[0]["loss"]}


def evaluated(checkpoint, batch_size):
    """The figures of a saved detector, on this process."""
    args = ArtifactDetectorTrainingArguments(
        output_dir=str(checkpoint.parent / "evaluated"), per_device_eval_batch_size=batch_size, use_cpu=True
    )
    trainer = ArtifactDetectorTrainer(str(checkpoint), args, eval_dataset=held_out())
    return trainer.evaluate(), trainer.figures["eval"]


def measured(metrics):
    return [name for name in metrics if name.startswith("eval_") and "_per_" not in name and "time" not in name]


def assert_evaluated_as_saved(folder, log, figures):
    assert [entry["step"] for entry in log] == [3, 6, 7]
    for entry in log:
        for batch_size in (1, 8):
            alone, grouped = evaluated(folder / f"checkpoint-{entry['step']}", batch_size)
            names = measured(alone)
            assert len(names) > 20
            assert {name: entry[name] for name in names} == pytest.approx(
                {name: alone[name] for name in names}, rel=1e-4
            )
    for kind in ("categories", "generators"):
        assert figures[kind].keys() == grouped[kind].keys()
        for name, group in figures[kind].items():
            assert group == pytest.approx(grouped[kind][name], rel=1e-4, nan_ok=True)
    assert set(figures["categories"]) == {"a", "b"} and figures["photographs"]["images"] == 3


@pytest.mark.parametrize("ema_decay", [None, 0.9], ids=["plain", "average"])
def test_an_evaluation_in_training_is_that_of_the_saved_weights(tmp_path, ema_decay):
    """Whatever the batch, with images of several sizes."""
    found = run(tmp_path, ema_decay=ema_decay, per_device_train_batch_size=2)
    assert_evaluated_as_saved(tmp_path, found["log"], found["figures"])


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    # the processes import the package from where this one does, wherever another one is installed
    paths = os.pathsep.join([str(TESTS), str(TESTS / "detector"), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    (folder / "process.py").write_text(PROCESS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(folder / "process.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "average"])
def test_two_processes_evaluate_what_they_save(both, kind):
    """The same figures on both, and when the saved weights are evaluated by one process: no row twice, statistics included."""
    folder, ranks = both
    for rank in ranks:
        assert rank[kind]["world"] == 2
        assert_evaluated_as_saved(folder / kind, rank[kind]["log"], rank[kind]["figures"])
    assert all(entry["eval_images"] == 7 for entry in ranks[0][kind]["log"])
    names = measured(ranks[0][kind]["log"][0])
    for entries in zip(*(rank[kind]["log"] for rank in ranks)):
        assert [entries[0][name] for name in names] == pytest.approx([entries[1][name] for name in names], rel=1e-12)


@pytest.mark.slow
def test_the_worst_cases_of_two_processes_are_those_of_one(both, tmp_path):
    folder, ranks = both
    args = ArtifactDetectorTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    trainer = ArtifactDetectorTrainer(str(folder / "plain/checkpoint-7"), args, eval_dataset=held_out())
    trainer.evaluate()
    alone = [case.number for case in trainer._evaluation.worst.cases]
    assert ranks[0]["plain"]["worst"] == alone and sorted(alone) == list(range(7))
    assert (folder / "plain/worst_cases/eval-00000007.png").is_file()


@pytest.mark.slow
def test_two_processes_resume_in_the_middle_of_an_epoch(both):
    """Sampler, augmentation, average, optimizer: to the bit, on both."""
    for rank in both[1]:
        whole, resumed = dict(rank["average"]["state"]), dict(rank["resumed"]["state"])
        if rank["average"]["rank"]:  # its batch statistics are the first one's before each update
            whole, resumed = (
                {name: value for name, value in state.items() if "running" not in name and "average" not in name}
                for state in (whole, resumed)
            )
        assert_same(whole, resumed)


@pytest.mark.slow
def test_two_processes_make_the_update_of_one_with_twice_the_batch(both, tmp_path):
    alone = one_update(tmp_path, batch=4)
    start = dict(tiny_detector(image_size=32).named_parameters())
    for rank in both[1]:
        for name, value in alone["weights"].items():
            torch.testing.assert_close(rank["update"]["weights"][name], value, rtol=1e-4, atol=1e-6)
        assert rank["update"]["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert max((value - start[name]).abs().max() for name, value in alone["weights"].items()) > 1e-3
