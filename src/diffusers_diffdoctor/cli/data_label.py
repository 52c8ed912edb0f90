# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor data label DATASET --detector NAME --output DIR`: pseudo-labels.

On several GPUs: accelerate launch -m diffdoctor data label ..., with the same arguments. On several machines that share a disk:
`--rank` and `--world-size`, which a scheduler's array job knows, or datatrove's executors (see the documentation).
"""

import argparse

from .data import add_dataset, add_looking, add_output, detectors_of, looking, place, run_stage_of, shards_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_dataset(parser, "dataset", help="the images")
    parser.add_argument("--tile", action="store_true", help="also look at large images piece by piece")
    parser.add_argument(
        "--relabel", action="store_true", help="also replace labels of people, photographs, injection and rendering"
    )
    parser.add_argument(
        "--full-size", action="store_true", help="store maps at the size of images, not a quarter of the side"
    )
    parser.add_argument(
        "--floor",
        type=float,
        default=0.0,
        help="confidence in [0, 1] below which a pixel is labelled sound, so that faint doubts are not taught (default: %(default)s)",
    )
    add_looking(parser)
    add_output(parser, workers=False)


def run(args: argparse.Namespace) -> int:
    from ..data import Label

    shards = shards_of(args.dataset)
    options = {name: getattr(args, name) for name in ("tile", "relabel", "full_size", "floor")}
    stage = Label.by(*detectors_of(args), **looking(args), **options)
    return run_stage_of(args, stage, shards, **place(args))
