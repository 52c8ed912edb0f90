# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor data balance DATASET --output DIR`: categories and generators that stand out, as a table, a picture and a report."""

import argparse

from ..names import printable
from .data import add_dataset, add_report, shards_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_dataset(parser, "dataset", help="images that a detector has labelled")
    add_report(parser)
    parser.add_argument(
        "--sources",
        nargs="+",
        default=["pseudo"],
        metavar="SOURCE",
        help="rows of these only: human, photo, pseudo, injected, rendered (default: pseudo)",
    )
    parser.add_argument(
        "--min-images",
        type=int,
        default=20,
        metavar="N",
        help="groups with fewer images are listed but not judged (default: %(default)s)",
    )
    parser.add_argument(
        "--cutoff",
        type=float,
        default=3.5,
        help="robust standard deviations from which a group stands out (default: %(default)s)",
    )
    parser.add_argument("--workers", type=int, default=1, help="processes (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    from ..data import balance
    from ..files import FolderInUse

    try:
        result = balance(
            shards_of(args.dataset),
            args.output,
            threshold=args.threshold,
            sources=args.sources,
            min_images=args.min_images,
            cutoff=args.cutoff,
            workers=args.workers,
            restart=args.restart,
        )
    except FolderInUse as error:
        raise ValueError(f"`--output`: {error}") from error
    bad = sum(result["quarantined"].values())
    print(f"{result['images']} images, {result['left_out']} rows left out, {bad} quarantined")
    for kind in ("categories", "generators"):
        groups = result[kind]
        judged = [group for group in groups if group["deviation"] is not None]
        flagged = [group for group in judged if group["flag"]]
        print(
            f"{len(flagged)} of {len(judged)} {kind} stand out; {len(groups) - len(judged)} more have fewer than "
            f"{result['min_images']} images"
        )
        for group in flagged:
            print(
                f"  {group['flag']:>4}  {100 * group['share']:5.1f} % of {group['images']:>6}  {group['deviation']:+6.1f}  "
                f"{printable(group['name'])}"
            )
    print(f"Report: {args.output}/report.html")
    return 0
