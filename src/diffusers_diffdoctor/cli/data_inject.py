# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor data inject DATASET --output DIR`: artifacts without annotators."""

import argparse

from .data import add_dataset, add_output, run_stage_of, shards_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_dataset(
        parser, "dataset", help="sound images, such as what `data photos` makes: maps of zeros, or photographs"
    )
    parser.add_argument("--share", type=float, default=0.6, help="of the rows that are spoiled (default: %(default)s)")
    parser.add_argument(
        "--kinds",
        nargs="+",
        metavar="KIND[=WEIGHT]",
        help="kinds of artifacts, those without a weight with 1: duplicate, omit, misplace, distort, fuse, melt, watermark, seam, "
        "and repaint with a pipeline (default: all but repaint, mostly the first three; with a pipeline repaint)",
    )
    parser.add_argument(
        "--counts",
        nargs="+",
        metavar="NUMBER=WEIGHT",
        help="how many injections a spoiled image gets (default: 1=0.6 2=0.25 3=0.15)",
    )
    parser.add_argument(
        "--boxes",
        metavar="COLUMN",
        help="column with boxes [[x1, y1, x2, y2], ...] in pixels, such as hands and faces, in which to inject; by default, and in "
        "rows without boxes, where something stands out",
    )
    parser.add_argument(
        "--least-size",
        type=float,
        default=0.08,
        help="diameter of a region, as a share of the shorter side (default: %(default)s)",
    )
    parser.add_argument(
        "--most-size", type=float, default=1 / 3, help="the same, of the largest region (default: a third)"
    )
    parser.add_argument(
        "--decoys",
        type=float,
        default=0.5,
        help="chance that some regions of an image, spoiled or not, are retouched and stay sound, so that the traces of the tools say "
        "nothing (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of chance (default: %(default)s)")
    pipeline = parser.add_argument_group("regions drawn anew by a generator")
    pipeline.add_argument(
        "--pipeline",
        metavar="ID",
        help="Hub id or folder of a pipeline that diffusers' AutoPipelineForInpainting loads",
    )
    pipeline.add_argument(
        "--prompts",
        nargs="+",
        default=[""],
        metavar="TEXT",
        help="one is chosen for each region; a wrong one, or none, makes mistakes (default: none)",
    )
    pipeline.add_argument("--steps", type=int, default=8, help="few make mistakes (default: %(default)s)")
    pipeline.add_argument(
        "--strength", type=float, default=0.9, help="share of the noise it starts from (default: %(default)s)"
    )
    pipeline.add_argument(
        "--size", type=int, default=512, help="longer side in pixels at which it paints (default: %(default)s)"
    )
    pipeline.add_argument(
        "--precision",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="of the pipeline (default: %(default)s)",
    )
    pipeline.add_argument("--device", help="such as cpu, cuda, cuda:1, mps; by default the best there is")
    add_output(parser)


def run(args: argparse.Namespace) -> int:
    from ..data import Inject
    from .diagnose import best_device

    names = ("share", "boxes", "least_size", "most_size", "decoys", "seed")
    names += ("pipeline", "steps", "strength", "size", "precision")
    settings = {name: getattr(args, name) for name in names}
    settings |= {name: _weights(args, name) for name in ("kinds", "counts") if getattr(args, name)}
    if args.pipeline:
        settings["device"] = args.device or best_device()
    settings["prompts"] = tuple(args.prompts)
    return run_stage_of(args, Inject(**settings), shards_of(args.dataset))


def _weights(args: argparse.Namespace, name: str) -> dict[str, float]:
    weights = {}
    for entry in getattr(args, name):
        key, equals, weight = entry.partition("=")
        try:
            weights[key] = float(weight) if equals else 1.0
        except ValueError:
            raise ValueError(f"`--{name}` takes NAME=WEIGHT with a number for the weight, found {entry!r}.") from None
    return weights
