# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor treat`: train a LoRA against an artifact detector, then judge the same seeds before and after it.

The examples `treat_flux.py`, `treat_sdxl.py` and `treat_kolors.py` are this script with the defaults of their pipeline. What a run
needs is an argument: one of `ScriptArguments` below or of `PixelRewardConfig`, on the command line or in a recipe. What is left
out: training the detector (see the quick tour for where to get one). Nothing here asks which pipeline it treats.

One process:
    diffdoctor treat --config sdxl --detector detector/ --output_dir sdxl-treated
Eight GPUs:
    accelerate launch --config_file examples/accelerate/multi_gpu.yaml -m diffdoctor treat --config sdxl ...
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset

from .. import miniature
from ..evaluation import ImagePairs, TreatmentRun, draw_pairs, measure, print_summary, render
from ..files import FolderInUse
from ..rewards import named_reward
from ..treatment import PixelRewardConfig, PixelRewardTrainer
from ..treatment.adapter import loading_lines
from ..treatment.config import DTYPES
from ..treatment.model_card import example_call
from ..treatment.prompt_files import FORMATS, distinct, hold_out, read_prompt_file
from ..treatment.samples import check_column
from ..treatment.samples import read_prompts as prompts_of
from .diagnose import NO_DEFAULT, find_detector, open_detector
from .reach import check_reachable
from .score import check_reward_names, check_rewards_are_there
from .training import Parser, recipes_in, resume_point


RECIPES = Path(__file__).parents[1] / "treatment/recipes"
PROMPTS = RECIPES / "prompts.txt"
PLACES = RECIPES / "places.txt"


@dataclass
class ScriptArguments:
    """What to treat and with what. Names are ids on the Hub or local paths."""

    pipeline: str = field(
        default="black-forest-labs/FLUX.1-schnell",
        metadata={"help": "Pipeline to treat; `miniature` is the bundled one, with its own of all that follows."},
    )
    detector: str | None = field(
        default=None,
        metadata={"help": "Artifact detector to train against; only the miniature brings its own."},
    )
    reward: list[str] = field(
        default_factory=lambda: ["detector"],
        metadata={
            "help": "What to train against: detector, aesthetic, clip, hpsv2, image_reward, pickscore, each with its published weights "
            "or as NAME=WHERE, FILE.py:FUNCTION, or several with `--reward_weights`. Beside a reward of whole images, the detector keeps artifacts away."
        },
    )
    judge: str | None = field(default=None, metadata={"help": "Second detector, only to judge the result."})
    prompts: str | None = field(
        default=None,
        metadata={
            "help": "Training prompts: a .txt, .csv, .jsonl or .json file, a folder or a data set; those that come with "
            "the package without it."
        },
    )
    eval_prompts: str | None = field(
        default=None,
        metadata={"help": "Held-out prompts, likewise; without it every tenth training prompt is held out."},
    )
    regularization_dataset: str | None = field(
        default=None, metadata={"help": "Images with prompts to stay close to: an image folder or a data set."}
    )
    instance_prompt: str | None = field(
        default=None,
        metadata={
            "help": "The prompt of a LoRA of one person or thing (base_lora), in place of --prompts: it alone is trained on, "
            "and held out is the same in other places, unless --eval_prompts names others."
        },
    )
    prompt_column: str = field(
        default="prompt",
        metadata={
            "help": "Column of the prompts in these files and data sets; `prompt` is taken where there is none."
        },
    )
    report_images: int = field(
        default=64, metadata={"help": "Images in the report before and after; 0 for no report."}
    )
    report_seed: int = field(
        default=1_000_000,
        metadata={
            "help": "Image i of the report has the seed report_seed + i; far from eval_seed's, so that no evaluation "
            "during training has looked at its noise."
        },
    )
    split: str = field(
        default="final",
        metadata={
            "help": "Prompts of the miniature's report: final (nothing was tuned on it), or development with the seeds "
            "from eval_seed on, to compare settings."
        },
    )

    def __post_init__(self):
        if self.report_images < 0:
            raise ValueError(f"`--report_images` is {self.report_images}, but must be at least 0: 0 for no report.")
        if self.instance_prompt is not None and (self.prompts is not None or not self.instance_prompt.strip()):
            raise ValueError(
                f"`--instance_prompt` is {self.instance_prompt!r} with `--prompts` {self.prompts!r}: give one of them, a text or a "
                "file of texts."
            )
        check_reward_names(self.reward)
        if self.split not in ("final", "development"):
            raise ValueError(f"`--split` is {self.split!r}, but must be final or development.")
        if self.split == "development" and self.pipeline != "miniature":
            raise ValueError(
                "`--split development` is of `--pipeline miniature`; name the prompts of your report with `--eval_prompts`."
            )


