# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor data STAGE`: one stage of the data engine. A stage is a row of `STAGES` and a module `data_<stage>` beside this one."""

import argparse
import importlib
from collections.abc import Sequence
from typing import Any


# stage -> what it does
STAGES = {
    "photos": "real photographs, from a folder or a dataset, as rows without artifacts",
    "merge": "several datasets as one, in given proportions",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    stages = parser.add_subparsers(dest="stage", metavar="STAGE", required=True, title="stages")
    for name, summary in STAGES.items():
        stage = stages.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        _module(name).add_arguments(stage)


def run(args: argparse.Namespace) -> int:
    return _module(args.stage).run(args)


def _module(name: str):
    return importlib.import_module(f".data_{name}", __package__)


# --- what stages have in common ------------------------------------------------------------------------------------------------


def add_dataset(parser: argparse.ArgumentParser, *flags: str, **options: Any) -> None:
    """An argument that names a dataset."""
    options.setdefault("metavar", "DATASET")
    what = options.pop("help", "the dataset")
    parser.add_argument(
        *flags,
        **options,
        help=f"{what}: a folder of a stage, or with Parquet files, or the id of one on the Hub; NAME:SPLIT",
    )


def add_output(parser: argparse.ArgumentParser, workers: bool = True) -> None:
    """Where the dataset goes that the stage makes, and how."""
    parser.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="folder of the new dataset; run again to continue"
    )
    if workers:
        parser.add_argument("--workers", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument(
        "--restart", action="store_true", help="replace what another stage or other settings left in DIR"
    )
    parser.add_argument("--push-to-hub", metavar="ID", help="upload the finished dataset to this repository")
    parser.add_argument("--private", action="store_true", help="make a repository that is created private")


def shards_of(name: str, number: int = 0) -> list:
    """The shards of a dataset of the command line."""
    from ..data import find_shards
    from ..data.shards import split_name

    return find_shards(*split_name(name), number=number)


def run_stage_of(args: argparse.Namespace, stage: Any, shards: Sequence, **options: Any) -> int:
    """Run the stage as [`add_output`] says, print the counts, push. Returns the exit status."""
    from ..data import push_dataset, run_stage
    from ..data.stage import line_of
    from ..files import FolderInUse, listed

    options.setdefault("workers", getattr(args, "workers", 1))
    try:
        counts = run_stage(stage, shards, args.output, restart=args.restart, **options)
    except FolderInUse as error:
        raise ValueError(f"`--output`: {error}") from error
    except KeyboardInterrupt:
        print(f"\nStopped. What is done is kept in {args.output}: run the same command again to continue.")
        return 130
    if counts is None:
        print(
            f"This process is done. Others are not yet, or were stopped: run the command again to finish {args.output}."
        )
        return 0
    print(line_of(counts))
    if counts["quarantined"]:
        print(f"Quarantined ({args.output}/quarantine): {listed(counts['quarantined'])}")
    if args.push_to_hub:
        print(push_dataset(args.output, args.push_to_hub, private=args.private or None))
    return 0 if sum(counts["rows_out"].values()) else 1
