# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor data prompts --balance DIR --model NAME --output DIR`: prompts for categories that need more images."""

import argparse
import json
from pathlib import Path

from .language import add_language, asking, endpoint_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--balance", metavar="PATH", help="folder, balance.json or categories.csv of data balance: the flagged ones"
    )
    which.add_argument("--categories", nargs="+", metavar="NAME", help="these")
    add_language(parser, "")
    parser.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="folder for prompts.jsonl; run again to continue"
    )
    parser.add_argument("--count", type=int, default=100, metavar="N", help="for each category (default: %(default)s)")
    parser.add_argument("--at-once", type=int, default=20, metavar="N", help="of one request (default: %(default)s)")
    parser.add_argument(
        "--most-rounds", type=int, default=20, metavar="N", help="for a category (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of requests and images (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="(default: %(default)s)")
    parser.add_argument("--least-words", type=int, default=3, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--most-words", type=int, default=60, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--language", default="en", help="code, or any for any (default: %(default)s)")
    parser.add_argument("--banned", nargs="+", default=[], metavar="WORD", help="prompts with these are left out")
    parser.add_argument(
        "--similarity", type=float, default=0.7, help="from which two prompts are one (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    from tqdm.auto import tqdm

    from ..data.prompts import PromptRules, flagged_categories, write_prompts
    from ..files import FolderInUse, listed, only_run, write_atomically

    language = None if args.language == "any" else args.language
    rules = PromptRules(args.least_words, args.most_words, language, tuple(args.banned), args.similarity)
    categories = args.categories or flagged_categories(args.balance)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    try:
        with (
            only_run(output),
            asking(args, endpoint_of(args)) as asker,
            tqdm(total=args.count * len(categories), desc="prompts", unit="prompt", mininterval=1) as bar,
        ):
            rows, counts = write_prompts(
                categories,
                asker,
                count=args.count,
                rules=rules,
                seed=args.seed,
                at_once=args.at_once,
                most_rounds=args.most_rounds,
                temperature=args.temperature,
                progress=bar.update,
            )
            lines = [json.dumps(row, ensure_ascii=False) for row in rows]
            write_atomically(output / "prompts.jsonl", "".join(f"{line}\n" for line in lines))
            write_atomically(output / "prompts.json", json.dumps(counts, indent=1, ensure_ascii=False) + "\n")
    except FolderInUse as error:
        raise ValueError(f"`--output`: {error}") from error
    print(f"{counts['written']} written = {counts['taken']} taken + {sum(counts['rejected'].values())} rejected")
    if counts["rejected"]:
        print(f"Rejected: {listed(counts['rejected'])}")
    if counts["short"]:
        print(f"Missing after {args.most_rounds} rounds: {listed(counts['short'])}")
    return 0 if rows else 1
