# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Sharing while training: every save reaches the Hub, checkpoints too if asked for, nothing pickled beside the LoRA."""

import os
import subprocess
import sys
from pathlib import Path

import hub_server


TESTS = Path(__file__).parents[1]

CODE = """
import os
from fixtures.trainer import tiny_trainer

trainer = tiny_trainer(
    "healed", push_to_hub=True, hub_model_id="user/healed", hub_strategy="checkpoint", hub_always_push=True,
    hub_token=os.environ["HF_TOKEN"],     save_strategy="steps", save_steps=1, max_steps=2,
)
trainer.train()
"""


def test_every_save_is_pushed(tmp_path):
    with hub_server.serve() as hub:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
            "OMP_NUM_THREADS": "1",
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": hub_server.TOKEN,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",  # the Hub here is the test's own
        }
        done = subprocess.run(
            [sys.executable, "-c", CODE], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-4000:]
        files = hub.files("user/healed")
    last = (tmp_path / "healed/checkpoint-2/pytorch_lora_weights.safetensors").read_bytes()
    assert (
        files["pytorch_lora_weights.safetensors"] == files["last-checkpoint/pytorch_lora_weights.safetensors"] == last
    )
    assert {"README.md", "metrics.jsonl", "last-checkpoint/optimizer.pt", "last-checkpoint/trainer_state.json"} <= set(
        files
    )
    assert not [name for name in files if hub_server.TOKEN.encode() in files[name]]
    assert not [name for name in files if name.startswith(("checkpoint-", "_")) or name.endswith("training_args.bin")]