# --- arguments ---------------------------------------------------------------------------------------------------------------


def recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return recipes_in(RECIPES) | {"miniature": Path(miniature.__file__).with_name("recipe.yaml")}


def parse(
    argv: Sequence[str], pipeline: str | None = None, recipe: str | None = None, prog: str | None = None
) -> tuple[ScriptArguments, PixelRewardConfig]:
    """Flags win over the recipe, given as `--config` or by default `recipe`, which wins over the defaults."""
    parser = Parser(
        ScriptArguments,
        PixelRewardConfig,
        recipes(),
        description="Train a LoRA against an artifact detector, then judge the same seeds before and after it.",
        own_title="what to treat, and the report",
        prog=prog,
    )
    if pipeline is not None:
        parser.set_defaults(pipeline=pipeline)
    return parser.parse(argv, "miniature" if wants_miniature(argv) else recipe)


def wants_miniature(argv: Sequence[str]) -> bool:
    return "--pipeline=miniature" in argv or ("--pipeline", "miniature") in pairwise(argv)


# --- what a run needs --------------------------------------------------------------------------------------------------------


@dataclass
class Inputs:
    """What is treated, on what it is trained and with what it is judged."""

    pipeline: str
    detector: torch.nn.Module | None = None
    rewards: list[Any] = field(default_factory=list)  # that is trained against
    prompts: Dataset | None = None
    eval_prompts: Dataset | None = None
    regularization: Dataset | None = None
    judge: torch.nn.Module | None = None
    judge_error_rates: dict | None = None
    fidelity: Callable | None = None  # (images, prompts) -> scores (B,)
    features: dict[str, Callable] | None = None  # images -> (B, F), for diversity
    report_prompts: Dataset | None = None  # what the report is on; `eval_prompts` without them
    plain_prompts: Dataset | None = None  # prompts that never show artifacts and should stay as they are


def read_inputs(script: ScriptArguments, say: Callable[[str], None] = print) -> Inputs:
    """What the arguments name; what they leave open is the miniature's own, or comes with the package.

    All that is cheap to find wrong is looked for first: data that are not there, rows that cannot be used, then models that are
    not there. Models are loaded last, and the pipeline by the trainer.
    """
    own = script.pipeline == "miniature"
    judged = script.judge is not None or not script.report_images
    if not own and script.detector is None and ("detector" in script.reward or not judged):
        raise ValueError(f"`--detector` is missing: {NO_DEFAULT}")
    for argument in ("prompts", "eval_prompts", "regularization_dataset"):
        if getattr(script, argument) is not None:
            check_data_is_there(getattr(script, argument), f"--{argument}")
    prompts = None
    if script.instance_prompt is not None:
        prompts = read_instance_prompts(script)
    elif script.prompts is not None or script.eval_prompts is not None or not own:
        prompts = read_prompts(script, say)
    photos = script.regularization_dataset
    read_photos = partial(read_rows, photos, "--regularization_dataset", script.prompt_column, images=True)
    here = photos is not None and Path(photos).exists()
    regularization = read_photos() if here else None
    detectors = {
        argument: find_detector(getattr(script, argument), f"--{argument}")
        for argument in ("detector", "judge")
        if getattr(script, argument) is not None
    }
    check_rewards_are_there([name for name in script.reward if not (own and name == "clip")])
    if not own:
        check_pipeline_is_there(script.pipeline)
    if photos is not None and not here:  # a download may take long
        regularization = read_photos()

    inputs = read_miniature(script.split) if own else Inputs(script.pipeline)
    if prompts is not None:
        inputs.prompts, inputs.eval_prompts = prompts
        inputs.report_prompts = inputs.plain_prompts = None
    if regularization is not None:
        inputs.regularization = regularization
    if "detector" in detectors:
        inputs.detector = open_detector(detectors["detector"], "cpu")
    if "judge" in detectors:
        inputs.judge, inputs.judge_error_rates = open_detector(detectors["judge"], "cpu", "--judge"), None
    # the miniature's world is not that of the published CLIP
    given = {"detector": inputs.detector} | ({"clip": inputs.fidelity} if own else {})
    inputs.rewards = [given[name] if name in given else named_reward(name) for name in script.reward]
    return inputs


def check_weights(script: ScriptArguments, args: PixelRewardConfig) -> None:
    if args.reward_weights is not None and len(args.reward_weights) != len(script.reward):
        raise ValueError(
            f"`--reward_weights` has {len(args.reward_weights)} entries for the {len(script.reward)} of `--reward` "
            f"({', '.join(script.reward)}); give one for each."
        )


