# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Two processes on the CPU (gloo) do what one does with twice the batch. The loss's gradients must not stay local."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fixtures.trainer import HELD_OUT, lora_of, rows, scatter, tiny_detector, tiny_trainer


TESTS = Path(__file__).parents[1]
# SGD without clipping, so that a gradient of half the size would be seen, and a LoRA that changes something from the start,
# so that the drift has its share in it. Evaluation in between switches the LoRA off and on.
RUN = {
    "max_steps": 3,
    "gradient_accumulation_steps": 2,
    "optim": "sgd",
    "learning_rate": 10.0,
    "max_grad_norm": 0.0,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "log_images": 2,
    "ema_decay": 0.5,
    "drift_weight": 30.0,
    "save_strategy": "steps",
    "save_steps": 2,
}
PARTS = {"eval_dataset": rows(HELD_OUT), "compute_metrics": lambda images, prompts: {"mean": images.mean()}}

PROCESS = """
import sys
import torch
from fixtures.trainer import lora_of, scatter, tiny_detector, tiny_trainer
from test_trainer_distributed import PARTS, RUN

RUN |= {"gradient_placement": sys.argv[2]}
trainer = tiny_trainer(sys.argv[1], parts=PARTS | {"judge": tiny_detector(7)}, per_device_train_batch_size=1, **RUN)
assert trainer.accelerator.num_processes == 2 and torch.distributed.get_backend() == "gloo"
scatter(trainer)
start = lora_of(trainer)
trainer.train(*sys.argv[3:])
trainer.save_model()
result = {"start": start, "end": lora_of(trainer), "log": trainer.state.log_history}
torch.save(result, f"{sys.argv[1]}/rank-{trainer.args.process_index}.pt")
trainer.accelerator.end_training()
"""


def launch(folder, placement, *arguments):
    # the processes import the package from where this one does, wherever another one is installed
    paths = os.pathsep.join([str(TESTS), str(TESTS / "treatment"), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    (folder / "process.py").write_text(PROCESS)
    # what `accelerate launch` calls on GPUs; on CPUs it would ask for MPI
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(folder / "process.py"), str(folder / "run"), placement, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"run/rank-{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.fixture(
    scope="module",
    params=["last", pytest.param("sparse", marks=pytest.mark.slow)],
)
def both(tmp_path_factory, request):
    """Two processes and one, with gradient in the last steps, and in steps drawn at random, each alone."""
    folder, run = tmp_path_factory.mktemp("distributed"), RUN | {"gradient_placement": request.param}
    ranks = launch(folder, request.param)
    one = tiny_trainer(folder / "one", parts=PARTS | {"judge": tiny_detector(7)}, per_device_train_batch_size=2, **run)
    scatter(one)
    start = lora_of(one)
    one.train()
    result = {"start": start, "end": lora_of(one), "log": one.state.log_history}
    return folder, ranks, result | {"placement": request.param}


def test_two_processes_make_the_update_of_one_with_twice_the_batch(both):
    _, ranks, one = both
    for name, value in one["end"].items():
        assert torch.equal(ranks[0]["start"][name], one["start"][name])
        torch.testing.assert_close(ranks[0]["end"][name], value, rtol=1e-3, atol=1e-5)
    assert max((value - one["start"][name]).abs().max() for name, value in one["end"].items()) > 1e-3


def test_the_processes_agree_bit_for_bit(both):
    _, ranks, _ = both
    assert [name for name in ranks[0]["end"] if not torch.equal(ranks[0]["end"][name], ranks[1]["end"][name])] == []


def test_the_log_is_that_of_one_process(both):
    _, ranks, one = both
    compared = 0
    for first, second, expected in zip(ranks[0]["log"], ranks[1]["log"], one["log"]):
        for name, value in expected.items():
            if "runtime" in name or "second" in name:
                continue
            assert first[name] == pytest.approx(value, rel=2e-3, abs=2e-3), name
            assert first[name] == second[name] or name == "loss", name
            compared += 1
    assert compared > 60


@pytest.mark.slow
def test_two_processes_resume(both):
    folder, ranks, one = both
    checkpoint = folder / "run/checkpoint-2"
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"} <= {path.name for path in checkpoint.iterdir()}
    resumed = launch(folder, one["placement"], str(checkpoint))
    for name, value in ranks[0]["end"].items():
        assert torch.equal(resumed[0]["end"][name], value)
