# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor ddpo`: raise any reward of a pipeline's images by policy gradient. The example `ddpo.py` is this script.

One process:
    diffdoctor ddpo --pipeline stabilityai/stable-diffusion-3.5-medium --reward reward.py:score --output_dir sd3-raised
Eight GPUs:
    accelerate launch --config_file examples/accelerate/multi_gpu.yaml -m diffdoctor ddpo ...
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from datasets import Dataset

from .. import miniature
from ..files import FolderInUse
from ..rewards import named_reward
from ..treatment import DDPOConfig, DDPOTrainer, TreatmentTrainer
from ..treatment.prompt_files import distinct, hold_out
from .diagnose import find_detector, open_detector
from .training import Parser, resume_point
from .treat import PROMPTS, check_data_is_there, check_pipeline_is_there, prone_prompts, read_rows, wants_miniature


# what the miniature draws in; its pipeline's own default is FLUX's
MINIATURE = ("--resolution", "64", "--max_sequence_length", "12")


@dataclass
class ScriptArguments:
    """What to train and by what. Names are ids on the Hub or local paths."""

    pipeline: str = field(
        default="black-forest-labs/FLUX.1-schnell",
        metadata={"help": "Pipeline to train; `miniature` is the bundled one, with its own prompts and detector."},
    )
    reward: list[str] | None = field(
        default=None,
        metadata={
            "help": "FILE.py:FUNCTION, called with (images, prompts): images (B, 3, H, W) in [0, 1], it returns B scores, higher is "
            "better; or hpsv2, pickscore and the like, or the http:// address of a server, as for `diffdoctor score`. Several are "
            "weighed by `--reward_weights`, the detector being the last."
        },
    )
    detector: str | None = field(
        default=None,
        metadata={"help": "Artifact detector as a reward; without `--reward` the miniature's is its own."},
    )
    prompts: str | None = field(
        default=None,
        metadata={
            "help": "Prompts: a .txt, .csv, .jsonl or .json file, a folder or a data set; the package's without it."
        },
    )
    eval_prompts: str | None = field(
        default=None,
        metadata={"help": "Held-out prompts, likewise; without it every tenth training prompt is held out."},
    )
    prompt_column: str = field(
        default="prompt", metadata={"help": "Column of the prompts in these files and data sets."}
    )


def parse(argv: Sequence[str], prog: str | None = None) -> tuple[ScriptArguments, DDPOConfig]:
    """Flags win over a recipe, given as `--config`, which wins over the defaults."""
    about = "Raise a reward of a pipeline's images by policy gradient, through a LoRA."
    return parsed(argv, ScriptArguments, DDPOConfig, about, prog or "diffdoctor ddpo")


def run(argv: Sequence[str], prog: str | None = None) -> int:
    """Train and save.

    Args:
        argv: the arguments of the command line.
        prog: name of the program in messages.
    """

    def build(script: ScriptArguments, args: DDPOConfig) -> DDPOTrainer:
        rewards = read_rewards(script)
        if not rewards:
            raise ValueError("Neither `--reward` nor `--detector` is given: there is nothing to learn from.")
        prompts, held_out = read_prompts(script)
        return DDPOTrainer(pipeline_of(script), rewards, args, prompts, held_out)

    return train(lambda: parse(argv, prog), DDPOTrainer, build)


def parsed(
    argv: Sequence[str], script_class: type, config_class: type, description: str, prog: str
) -> tuple[Any, Any]:
    """The two dataclasses, with the miniature's size where it is trained."""
    parser = Parser(script_class, config_class, {}, description, "what to train, and by what", prog)
    return parser.parse([*(MINIATURE if wants_miniature(argv) else ()), *argv])


def train(
    parse: Callable[[], tuple[Any, Any]],
    trainer_class: type[TreatmentTrainer],
    build: Callable[[Any, Any], TreatmentTrainer],
) -> int:
    """The run of a script: parse, build the trainer, train, save, push. Returns the exit status."""
    try:
        script, args = parse()
        resume = resume_point(args, trainer_class)
        if script.pipeline != "miniature":
            check_pipeline_is_there(script.pipeline)
        trainer = build(script, args)
    except (ValueError, TypeError, OSError, yaml.YAMLError) as error:  # its message says what to do
        raise SystemExit(f"error: {error}") from error
    if trainer.is_world_process_zero():
        print(trainer.plan)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except FolderInUse as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        return 130  # a checkpoint was saved, and the trainer has said where
    trainer.save_model()
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.end_training()  # a process that others are still connected to may end in an abort
    return 0


def pipeline_of(script: ScriptArguments) -> str:
    return str(miniature.load("pipeline")) if script.pipeline == "miniature" else script.pipeline


def read_rewards(script: ScriptArguments) -> list[Any]:
    """What the arguments name, the detector last."""
    rewards = [named_reward(name) for name in script.reward or ()]
    if script.detector is not None:
        rewards.append(open_detector(find_detector(script.detector, "--detector"), "cpu"))
    elif script.pipeline == "miniature" and not rewards:
        rewards.append(open_detector(miniature.load("detector"), "cpu"))
    return rewards


def read_prompts(script: ScriptArguments) -> tuple[Dataset, Dataset]:
    """Prompts to train on and prompts to evaluate on."""
    for argument in ("prompts", "eval_prompts"):
        if getattr(script, argument) is not None:
            check_data_is_there(getattr(script, argument), f"--{argument}")
    if script.prompts is None and script.pipeline == "miniature":
        prompts = prone_prompts("train")
    else:
        prompts = read_rows(script.prompts or str(PROMPTS), "--prompts", script.prompt_column)
    prompts, _ = distinct(prompts)
    if script.eval_prompts is not None:
        return prompts, read_rows(script.eval_prompts, "--eval_prompts", script.prompt_column)
    if script.pipeline == "miniature" and script.prompts is None:
        return prompts, prone_prompts("development")
    if len(prompts) == 1:
        raise ValueError(
            f"`--prompts {script.prompts}` has a single prompt: name others to evaluate on with `--eval_prompts`."
        )
    return hold_out(prompts)
