# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints: whole or not there, continued bit for bit, refused where they do not belong; LoRAs that plain diffusers loads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.pipelines import tiny_flux, tiny_sdxl
from fixtures.trainer import HELD_OUT, PROMPTS, assert_same, lora_of, rows, tiny_trainer
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from diffusers_diffdoctor.training.checkpoints import last_checkpoint


TESTS = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "OMP_NUM_THREADS": "1"}
# Everything that a checkpoint has to bring back: dropout's random numbers, momentum, a schedule, an average, half an epoch.
RUN = {
    "max_steps": 5,
    "gradient_accumulation_steps": 2,
    "lora_dropout": 0.3,
    "gradient_placement": "sparse",
    "ema_decay": 0.9,
    "lr_scheduler_type": "cosine",
    "save_strategy": "steps",
    "save_steps": 2,
}


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def optimizer_state(trainer):
    state = trainer.optimizer.state_dict()["state"]
    return {f"{i}.{key}": torch.as_tensor(value) for i in state for key, value in state[i].items()}


def training_lines(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def assert_same_run(first, second):
    assert_same(lora_of(first), lora_of(second))
    assert_same(optimizer_state(first), optimizer_state(second))
    assert_same(dict(enumerate(first.average.shadow_params)), dict(enumerate(second.average.shadow_params)))
    assert first.lr_scheduler.state_dict() == second.lr_scheduler.state_dict()


@pytest.mark.parametrize("stop", [2, 4], ids=["first-epoch", "at-its-end"])
def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path, stop):
    whole = tiny_trainer(tmp_path / "whole", **RUN)
    whole.train()
    stopped = tiny_trainer(tmp_path / "run", parts={"callbacks": [StopAt(stop + 1)]}, **RUN)
    stopped.train()
    assert stopped.state.global_step == stop + 1  # one step more than was saved: its log must go
    resumed = tiny_trainer(tmp_path / "run", **RUN)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"run/checkpoint-{stop}"))
    assert_same_run(whole, resumed)
    assert training_lines(tmp_path / "run") == training_lines(tmp_path / "whole")
    assert not torch.equal(whole.average.shadow_params[0], whole.trained_parameters[0])


def test_resuming_a_finished_run_trains_no_further(tmp_path):
    finished = tiny_trainer(tmp_path / "run", **RUN | {"max_steps": 3})  # in the middle of an epoch
    finished.train()
    again = tiny_trainer(tmp_path / "run", **RUN | {"max_steps": 3})
    output = again.train(resume_from_checkpoint=True)
    assert output.global_step == again.state.global_step == 3
    assert_same(lora_of(finished), lora_of(again))
    assert_same(dict(enumerate(finished.average.shadow_params)), dict(enumerate(again.average.shadow_params)))
    assert training_lines(tmp_path / "run")[-1]["step"] == 3


KILLED = """
import os
from pathlib import Path
from fixtures.trainer import tiny_trainer
from transformers.trainer_callback import TrainerState
from diffusers_diffdoctor import PixelRewardTrainer

def killed_before_the_rng_state(trainer, folder):
    return os._exit(9) if trainer.state.global_step == 4 else save_rng_state(trainer, folder)

def killed_half_way_through_the_state(state, path):
    save_to_json(state, path)
    if state.global_step == 4:
        Path(path).write_text(Path(path).read_text()[:200])
        os._exit(9)

save_rng_state, save_to_json = PixelRewardTrainer._save_rng_state, TrainerState.save_to_json
if {place!r} == "rng":
    PixelRewardTrainer._save_rng_state = killed_before_the_rng_state
else:
    TrainerState.save_to_json = killed_half_way_through_the_state
tiny_trainer({folder!r}, save_total_limit=1, **{run!r}).train()
"""


