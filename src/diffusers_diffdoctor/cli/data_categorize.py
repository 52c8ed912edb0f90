# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor data categorize DATASET --model NAME --output DIR`: what is in each image, by a language model that sees.

A local model on several GPUs: accelerate launch -m diffdoctor data categorize ... --local, with the same arguments.
"""

import argparse

from .data import add_dataset, add_output, add_place, device_of, place, precision_on, run_stage_of, shards_of
from .language import add_language, asking, endpoint_of, synonyms_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_dataset(parser, "dataset", help="the images")
    add_language(parser, "; with --local the Hub id or folder of an image-text-to-text model")
    parser.add_argument("--local", action="store_true", help="a model of transformers in this process, not a server")
    parser.add_argument(
        "--likelihood",
        action="store_true",
        help="with --local: choose from the vocabulary by likelihood, one look for each name, instead of letting the model write",
    )
    parser.add_argument("--vocabulary", nargs="+", default=[], metavar="NAME", help="the only names; by default any")
    parser.add_argument("--synonyms", metavar="FILE", help='JSON: {"hand": ["palm", "fist"], ...}')
    parser.add_argument("--most", type=int, default=5, metavar="N", help="names for an image (default: %(default)s)")
    parser.add_argument(
        "--side", type=int, default=768, help="longest side that is shown, in pixels (default: %(default)s)"
    )
    parser.add_argument("--again", action="store_true", help="also replace categories that are there")
    add_place(parser, "of a local model; by default the best there is")
    add_output(parser, workers=False)


def run(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from ..data.categorize import Categorize
    from ..names import shortened

    if args.likelihood and not (args.local and args.vocabulary):
        raise ValueError(
            "`--likelihood` chooses from a vocabulary by a local model: give --local and --vocabulary too."
        )
    if args.local and (args.base_url or args.api_key_env):
        raise ValueError("`--local` asks no server: leave out --base-url and --api-key-env.")
    shards = shards_of(args.dataset)
    synonyms = tuple((name, tuple(others)) for name, others in synonyms_of(args.synonyms).items())
    how = ":likelihood" if args.likelihood else ""
    stage = Categorize(
        f"{shortened(args.model)}{how}", tuple(args.vocabulary), synonyms, args.most, args.side, args.again
    )
    with asking(args, _local(args) if args.local else endpoint_of(args)) as asker:
        return run_stage_of(args, replace(stage, asker=asker), shards, **place(args))


def _local(args: argparse.Namespace):
    import torch

    from ..data.language.local import LocalModel

    device = device_of(args)
    return LocalModel(
        args.model, likelihood=args.likelihood, device=device, dtype=getattr(torch, precision_on(device))
    )
