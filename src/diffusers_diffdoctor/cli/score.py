# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor score PATH... --reward NAME...`: a table of what rewards say of image files."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ..names import printable
from .reach import check_reachable


DETECTOR = "detector"
SUFFIXES = (".csv", ".json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="image files, or folders that are searched for images"
    )
    parser.add_argument(
        "--reward",
        nargs="+",
        required=True,
        metavar="NAME",
        help="aesthetic, clip, hpsv2, image_reward, pickscore, each with its published weights or as NAME=WHERE with those of an id, a "
        "folder or a file; FILE.py:FUNCTION of (images, prompts); the http:// address of a server; or detector",
    )
    parser.add_argument(
        "--detector", metavar="NAME", help="Hub id or folder of the detector of `--reward detector`; or miniature"
    )
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--prompt", metavar="TEXT", help="what all the images were to show")
    asked.add_argument(
        "--prompts",
        metavar="FILE",
        help="what each was to show: a .csv, .jsonl or .json file with file_name and prompt, as metadata.jsonl of an image folder, or a "
        "file with one prompt for each image in the order of their names",
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="also write the table: .csv or .json")
    parser.add_argument(
        "--batch-size", type=int, default=8, help="most images of one size at a time (default: %(default)s)"
    )
    parser.add_argument("--device", default=None, help="such as cpu, cuda, cuda:1, mps; by default the best there is")


def run(args: argparse.Namespace) -> int:
    from ..evaluation.scores import score_images
    from ..files import find_images
    from ..rewards import CombinedReward
    from .diagnose import NO_DEFAULT, checked_device, find_detector, open_detector

    check_reward_names(args.reward)
    if args.batch_size < 1:
        raise ValueError(f"`--batch-size` must be at least 1, found {args.batch_size}.")
    if args.output is not None and not args.output.lower().endswith(SUFFIXES):
        raise ValueError(f"`--output {args.output}` must end in one of {', '.join(SUFFIXES)}.")
    if DETECTOR in args.reward and args.detector is None:
        raise ValueError(f"`--reward detector` needs a `--detector`, which is missing: {NO_DEFAULT}")
    device = checked_device(args.device)
    found = find_images(args.paths)
    prompts = _prompts(args, found.images)
    check_rewards_are_there(args.reward)
    rewards = CombinedReward(
        [
            open_detector(find_detector(args.detector, "--detector"), device) if name == DETECTOR else name
            for name in args.reward
        ]
    ).to(device)
    by_name = dict(zip(rewards.names, rewards.rewards))
    if args.prompt is None and args.prompts is None:
        readers = [name for name, reward in by_name.items() if getattr(reward, "reads_prompts", False)]
        if readers:
            raise ValueError(
                f"{', '.join(readers)} compare images with prompts: say what they show by `--prompt` or `--prompts`."
            )
    rows, quarantined = score_images(found.images, prompts, by_name, args.batch_size, device)
    first = rewards.names[0]
    rows.sort(key=lambda row: -row[first])
    _print(rows, rewards.names)
    print(f"{len(found)} found = {len(rows)} scored + {len(quarantined)} quarantined + {len(found.skipped)} skipped")
    for row in quarantined[:10]:
        print(f"Quarantined: {printable(row['path'])}: {printable(row['reason'])}")
    if args.output is not None:
        _write(Path(args.output), rows, quarantined, rewards.names)
        print(f"Table: {args.output}")
    return 0 if rows else 1


def check_reward_names(names: Sequence[str]) -> None:
    """Refuse what names no reward of `--reward`, before anything is loaded."""
    from ..rewards.registry import check_reward_name

    for name in names:
        try:
            check_reward_name(name, (DETECTOR,))
        except (ValueError, OSError) as error:
            raise ValueError(f"`--reward`: {error}") from error


def check_rewards_are_there(names: Sequence[str]) -> None:
    """Refuse weights that the Hub does not have, without its long retries."""
    from ..rewards.registry import REWARDS

    for name in names:
        short, _, where = name.partition("=")
        if short in REWARDS:
            published, file = REWARDS[short].published
            if not Path(where or published).exists():
                check_reachable(where or published, "--reward", file=file)


def _prompts(args: argparse.Namespace, images: list[Path]) -> list[str]:
    from ..treatment.prompt_files import read_image_prompts

    if args.prompts is None:
        return [args.prompt or ""] * len(images)
    try:
        return read_image_prompts(args.prompts, images)
    except (ValueError, OSError) as error:
        raise ValueError(f"`--prompts`: {error}") from error


def _print(rows: list[dict], names: list[str]) -> None:
    widths = [max(10, len(name)) for name in names]
    titles = "  ".join(f"{name:>{width}}" for name, width in zip(names, widths))
    print(f"{titles}  image")
    for row in rows:
        numbers = "  ".join(f"{row[name]:>{width}.4f}" for name, width in zip(names, widths))
        print(f"{numbers}  {printable(row['path'])}")
    if len(rows) > 1:
        means = (sum(row[name] for row in rows) / len(rows) for name in names)
        print("  ".join(f"{mean:>{width}.4f}" for mean, width in zip(means, widths)) + f"  mean of {len(rows)}")


def _write(path: Path, rows: list[dict], quarantined: list[dict], names: list[str]) -> None:
    from ..files import write_atomically
    from ..tables import write_csv

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".csv":
        write_csv(path, ["path", "prompt", *names], rows)
    else:
        means = {name: sum(row[name] for row in rows) / len(rows) for name in names if rows}
        write_atomically(
            path, json.dumps({"means": means, "images": rows, "quarantined": quarantined}, indent=1) + "\n"
        )