@pytest.mark.parametrize("place", [pytest.param("rng", marks=pytest.mark.slow), "state"])
def test_a_run_killed_in_the_middle_of_a_save_resumes_from_the_last_whole_checkpoint(tmp_path, place):
    code = KILLED.format(folder=str(tmp_path / "run"), run=RUN, place=place)
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 9, done.stderr
    left = tmp_path / "run/checkpoint-4"
    assert (left / "optimizer.pt").is_file() and (left / "trainer_state.json").is_file() == (place == "state")
    with pytest.raises(
        ValueError,
        match=r"checkpoint-4', which is damaged: it was not written to its end .no manifest\.json.\. Resume from the one before",
    ):
        tiny_trainer(tmp_path / "run", **RUN).train(resume_from_checkpoint=str(left))

    resumed = tiny_trainer(tmp_path / "run", **RUN)
    resumed.train(resume_from_checkpoint=True)
    whole = tiny_trainer(tmp_path / "whole", **RUN)
    whole.train()
    assert_same_run(whole, resumed)
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-5"


def test_a_checkpoint_of_an_earlier_run_leaves_nothing_behind(tmp_path):
    earlier = tmp_path / "checkpoint-1"
    earlier.mkdir()
    for name in ("live_lora_weights.safetensors", "rng_state_1.pth", "trainer_state.json"):
        (earlier / name).write_text("{}")
    tiny_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    assert not (earlier / "live_lora_weights.safetensors").exists() and not (earlier / "rng_state_1.pth").exists()
    assert last_checkpoint(tmp_path) == earlier


class Counting(TrainerCallback, ExportableState):
    def __init__(self, by=1, count=0):
        self.by, self.count = by, count

    def on_step_end(self, args, state, control, **kwargs):
        self.count += self.by

    def state(self):
        return {"args": {"by": self.by}, "attributes": {"count": self.count}}


def test_two_callbacks_of_one_class_keep_their_states_apart(tmp_path):
    def trainer(steps):
        saved = {"save_strategy": "steps", "save_steps": 1, "restore_callback_states_from_checkpoint": True}
        return tiny_trainer(tmp_path, parts={"callbacks": [Counting(1), Counting(10)]}, max_steps=steps, **saved)

    trainer(3).train()
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=True)
    counts = [callback.count for callback in resumed.callback_handler.callbacks if isinstance(callback, Counting)]
    assert counts == [4, 40]


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    tiny_flux().save_pretrained(tmp_path / "one")
    tiny_flux(seed=5).save_pretrained(tmp_path / "two")
    saved = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    tiny_trainer(tmp_path / "run", tmp_path / "one", **saved).train()
    checkpoint = str(tmp_path / "run/checkpoint-1")
    with pytest.raises(ValueError, match=r"treats the pipeline '.*one' .* but this trainer treats '.*two' "):
        tiny_trainer(tmp_path / "run", tmp_path / "two").train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match=r"2x16 in the file, missing here\. Use the `peft_config`"):
        fewer = tiny_trainer(tmp_path / "run", tmp_path / "one", lora_target_modules=["to_q"])
        fewer.train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match=r"is damaged: it was not written to its end .no manifest\.json."):
        tiny_trainer(tmp_path / "run", tmp_path / "one").train(resume_from_checkpoint=str(tmp_path))
    # the same base from another folder and in another type is the same base
    (tmp_path / "one").rename(tmp_path / "moved")
    tiny_trainer(tmp_path / "run", tmp_path / "moved", max_steps=2, pipeline_dtype="bfloat16").train(
        resume_from_checkpoint=checkpoint
    )


def test_save_total_limit_and_save_only_model(tmp_path):
    trainer = tiny_trainer(
        tmp_path, max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=2, save_only_model=True
    )
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert not (tmp_path / "checkpoint-3/optimizer.pt").exists()


