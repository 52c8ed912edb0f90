# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor data drift NEW --known DATASET --detector NAME --output DIR`: does the detector know such images?"""

import argparse

from ..names import printable
from .data import add_dataset, add_looking, add_report, detectors_of, looking, place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_dataset(parser, "new", metavar="NEW", help="images of the new generator, also a folder of image files")
    add_dataset(parser, "--known", required=True, help="what the detector learned from, also a folder of image files")
    add_report(parser)
    parser.add_argument(
        "--images",
        type=int,
        default=1000,
        metavar="N",
        help="about how many of each side are compared (default: %(default)s)",
    )
    parser.add_argument(
        "--pictures",
        type=int,
        default=12,
        metavar="N",
        help="most of the farthest new images to show (default: %(default)s)",
    )
    add_looking(parser)


def run(args: argparse.Namespace) -> int:
    from ..data import Describe, drift, find_or_load_shards
    from ..data.shards import split_name
    from ..files import FolderInUse, listed

    if place(args)["world_size"] > 1:
        raise ValueError("`drift` looks at a sample of the images, in one process: start it without a launcher.")
    sides = [find_or_load_shards(*split_name(name), excluded=[args.output]) for name in (args.new, args.known)]
    describe = Describe.by(*detectors_of(args), **looking(args))
    try:
        result = drift(
            *sides,
            describe,
            args.output,
            images=args.images,
            threshold=args.threshold,
            pictures=args.pictures,
            names={"new": args.new, "known": args.known, "detector": args.detector[0]},
            restart=args.restart,
        )
    except FolderInUse as error:
        raise ValueError(f"`--output`: {error}") from error
    print(result["says"])
    for side, reasons in result["quarantined"].items():
        if reasons:
            print(f"Quarantined of the {side} images: {printable(listed(reasons))}")
    print(f"Report: {args.output}/report.html")
    return 0