def check_data_is_there(name: str, argument: str) -> None:
    """Said before anything is read."""
    if Path(name).suffix.lower() in FORMATS:
        if not Path(name).is_file():
            raise FileNotFoundError(f"`{argument} {name}`: there is no file {name!r} to read prompts from.")
    elif not Path(name).exists():
        check_reachable(name, argument, "dataset")


def check_pipeline_is_there(name: str) -> None:
    """Said before it is loaded, without the wait and the traceback of the libraries."""
    if not Path(name).exists():
        check_reachable(name, "--pipeline", "pipeline")
    elif not Path(name, "model_index.json").is_file():
        raise ValueError(
            f"`--pipeline {name}` has no model_index.json and so is no pipeline of diffusers: name the folder that "
            "`pipe.save_pretrained(folder)` wrote, or an id of the Hub."
        )


def read_rows(name: str, argument: str, column: str, images: bool = False) -> Dataset:
    """What [`read_prompt_file`] reads, every row with a prompt; with `images` also in the column "image". Errors name the
    argument."""
    try:
        rows = read_prompt_file(name, column)
    except (ValueError, OSError) as error:
        raise ValueError(f"`{argument} {name}`: {error}") from error
    if images:
        check_column(rows, "image", f"{argument} {name}")
    prompts_of(rows, f"{argument} {name}")
    return rows


def read_prompts(script: ScriptArguments, say: Callable[[str], None] = print) -> tuple[Dataset, Dataset]:
    """Prompts to train on and prompts to evaluate on."""
    if script.prompts is None and script.pipeline == "miniature":
        prompts = prone_prompts("train")
    else:
        prompts = read_rows(script.prompts or str(PROMPTS), "--prompts", script.prompt_column)
    prompts, duplicates = distinct(prompts)
    if duplicates:
        say(f"`--prompts`: {duplicates} rows repeat another's prompt and are left out; {len(prompts)} are left.")
    if script.eval_prompts is None:
        if len(prompts) == 1:
            raise ValueError(
                f"`--prompts {script.prompts}` has a single prompt, of which none can be held out: add prompts, or name others "
                "to evaluate on with `--eval_prompts`."
            )
        return hold_out(prompts)
    held_out = read_rows(script.eval_prompts, "--eval_prompts", script.prompt_column)
    known = set(held_out["prompt"]) & set(prompts["prompt"])
    if known:
        say(
            f"`--eval_prompts`: {len(known)} of its prompts are also trained on, so that its figures do not speak for prompts "
            "that training never saw."
        )
    return prompts, held_out


def read_instance_prompts(script: ScriptArguments) -> tuple[Dataset, Dataset]:
    """The instance prompt to train on, and what to evaluate on."""
    if script.eval_prompts is not None:
        held_out = read_rows(script.eval_prompts, "--eval_prompts", script.prompt_column)
    else:
        places = read_prompt_file(str(PLACES))["prompt"]
        held_out = Dataset.from_dict({"prompt": [f"{script.instance_prompt} {place}" for place in places]})
    return Dataset.from_dict({"prompt": [script.instance_prompt]}), held_out


def prone_prompts(split: str) -> Dataset:
    """The miniature's prompts that show artifacts, which is what is treated."""
    from ..miniature.renderer import PRONE_CATEGORIES

    return Dataset.from_list(miniature.prompts(split, PRONE_CATEGORIES))


def read_miniature(split: str) -> Inputs:
    """The bundled parts: the same run in a world of 64x64 pixels whose mistakes are known."""

    from ..miniature.check import clip_features, pixel_features
    from ..miniature.judge import MiniatureJudge
    from ..miniature.renderer import PLAIN_CATEGORIES
    from ..rewards import CLIPReward

    clip = CLIPReward.from_pretrained(miniature.load("clip"))
    return Inputs(
        pipeline=str(miniature.load("pipeline")),
        detector=open_detector(miniature.load("detector"), "cpu"),
        prompts=prone_prompts("train"),  # the regularization images show all categories
        # an evaluation during training may choose a checkpoint, which the final prompts must not do
        eval_prompts=prone_prompts("development"),
        report_prompts=prone_prompts(split),
        regularization=miniature.regularization_dataset(),
        judge=MiniatureJudge.from_pretrained(miniature.load("judge")).float().eval(),
        judge_error_rates=json.loads((miniature.load("judge") / "error_rates.json").read_text()),
        fidelity=clip,
        features={"pixels": pixel_features, "CLIP": partial(clip_features, clip)},
        plain_prompts=Dataset.from_list(miniature.prompts(split, PLAIN_CATEGORIES)),
    )


# --- the run -----------------------------------------------------------------------------------------------------------------


