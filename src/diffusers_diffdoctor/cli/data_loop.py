# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor data loop --config loop.yaml`: the rounds that make a detector robust, in one command that one starts again and again."""

import argparse
import gc
import subprocess
import sys
import time
from collections.abc import Sequence


WAITS = 3  # exit status: people have to paint first
LOOK_AGAIN = 10.0  # seconds between two looks whether they have
# What the loop gives a command itself, so that a section cannot.
ITS_OWN = {
    "restart", "output", "output_dir", "detector", "flagged", "balance", "categories", "rank", "world_size", "train_dataset",
    "overwrite_output_dir", "resume_from_checkpoint", "config_file",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML: what the rounds are made of")
    parser.add_argument("-o", "--output", metavar="DIR", help="folder of the loop, instead of the file's `output_dir`")
    parser.add_argument(
        "--wait",
        action="store_true",
        help=f"where people have to paint, stay until they have; without it the command ends with status {WAITS}",
    )


def run(args: argparse.Namespace) -> int:
    from ..data.loop import Loop, Waiting, read_settings
    from ..data.loop.report import FIGURES, cells
    from ..files import FolderInUse
    from .evaluate_detector import print_table

    settings = read_settings(args.config, args.output)
    check_sections(settings, args.config)
    loop = Loop(settings, lambda words, spread: run_command(words, settings.launcher if spread else ()), _say)
    while True:
        try:
            rounds = loop.work()
            break
        except FolderInUse as error:
            raise ValueError(f"`output_dir`: {error}") from error
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            _say(f"\nStopped. What is done is kept in {settings.output_dir}: run the same command again to continue.")
            return 130
        except Waiting as waiting:
            _say(f"{waiting}\nPaint: {waiting.command()}")
            if not args.wait:
                _say("Then run the same command again.")
                return WAITS
            await_people(loop, waiting)
    for name in rounds[-1]["figures"]:
        _say(f"\n{name}:")
        found = [one for one in rounds if name in one["figures"]]
        print_table(
            ["", *FIGURES.values()], [[f"round {one['round']}", *cells(one["figures"][name]["all"])] for one in found]
        )
    _say(f"\nReport: {loop.of(settings.rounds, 'report.html')}")
    return 0


def _say(text: str) -> None:
    print(text, flush=True)


def await_people(loop, waiting) -> None:
    """Look now and then until enough masks are there. No lock is held meanwhile."""
    from tqdm.auto import tqdm

    with tqdm(total=waiting.wanted, initial=waiting.wanted - waiting.missing, desc="masks", unit="mask") as bar:
        while (missing := loop.missing(waiting)) > 0:
            bar.update(waiting.wanted - missing - bar.n)
            time.sleep(LOOK_AGAIN)
        bar.update(waiting.wanted - bar.n)


def run_command(words: Sequence[str], launcher: Sequence[str] = ()) -> int:
    """Run a command of `diffdoctor` in this process, or by a launcher. Returns its exit status."""
    if launcher:
        return subprocess.run([*launcher, "-m", "diffdoctor", *words]).returncode
    import torch

    from diffdoctor import main

    from ..data.by_detector import release_detectors
    from ..data.synthesize import release_pipelines

    try:
        status = main(words)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    release_detectors()
    release_pipelines()
    gc.collect()
    torch.cuda.empty_cache()  # nothing where there is no such device
    if status == 130:
        raise KeyboardInterrupt
    return status


def check_sections(settings, path: str) -> None:
    """Refuse now what a command would refuse hours later. Ends the program, as wrong use of that command does.

    Raises:
        ValueError: a section gives what is the loop's own to give.
    """
    import importlib

    from diffdoctor import Parser

    from ..data.loop.settings import SECTIONS, arguments

    given = {
        "categorize": ["pool"],
        "label": ["pool", "--detector", "detector"],
        "balance": ["pool"],
        "prompts": ["--balance", "balance"],
        "synthesize": ["prompts"],
        "mine": ["pool", "--detector", "detector"],
    }
    for name in SECTIONS:
        section = getattr(settings, name)
        if section is None or name == "annotate":
            continue
        own = sorted({str(key).replace("-", "_") for key in section} & ITS_OWN)
        if own:
            raise ValueError(f"{path!r}, `{name}`: the loop gives `{own[0]}` itself; leave it out.")
        if name == "train":
            _check_training(settings, path)
            continue
        parser = Parser(prog=f"{path}: {name}")
        importlib.import_module(f".data_{name}", __package__).add_arguments(parser)
        parser.parse_args([*given[name], "--output", "out", *arguments(section)])


def _check_training(settings, path: str) -> None:
    from ..data.loop.settings import arguments
    from .train_detector import check_model_is_there, parse, read_names

    words = ["--train_dataset", "masks", "--output_dir", settings.output_dir, *arguments(settings.train, "_")]
    parse(words, prog=f"{path}: train")
    try:  # what is trained on and from, which is otherwise asked for when people have painted
        read_names(settings.train_dataset, "train_dataset")
        check_model_is_there(settings.train.get("model", settings.detector))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path!r}: {error}") from error
