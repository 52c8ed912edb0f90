# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor data annotate DATASET --queue DIR --output DIR`: the masks that people painted, as rows."""

import argparse

from .data import add_dataset, add_output, run_stage_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_dataset(parser, "dataset", help="the images that were painted on")
    parser.add_argument(
        "--queue",
        required=True,
        metavar="DIR",
        help="folder that keeps the masks, of `diffdoctor ui`; it may be in use",
    )
    add_output(parser)


def run(args: argparse.Namespace) -> int:
    from ..data import find_or_load_shards
    from ..data.annotate import annotate
    from ..data.shards import split_name

    shards = find_or_load_shards(*split_name(args.dataset), excluded=[args.queue, args.output])
    return run_stage_of(args, annotate(args.queue), shards)
