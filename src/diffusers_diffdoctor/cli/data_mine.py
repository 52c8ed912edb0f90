# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor data mine DATASET --detector NAME... --output DIR`: splits "hard" and "simple"."""

import argparse
import json
from pathlib import Path

from .data import add_dataset, add_looking, add_output, detectors_of, looking, place, report, shards_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_dataset(parser, "dataset", help="what is searched")
    parser.add_argument("--count", type=int, default=2000, help="of hard cases (default: %(default)s, the paper's)")
    parser.add_argument(
        "--flagged",
        nargs="+",
        default=[],
        metavar="CATEGORY",
        help="categories that stand out, or the JSON file of `balance`",
    )
    parser.add_argument(
        "--flagged-share",
        type=float,
        default=0.5,
        help="of the hard cases from these categories (default: %(default)s)",
    )
    parser.add_argument(
        "--at-random", action="store_true", help="choose by chance instead: the control of an experiment"
    )
    parser.add_argument("--seed", type=int, default=0, help="of chance (default: %(default)s)")
    add_looking(parser, several=True)
    add_output(parser)


def run(args: argparse.Namespace) -> int:
    from ..data import Score, mine

    flagged = args.flagged
    if len(flagged) == 1 and flagged[0].endswith(".json"):
        flagged = _flagged_of(Path(flagged[0]))
    shards = shards_of(args.dataset)
    score = Score.by(*detectors_of(args), **looking(args))
    options = {"flagged": flagged, "flagged_share": args.flagged_share, "at_random": args.at_random, "seed": args.seed}
    options |= {"workers": args.workers, "restart": args.restart, **place(args)}
    return report(args, lambda: mine(score, shards, args.output, args.count, **options))


def _flagged_of(path: Path) -> list[str]:
    try:
        return [str(name) for name in json.loads(path.read_text(encoding="utf-8"))["flagged"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"`--flagged {path}` is no result of `diffdoctor data balance`: it has no list `flagged`."
        ) from error
