# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Treat FLUX.1 with an artifact detector: train a LoRA, then judge the same seeds before and after it.

Everything a run needs is an argument: those of `ScriptArguments` below and those of `PixelRewardConfig`. The defaults are the
paper's. What is left out: training the detector (see the quick tour for where to get one), and other pipelines than FLUX, though
nothing here asks which pipeline it is.

One GPU:
    accelerate launch examples/treat_flux.py --detector detector/ --output_dir flux-treated

Eight GPUs, with a recipe, photographs to stay close to and a judge that training never sees:
    accelerate launch --config_file examples/accelerate/multi_gpu.yaml examples/treat_flux.py \
        --config examples/recipes/flux_schnell.yaml --regularization_dataset photos/ --judge judge/ --output_dir flux-treated

No GPU, the bundled miniature, some minutes (left alone, accelerate gives a process one thread):
    OMP_NUM_THREADS=$(nproc) accelerate launch --config_file examples/accelerate/single_process.yaml examples/treat_flux.py \
        --pipeline miniature --output_dir runs/miniature
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from trl import TrlParser

from diffusers_diffdoctor import (
    ArtifactDetectorForSemanticSegmentation,
    PixelRewardConfig,
    PixelRewardTrainer,
    miniature,
)
from diffusers_diffdoctor.evaluation import ImagePairs, TreatmentRun, draw_pairs, measure, print_summary, render


HERE = Path(__file__).parent
LOADING_CODE = """\
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({pipeline!r})
pipe.load_lora_weights({lora!r})"""


@dataclass
class ScriptArguments:
    """What to treat and with what. Names are ids on the Hub or local paths."""

    pipeline: str = field(
        default="black-forest-labs/FLUX.1-schnell",
        metadata={"help": "Pipeline to treat; `miniature` is the bundled one."},
    )
    detector: str = field(default="diffdoctor/detector", metadata={"help": "Artifact detector to train against."})
    judge: str | None = field(default=None, metadata={"help": "Second detector, only to judge the result."})
    prompts: str = field(
        default=str(HERE / "prompts.txt"),
        metadata={"help": "Training prompts: a data set, or a .txt, .jsonl or .csv file."},
    )
    eval_prompts: str | None = field(
        default=None,
        metadata={"help": "Held-out prompts, likewise; by default every tenth training prompt is held out."},
    )
    regularization_dataset: str | None = field(
        default=None, metadata={"help": "Images with prompts to stay close to: a data set or an image folder."}
    )
    prompt_column: str = field(
        default="prompt", metadata={"help": "Name of the column of prompts in these data sets."}
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
            "help": "Prompts that the miniature's report is on: final (nothing was tuned on it), or development with the "
            "seeds from eval_seed on, to compare settings."
        },
    )


