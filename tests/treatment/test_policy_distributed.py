# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Two processes on the CPU (gloo) make the policy updates of one with twice the batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fixtures.policy import tiny_ddpo, tiny_dpo
from fixtures.trainer import lora_of, scatter


TESTS = Path(__file__).parents[1]
# SGD without clipping, so that a gradient of half the size would be seen. A prompt's images are spread over both processes.
DDPO = {
    "max_steps": 3,
    "passes": 2,
    "gradient_accumulation_steps": 2,
    "num_images_per_prompt": 4,
    "optim": "sgd",
    "learning_rate": 100.0,
    "max_grad_norm": 0.0,
    "clip_range": 0.1,
    "kl_weight": 1.0,
}

DPO = {
    "max_steps": 3,
    "gradient_accumulation_steps": 2,
    "optim": "sgd",
    "learning_rate": 0.01,
    "max_grad_norm": 0.0,
}

PROCESS = """
import sys
import torch
from fixtures.policy import *
from fixtures.trainer import lora_of, scatter
from test_policy_distributed import *

trainer = {make}(sys.argv[1], per_device_train_batch_size=1, **{settings})
assert trainer.accelerator.num_processes == 2 and torch.distributed.get_backend() == "gloo"
scatter(trainer)
trainer.train()
result = {{"end": lora_of(trainer), "log": trainer.state.log_history}}
torch.save(result, f"{{sys.argv[1]}}/rank-{{trainer.args.process_index}}.pt")
trainer.accelerator.end_training()
"""


def launch(folder, make, settings):
    # the processes import the package from where this one does, wherever another one is installed
    paths = os.pathsep.join([str(TESTS), str(TESTS / "treatment"), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    (folder / "process.py").write_text(PROCESS.format(make=make, settings=settings))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(folder / "process.py"), str(folder / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"run/rank-{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize(
    "make, settings",
    [pytest.param(tiny_ddpo, "DDPO", id="ddpo"), pytest.param(tiny_dpo, "DPO", id="dpo", marks=pytest.mark.slow)],
)
def test_two_processes_make_the_updates_of_one_with_twice_the_batch(tmp_path, make, settings):
    ranks = launch(tmp_path, make.__name__, settings)
    one = make(tmp_path / "one", per_device_train_batch_size=2, **globals()[settings])
    scatter(one)
    start = lora_of(one)
    one.train()
    end = lora_of(one)
    moved = torch.cat([(end[name] - start[name]).flatten() for name in end])
    difference = torch.cat([(ranks[0]["end"][name] - end[name]).flatten() for name in end])
    assert moved.norm() > 1e-3 and difference.norm() < 5e-3 * moved.norm(), (moved.norm(), difference.norm())
    assert all(torch.equal(ranks[0]["end"][name], ranks[1]["end"][name]) for name in end)
    for first, second, expected in zip(ranks[0]["log"], ranks[1]["log"], one.state.log_history):
        for name, value in expected.items():
            if "runtime" not in name and "second" not in name:
                assert first[name] == pytest.approx(value, rel=1e-2, abs=1e-4), name
                assert first[name] == second[name] or name in ("loss", "train_loss"), name