def run(argv: Sequence[str], pipeline: str | None = None, recipe: str | None = None, prog: str | None = None) -> int:
    """Treat, save, report.

    Args:
        argv: the arguments of the command line.
        pipeline: default of `--pipeline`.
        recipe: default of `--config`.
        prog: name of the program in messages.
    """
    try:
        script, args = parse(argv, pipeline, recipe, prog or "diffdoctor treat")
        check_weights(script, args)
        resume = resume_point(args, PixelRewardTrainer)
        if args.base_lora is not None and not Path(args.base_lora).exists():
            check_reachable(args.base_lora, "--base_lora", "LoRA")
        inputs = read_inputs(script, say=print if args.process_index == 0 else lambda text: None)
        trainer = PixelRewardTrainer(
            pipeline=inputs.pipeline,
            reward_funcs=inputs.rewards,
            args=args,
            train_dataset=inputs.prompts,
            eval_dataset=inputs.eval_prompts,
            regularization_dataset=inputs.regularization,
            judge=inputs.judge,
        )
    except (ValueError, OSError, yaml.YAMLError) as error:  # its message says what to do; a traceback would bury it
        raise SystemExit(f"error: {error}") from error  # `diffdoctor --traceback treat` shows where
    if trainer.is_world_process_zero():
        print(trainer.plan)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except FolderInUse as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        return 130  # a checkpoint was saved, and the trainer has said where
    trainer.save_model()
    if script.report_images and trainer.is_world_process_zero():
        # the development split keeps the noise that settings have been compared on
        seed = args.eval_seed if script.split == "development" else script.report_seed
        report(trainer, inputs, script.report_images, seed)
    trainer.accelerator.wait_for_everyone()
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.end_training()  # a process that others are still connected to may end in an abort
    return 0


def report(trainer: PixelRewardTrainer, inputs: Inputs, count: int, seed: int) -> None:
    """Generate held-out prompts with and without the LoRA, judge them, write report.html, .json, .csv and .png."""
    output_dir = Path(trainer.args.output_dir)
    plain = {}
    if inputs.plain_prompts is not None:
        title = "Prompts that had no artifacts to treat"
        plain_count = max(1, count // 8)
        plain = judge_prompts(trainer, inputs, inputs.plain_prompts, plain_count, seed, output_dir / "plain", title)
    prompts = inputs.eval_prompts if inputs.report_prompts is None else inputs.report_prompts
    results = judge_prompts(trainer, inputs, prompts, count, seed, output_dir, "Treatment", plain.get("categories"))
    print_summary(results)
    trainer.final_report = results
    trainer.create_model_card()


def judge_prompts(
    trainer: PixelRewardTrainer,
    inputs: Inputs,
    dataset: Dataset,
    count: int,
    seed: int,
    output_dir: Path,
    title: str,
    other_categories: dict | None = None,
) -> dict:
    args = trainer.args
    stride = max(1.0, len(dataset) / count)  # fewer images than prompts: from all over the data set, not its beginning
    rows = [dataset[int(i * stride) % len(dataset)] for i in range(count)]
    prompts, seeds = [row["prompt"] for row in rows], [seed + i for i in range(count)]
    categories = [row["category"] for row in rows] if "category" in dataset.column_names else None
    before, after = trainer.generate(prompts, seeds, treated=False), trainer.generate(prompts, seeds)
    pairs = ImagePairs(before, after, prompts, seeds, categories)
    # The first judge is the one that counts; the detector that was trained against flatters the result.
    judges = {"judge": inputs.judge, "detector": inputs.detector}
    judges = {name: judge.to(args.device) for name, judge in judges.items() if judge is not None}
    figures = measure(
        pairs,
        judges,
        fidelity=inputs.fidelity,
        # Diversity is a distance between seeds of one prompt; with few images there is one seed for each.
        features=inputs.features if len(set(prompts)) < count else None,
        batch_size=args.per_device_eval_batch_size,
    )
    figures["categories"] |= other_categories or {}
    loading = loading_lines(
        trainer.pipeline,
        trainer.rollout.denoiser_name,
        base=inputs.pipeline,
        lora=args.output_dir,
        dtype=DTYPES[args.pipeline_dtype],
        base_lora=args.base_lora,
        base_lora_scale=args.base_lora_scale,
    )
    size = (trainer.rollout.height, trainer.rollout.width)
    treatment = TreatmentRun(
        lora_dir=args.output_dir,
        base_model=inputs.pipeline,
        loading_code=f"{loading}\n{example_call(trainer.pipeline, args, size, prompts[0])}",
        judge_error_rates=inputs.judge_error_rates,
        training_log=trainer.state.log_history,
    )
    return render(figures, draw_pairs(pairs, next(iter(judges.values()))), output_dir, treatment, title)