def parse(argv: list[str] | None = None) -> tuple[ScriptArguments, PixelRewardConfig]:
    """Flags win over the recipe given as `--config`, which wins over the defaults."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if wants_miniature(argv) and "--config" not in argv:
        argv += ["--config", str(miniature_recipe())]
    script, args = TrlParser((ScriptArguments, PixelRewardConfig)).parse_args_and_config(argv)
    return script, args


def read_dataset(name: str, prompt_column: str) -> Dataset:
    """A data set with the column "prompt" from a text file with a prompt per line, a .jsonl or .csv file, a folder, or an id."""
    path = Path(name)
    if path.suffix == ".txt":
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        return Dataset.from_dict({"prompt": [line for line in lines if line and not line.startswith("#")]})
    formats = {".jsonl": "json", ".json": "json", ".csv": "csv"}
    if path.suffix in formats:
        dataset = load_dataset(formats[path.suffix], data_files=name, split="train")
    else:
        dataset = load_dataset(name, split="train")
    if prompt_column != "prompt" and prompt_column in dataset.column_names:
        dataset = dataset.rename_column(prompt_column, "prompt")
    return dataset


def read_prompts(script: ScriptArguments) -> tuple[Dataset, Dataset]:
    """Prompts to train on and prompts to evaluate on."""
    prompts = read_dataset(script.prompts, script.prompt_column)
    if script.eval_prompts is not None:
        return prompts, read_dataset(script.eval_prompts, script.prompt_column)
    held_out = range(0, len(prompts), 10)
    return prompts.select([i for i in range(len(prompts)) if i % 10]), prompts.select(held_out)


def read_detector(name: str) -> ArtifactDetectorForSemanticSegmentation:
    # float32 also if it was saved in half: its gradients would underflow, and a CPU is slow in half precision
    return ArtifactDetectorForSemanticSegmentation.from_pretrained(name, dtype=torch.float32)


# --- what a run needs -------------------------------------------------------------------------------------------------------


@dataclass
class Inputs:
    """What is treated, on what it is trained and with what it is judged."""

    pipeline: str
    detector: torch.nn.Module
    prompts: Dataset
    eval_prompts: Dataset
    regularization: Dataset | None = None
    judge: torch.nn.Module | None = None
    judge_error_rates: dict | None = None
    fidelity: Callable | None = None  # (images, prompts) -> scores (B,)
    features: dict[str, Callable] | None = None  # images -> (B, F), for diversity
    report_prompts: Dataset | None = None  # what the report is on; `eval_prompts` without them
    plain_prompts: Dataset | None = None  # prompts that never show artifacts and should stay as they are


def read_inputs(script: ScriptArguments) -> Inputs:
    if script.pipeline == "miniature":
        return read_miniature(script.split)
    prompts, eval_prompts = read_prompts(script)
    regularization = None
    if script.regularization_dataset is not None:
        regularization = read_dataset(script.regularization_dataset, script.prompt_column)
    return Inputs(
        pipeline=script.pipeline,
        detector=read_detector(script.detector),
        prompts=prompts,
        eval_prompts=eval_prompts,
        regularization=regularization,
        judge=read_detector(script.judge) if script.judge is not None else None,
    )


def wants_miniature(argv: list[str]) -> bool:
    return "--pipeline=miniature" in argv or ("--pipeline", "miniature") in pairwise(argv)


def miniature_recipe() -> Path:
    return Path(miniature.__file__).with_name("recipe.yaml")


def read_miniature(split: str) -> Inputs:
    """The bundled parts: the same run in a world of 64x64 pixels whose mistakes are known."""
    if split not in ("final", "development"):
        raise ValueError(f"`--split` is {split!r}, but must be final or development.")
    from transformers import CLIPModel, CLIPProcessor

    from diffusers_diffdoctor.miniature.check import clip_features, pixel_features
    from diffusers_diffdoctor.miniature.judge import MiniatureJudge
    from diffusers_diffdoctor.miniature.renderer import PLAIN_CATEGORIES, PRONE_CATEGORIES
    from diffusers_diffdoctor.rewards import ClipScore

    clip = ClipScore(
        CLIPModel.from_pretrained(miniature.load("clip"), dtype=torch.float32),
        CLIPProcessor.from_pretrained(miniature.load("clip")),
    )

    return Inputs(
        pipeline=str(miniature.load("pipeline")),
        detector=read_detector(str(miniature.load("detector"))),
        # what shows artifacts is treated; the regularization images show all categories
        prompts=Dataset.from_list(miniature.prompts("train", PRONE_CATEGORIES)),
        # an evaluation during training may choose a checkpoint, which the final prompts must not do
        eval_prompts=Dataset.from_list(miniature.prompts("development", PRONE_CATEGORIES)),
        report_prompts=Dataset.from_list(miniature.prompts(split, PRONE_CATEGORIES)),
        regularization=miniature.regularization_dataset(),
        judge=MiniatureJudge.from_pretrained(miniature.load("judge")).float().eval(),
        judge_error_rates=json.loads((miniature.load("judge") / "error_rates.json").read_text()),
        fidelity=clip,
        features={"pixels": pixel_features, "CLIP": partial(clip_features, clip)},
        plain_prompts=Dataset.from_list(miniature.prompts(split, PLAIN_CATEGORIES)),
    )


def main() -> None:
    script, args = parse()
    try:
        inputs = read_inputs(script)
    except (
        FileNotFoundError,
        ValueError,
    ) as error:  # its message says what to do; a launcher's traceback would bury it
        raise SystemExit(f"error: {error}") from error
    trainer = PixelRewardTrainer(
        pipeline=inputs.pipeline,
        reward_funcs=inputs.detector,
        args=args,
        train_dataset=inputs.prompts,
        eval_dataset=inputs.eval_prompts,
        regularization_dataset=inputs.regularization,
        judge=inputs.judge,
    )
    resume = args.resume_from_checkpoint  # a folder, or "true" for the last whole checkpoint of the output folder
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    trainer.save_model()
    if script.report_images and trainer.is_world_process_zero():
        # the development split keeps the noise that settings have been compared on
        seed = args.eval_seed if script.split == "development" else script.report_seed
        report(trainer, inputs, script.report_images, seed)
    trainer.accelerator.wait_for_everyone()
    if args.push_to_hub:
        trainer.push_to_hub()


def report(trainer: PixelRewardTrainer, inputs: Inputs, count: int, seed: int) -> None:
    """Generate held-out prompts with and without the LoRA, judge them, write report.html, .json and .png."""
    output_dir = Path(trainer.args.output_dir)
    plain = {}
    if inputs.plain_prompts is not None:
        title = "Prompts that had no artifacts to treat"
        plain_count = max(1, count // 8)
        plain = judge_prompts(trainer, inputs, inputs.plain_prompts, plain_count, seed, output_dir / "plain", title)
    prompts = inputs.eval_prompts if inputs.report_prompts is None else inputs.report_prompts
    results = judge_prompts(trainer, inputs, prompts, count, seed, output_dir, "Treatment", plain.get("categories"))
    print_summary(results)


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
    run = TreatmentRun(
        lora_dir=args.output_dir,
        base_model=inputs.pipeline,
        loading_code=LOADING_CODE.format(pipeline=inputs.pipeline, lora=args.output_dir),
        judge_error_rates=inputs.judge_error_rates,
        training_log=trainer.state.log_history,
    )
    return render(figures, draw_pairs(pairs, next(iter(judges.values()))), output_dir, run, title)


if __name__ == "__main__":
    main()
