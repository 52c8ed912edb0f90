# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor export-lora FOLDER`: a treated LoRA in the layouts that other programs read, or at its best scale."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="folder of the treatment, or a checkpoint of it")
    parser.add_argument(
        "--format",
        default="kohya",
        choices=("kohya", "diffusers"),
        help="kohya: names and alpha as ComfyUI, AUTOMATIC1111 and Forge read them, for Stable Diffusion, SDXL and FLUX; "
        "diffusers: the names as they are, with alpha multiplied into the weights for programs that ignore it "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        default=None,
        metavar="FILE",
        help="default: FOLDER/lora_FORMAT.safetensors; with --sweep a folder, FOLDER/scaled",
    )
    sweep = parser.add_argument_group("the best scale, by a judge on held-out prompts")
    sweep.add_argument(
        "--sweep",
        nargs="+",
        type=float,
        metavar="SCALE",
        help="scales to compare, such as 0.5 0.75 1 1.25; 0 comes first",
    )
    sweep.add_argument("--pipeline", help="id or folder of the pipeline that was treated; or miniature")
    sweep.add_argument("--base_lora", help="the LoRA that it wore; the recorded one without it")
    sweep.add_argument("--judge", help="detector that says which images are wrong; the miniature brings its own")
    sweep.add_argument("--prompts", help="held-out prompts: a file, a folder or a data set; the package's without it")
    sweep.add_argument("--images", type=int, default=32, help="for each scale (default: %(default)s)")
    sweep.add_argument("--seed", type=int, default=2_000_000, help="of the first image (default: %(default)s)")
    sweep.add_argument("--device", default=None, help="such as cpu, cuda; by default the best there is")


def run(args: argparse.Namespace) -> int:
    from ..treatment.export import export_lora

    if args.sweep is not None:
        return _sweep(args)
    print(f"written to {export_lora(args.folder, args.format, args.output)}")
    return 0


def _sweep(args: argparse.Namespace) -> int:
    from ..treatment.sweep import SavedTreatment, best_scale, scale_section, sweep_scales, write_scaled
    from .diagnose import checked_device
    from .treat import ScriptArguments, read_inputs

    if args.pipeline is None:
        raise ValueError("`--sweep` needs `--pipeline`, the one that was treated: its images are drawn.")
    if args.images < 1:
        raise ValueError(f"`--images` is {args.images}, but must be at least 1.")
    own = args.pipeline == "miniature"
    if args.judge is None and not own:
        raise ValueError("`--sweep` needs a `--judge`: a detector, best one that the treatment never saw.")
    script = ScriptArguments(pipeline=args.pipeline, detector=None if own else args.judge, judge=args.judge)
    if args.prompts is not None:
        script.prompts = script.eval_prompts = args.prompts
    inputs, device = read_inputs(script), checked_device(args.device)
    rows = list(inputs.eval_prompts["prompt"])
    prompts = [rows[i % len(rows)] for i in range(args.images)]
    seeds = [args.seed + i for i in range(args.images)]
    treatment = SavedTreatment(inputs.pipeline, args.folder, args.base_lora)
    treatment.pipeline.to(device)
    judge = inputs.judge.to(device)
    figures = sweep_scales(
        lambda scale: treatment.draw(scale, prompts, seeds).to(device),
        args.sweep,
        prompts,
        judge,
        None if inputs.fidelity is None else inputs.fidelity.to(device),
        None if inputs.features is None else next(iter(inputs.features.values())),
    )
    print(scale_section(figures))
    if best_scale(figures).scale == 0:
        print("No scale is better than the untreated pipeline: nothing is written.")
        return 1
    print(f"written to {write_scaled(args.folder, args.output or Path(args.folder, 'scaled'), figures)}")
    return 0
