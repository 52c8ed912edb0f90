# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor data merge DATASET... --output DIR`: several datasets as one."""

import argparse

from .data import add_dataset, add_output, run_stage_of, shards_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_dataset(parser, "datasets", nargs="+", help="what is merged, in this order")
    parser.add_argument(
        "--weights",
        nargs="+",
        type=float,
        help="proportions in which rows of the datasets are taken, as many as there can be without taking one twice; without it "
        "all rows are",
    )
    add_output(parser)


def run(args: argparse.Namespace) -> int:
    from ..data import Merge, common_columns, shares_of

    parts = [shards_of(name, number) for number, name in enumerate(args.datasets)]
    shards = [shard for part in parts for shard in part]
    shares = shares_of([sum(shard.rows for shard in part) for part in parts], args.weights)
    return run_stage_of(args, Merge(shares, common_columns(shards)), shards)
