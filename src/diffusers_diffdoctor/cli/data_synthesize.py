# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor data synthesize PROMPTS --pipeline NAME... --output DIR`: images for prompts.

On several GPUs: accelerate launch -m diffdoctor data synthesize ..., with the same arguments.
"""

import argparse

from .data import add_output, add_place, device_of, place, precision_on, run_stage_of
from .pipelines import add_pipeline_kwargs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompts", metavar="FILE", help="prompts.jsonl of data prompts, or a text with a prompt on each line"
    )
    parser.add_argument("--pipeline", required=True, nargs="+", metavar="NAME", help="Hub ids or folders of diffusers")
    parser.add_argument(
        "--steps", required=True, nargs="+", type=int, metavar="N", help="each pipeline takes each of them"
    )
    parser.add_argument(
        "--images", type=int, default=1, metavar="N", help="of a prompt, each time (default: %(default)s)"
    )
    parser.add_argument("--width", type=int, help="in pixels; by default the pipeline's own")
    parser.add_argument("--height", type=int, help="in pixels; by default the pipeline's own")
    parser.add_argument("--guidance-scale", type=float, help="by default the pipeline's own")
    add_pipeline_kwargs(parser)
    parser.add_argument("--seed", type=int, default=0, help="for prompts without one (default: %(default)s)")
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--batch-size", type=int, default=1, help="images at a time (default: %(default)s)")
    parser.add_argument("--shard-rows", type=int, default=256, metavar="N", help="of a file (default: %(default)s)")
    add_place(parser)
    add_output(parser, workers=False)


def run(args: argparse.Namespace) -> int:
    from ..data.synthesize import Synthesize, prompt_shards, read_prompt_file

    rows = read_prompt_file(args.prompts)
    shards = prompt_shards(rows, args.pipeline, args.steps, images=args.images, seed=args.seed, size=args.shard_rows)
    device = device_of(args)
    precision = precision_on(device, args.precision)
    stage = Synthesize(
        args.width, args.height, args.guidance_scale, precision, args.batch_size, device, args.pipeline_kwargs
    )
    return run_stage_of(args, stage, shards, **place(args))
