# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor data export label-studio DATASET --output DIR`: a folder for people who correct masks elsewhere."""

import argparse

from .data import add_dataset, add_report, shards_of


# format -> what is written
FORMATS = {"label-studio": "tasks of Label Studio, with masks as brushes, their images, and how to load them"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    formats = parser.add_subparsers(dest="format", metavar="FORMAT", required=True, title="formats")
    for name, summary in FORMATS.items():
        one = formats.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        add_dataset(one, "dataset", help="what is exported")
        add_report(one, "confidence in (0, 1] from which a pixel of a soft map is covered")
        one.add_argument(
            "--image-prefix",
            metavar="URL",
            help="what stands before an image's name in the tasks, such as https://example.com/images/ or s3://bucket/images/; "
            "by default the images are Label Studio's local files",
        )
        one.add_argument("--workers", type=int, default=1, help="processes (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    from ..data import export_label_studio
    from ..data.stage import line_of
    from ..files import FolderInUse, listed

    try:
        counts = export_label_studio(
            shards_of(args.dataset),
            args.output,
            threshold=args.threshold,
            image_prefix=args.image_prefix,
            workers=args.workers,
            restart=args.restart,
        )
    except FolderInUse as error:
        raise ValueError(f"`--output`: {error}") from error
    print(line_of(counts))
    if counts["quarantined"]:
        print(f"Quarantined ({args.output}/quarantine.jsonl): {listed(counts['quarantined'])}")
    print(
        f"Tasks: {counts['annotations']} annotated, {counts['predictions']} predicted, {counts['unlabelled']} unlabelled. "
        f"How to load them: {args.output}/README.md"
    )
    return 0 if sum(counts["rows_out"].values()) else 1
