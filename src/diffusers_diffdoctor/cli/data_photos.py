# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor data photos PATH... --output DIR`: photographs as rows without artifacts."""

import argparse
from pathlib import Path

from .data import add_output, run_stage_of, searched, shards_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="image files and folders that are searched for images; or one dataset: a folder with Parquet files, or an id of the "
        "Hub (NAME:SPLIT), with a column `image`",
    )
    parser.add_argument(
        "--category", nargs="+", default=[], metavar="NAME", help="what is in all of them, such as hand"
    )
    parser.add_argument(
        "--least-side",
        type=int,
        default=32,
        help="quarantine images with a shorter side, in pixels (default: %(default)s)",
    )
    parser.add_argument(
        "--shard-size", type=float, default=256, metavar="MB", help="size of the Parquet files (default: %(default)s)"
    )
    add_output(parser)


def run(args: argparse.Namespace) -> int:
    from ..data import Photos, group_files
    from ..files import find_images

    if not args.shard_size > 0:
        raise ValueError(f"`--shard-size` must be positive, found {args.shard_size}.")
    paths = [Path(path) for path in args.paths]
    stage, extra = Photos(tuple(args.category), args.least_side), {}
    tabular = len(paths) == 1 and (
        not paths[0].exists()
        or paths[0].suffix == ".parquet"
        or (paths[0].is_dir() and any(paths[0].rglob("*.parquet")))
    )
    if tabular:
        shards = shards_of(args.paths[0])
    else:
        found = find_images(paths, excluded=[args.output])
        tops = [path.absolute() if path.is_dir() else path.absolute().parent for path in paths]
        shards = group_files([(file, _name(file, tops)) for file in found.images], args.shard_size)
        extra = searched(len(found), found.reasons())
    return run_stage_of(args, stage, shards, extra=extra)


def _name(file: Path, tops: list[Path]) -> str:
    """What a row calls the file: its path below the folder that was named, which is nobody's business."""
    top = next((top for top in tops if file.is_relative_to(top)), file.parent)
    return file.relative_to(top).as_posix()