@pytest.mark.parametrize("build, component", [(tiny_flux, "transformer"), (tiny_sdxl, "unet")], ids=["flux", "sdxl"])
def test_a_saved_lora_loads_into_the_plain_pipeline(tmp_path, build, component):
    adapter = LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    parts = {"peft_config": adapter, "regularization_dataset": None}
    trainer = tiny_trainer(tmp_path, build(), parts, max_sequence_length=None, num_inference_steps=2)
    trainer.train()
    trainer.save_model()
    weights = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert_same(weights, {f"{component}.{name}": value for name, value in lora_of(trainer).items()})

    pipeline = build()
    pipeline.load_lora_weights(tmp_path)
    (loaded,) = getattr(pipeline, component).peft_config.values()
    assert (loaded.r, loaded.lora_alpha, set(loaded.target_modules)) == (3, 6, set(adapter.target_modules))
    found = {n.replace("default_0.", ""): p for n, p in getattr(pipeline, component).named_parameters() if "lora" in n}
    assert_same({name: value.detach() for name, value in found.items()}, lora_of(trainer))


def test_the_lora_says_its_rank_and_targets_in_a_fixed_order(tmp_path):
    """Not the same bytes: safetensors orders its header's metadata by chance."""
    tiny_trainer(tmp_path)._save(tmp_path / "lora")
    with safe_open(tmp_path / "lora/pytorch_lora_weights.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (metadata["transformer.r"], metadata["transformer.lora_alpha"]) == (2, 2)
    assert metadata["transformer.target_modules"] == ["to_k", "to_out.0", "to_q", "to_v"]


WITHOUT_US = """
import sys
import numpy as np
import torch
from diffusers import DiffusionPipeline

base, lora, prompt, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(base)

def draw():
    generator = torch.Generator().manual_seed(1234)
    return pipe(prompt, num_inference_steps=4, height=16, width=16, max_sequence_length=16, guidance_scale=0.0,
                generator=generator, output_type="np").images[0]

before = draw()
pipe.load_lora_weights(lora)
np.savez(out, before=before, after=draw())
assert not [name for name in sys.modules if name.startswith("diffusers_diffdoctor")]
"""


def test_the_lora_changes_images_where_this_package_is_not_imported(tmp_path):
    tiny_flux().save_pretrained(tmp_path / "base")
    trainer = tiny_trainer(
        tmp_path / "run", tmp_path / "base", parts={"eval_dataset": rows(HELD_OUT)}, learning_rate=0.3
    )
    trainer.train()
    trainer.save_model()
    arguments = [str(tmp_path / "base"), str(tmp_path / "run"), HELD_OUT[0], str(tmp_path / "images.npz")]
    subprocess.run([sys.executable, "-c", WITHOUT_US, *arguments], env=ENVIRONMENT, check=True, timeout=300)
    images = {
        name: torch.from_numpy(array).permute(2, 0, 1) for name, array in np.load(tmp_path / "images.npz").items()
    }
    assert (images["after"] - images["before"]).abs().max() > 1e-3
    for name, treated in (("before", False), ("after", True)):
        ours = trainer.generate(HELD_OUT[:1], [1234], treated=treated)[0]
        torch.testing.assert_close(images[name].float(), ours, atol=1e-4, rtol=0)


def test_with_an_average_the_saved_lora_is_the_average(tmp_path):
    trainer = tiny_trainer(tmp_path, ema_decay=0.5, max_steps=3)
    states, decays = [lora_of(trainer)], []

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            states.append(lora_of(trainer))
            # diffusers' warm-up: the first update replaces the untrained weights
            decays.append(min(0.5, state.global_step / (9 + state.global_step)) if state.global_step > 1 else 0.0)

    trainer.add_callback(Record())
    trainer.train()
    trainer.save_model()
    average = states[0]
    for decay, state in zip(decays, states[1:]):
        average = {name: decay * average[name] + (1 - decay) * state[name] for name in state}
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    for name, value in average.items():
        torch.testing.assert_close(saved[f"transformer.{name}"], value, rtol=1e-5, atol=1e-7)
    assert_same(lora_of(trainer), states[-1])  # the live weights are back
    with trainer.averaged_weights():
        expected = trainer.rollout.generate(PROMPTS[:1], [0])
    assert torch.equal(trainer.generate(PROMPTS[:1], [0]), expected)
