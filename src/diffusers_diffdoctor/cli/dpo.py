# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor dpo`: learn from pairs of images of which one was preferred. The example `dpo.py` is this script.

Pairs of a data set, such as Pick-a-Pic's:
    diffdoctor dpo --pipeline stabilityai/stable-diffusion-xl-base-1.0 --pairs pairs/ --output_dir sdxl-preferred
Pairs that the pipeline draws and a reward ranks:
    diffdoctor dpo --pipeline stabilityai/stable-diffusion-xl-base-1.0 --reward reward.py:score --output_dir sdxl-preferred
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import load_dataset

from ..loading import errors_named
from ..treatment import DiffusionDPOConfig, DiffusionDPOTrainer, write_preferences
from ..treatment.config import DTYPES
from ..treatment.prepare import build_rollout, load_pipeline
from .ddpo import ScriptArguments as PolicyArguments
from .ddpo import parsed, pipeline_of, read_prompts, read_rewards, train
from .treat import check_data_is_there


@dataclass
class ScriptArguments(PolicyArguments):
    """What to train and by what. Names are ids on the Hub or local paths."""

    pairs: str | None = field(
        default=None,
        metadata={
            "help": "Pairs: an image folder or a data set with the columns prompt (or caption), chosen and rejected; or jpg_0, jpg_1 "
            "and label_0. Without it they are drawn, ranked by the reward and written to pairs/ in the output folder."
        },
    )
    num_pairs: int = field(default=64, metadata={"help": "Pairs that are drawn where none are named."})
    images_per_pair: int = field(
        default=4, metadata={"help": "Images that are drawn for a pair: the best and the worst make it."}
    )

    def __post_init__(self):
        if self.num_pairs < 1:
            raise ValueError(f"`--num_pairs` is {self.num_pairs}, but must be at least 1.")


def parse(argv: Sequence[str], prog: str | None = None) -> tuple[ScriptArguments, DiffusionDPOConfig]:
    """Flags win over a recipe, given as `--config`, which wins over the defaults."""
    about = "Learn from pairs of images of which one was preferred, through a LoRA."
    return parsed(argv, ScriptArguments, DiffusionDPOConfig, about, prog or "diffdoctor dpo")


def run(argv: Sequence[str], prog: str | None = None) -> int:
    """Draw pairs where none are named, train and save.

    Args:
        argv: the arguments of the command line.
        prog: name of the program in messages.
    """

    def build(script: ScriptArguments, args: DiffusionDPOConfig) -> DiffusionDPOTrainer:
        rewards = read_rewards(script)
        if script.pairs is None and not rewards:
            raise ValueError(
                "Neither `--pairs` nor a `--reward` or a `--detector` is given: there is nothing to learn from."
            )
        if script.pairs is not None:
            check_data_is_there(script.pairs, "--pairs")
        prompts, held_out = read_prompts(script)
        folder = script.pairs
        if folder is None:
            folder = str(Path(args.output_dir, "pairs"))
            with PartialState().main_process_first():
                if PartialState().is_main_process:
                    draw_pairs(script, args, rewards, prompts["prompt"], folder)
        pairs = read_pairs(folder)
        return DiffusionDPOTrainer(pipeline_of(script), args, pairs, held_out, rewards or None)

    return train(lambda: parse(argv, prog), DiffusionDPOTrainer, build)


def read_pairs(name: str):
    if not Path(name).is_dir():
        with errors_named(name, f"`--pairs {name}`"):
            return load_dataset(name, split="train")
    return load_dataset("imagefolder", data_dir=name, split="train")


def draw_pairs(
    script: ScriptArguments, args: DiffusionDPOConfig, rewards: list, prompts: Sequence[str], folder: str
) -> None:
    pipeline = load_pipeline(pipeline_of(script), DTYPES[args.pipeline_dtype], args.quantization).to(args.device)
    rollout = build_rollout(pipeline, args)
    for reward in rewards:
        if isinstance(reward, torch.nn.Module):
            reward.to(args.device)

    def generate(prompts: list[str], seeds: list[int]) -> torch.Tensor:
        return rollout.generate(prompts, seeds, args.per_device_eval_batch_size).to(args.device)

    asked = [prompts[i % len(prompts)] for i in range(script.num_pairs)]
    counts = write_preferences(
        generate, rewards, asked, folder, script.images_per_pair, args.seed, args.reward_weights, not args.disable_tqdm
    )
    print(f"{counts['written']} pairs in {folder}; {counts['quarantined']} prompts gave images of one score.")
