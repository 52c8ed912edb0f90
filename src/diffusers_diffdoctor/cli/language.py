# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What the commands that ask a language model have in common: which model, how it is asked, and what it may cost."""

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def add_language(parser: argparse.ArgumentParser, local: str) -> None:
    """Args: local: what a local model is for, as the help says it; empty where there is none."""
    parser.add_argument("--model", required=True, metavar="NAME", help="what the server calls it" + local)
    parser.add_argument(
        "--base-url",
        metavar="URL",
        help="of a server that speaks the chat completions protocol, such as http://localhost:8000/v1; without it the Hub's "
        "inference providers",
    )
    parser.add_argument(
        "--api-key-env",
        metavar="VARIABLE",
        help="environment variable that holds the key for the server; without it --base-url gets none",
    )
    parser.add_argument("--timeout", type=float, default=120, metavar="SECONDS", help="(default: %(default)s)")
    parser.add_argument(
        "--concurrency", type=int, default=8, metavar="N", help="requests at a time (default: %(default)s)"
    )
    parser.add_argument("--attempts", type=int, default=8, metavar="N", help="for one request (default: %(default)s)")
    parser.add_argument("--cache", metavar="FILE", help="where answers are kept (default: DIR.answers.sqlite)")
    parser.add_argument(
        "--max-requests", type=int, metavar="N", help="stop before more were sent, in all runs of the cache"
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="stop before more were used, in and out")
    parser.add_argument("--max-cost", type=float, metavar="MONEY", help="stop before more was spent; needs the prices")
    for way in ("in", "out"):
        parser.add_argument(
            f"--price-{way}", type=float, default=0.0, metavar="MONEY", help=f"of a million tokens {way}"
        )


def endpoint_of(args: argparse.Namespace) -> Any:
    from ..data.language import Endpoint

    key = None
    if args.api_key_env:
        key = os.environ.get(args.api_key_env)
        if not key:
            raise ValueError(f"`--api-key-env {args.api_key_env}`: this environment variable is not set. Export it.")
    return Endpoint(args.model, args.base_url, key, args.timeout, args.concurrency)


@contextmanager
def asking(args: argparse.Namespace, client: Any) -> Iterator[Any]:
    """The `Asker` of the arguments; what it did is printed, however it ends, and why it stopped becomes an error of the command."""
    from ..data.language import AnswerCache, Asker, Budget, BudgetSpent, NoAnswer

    budget = Budget(args.max_requests, args.max_tokens, args.max_cost, args.price_in, args.price_out)
    path = args.cache or f"{str(args.output).rstrip('/')}.answers.sqlite"
    asker = Asker(client, AnswerCache(path), budget, attempts=args.attempts)
    try:
        yield asker
    except (BudgetSpent, NoAnswer) as error:
        raise ValueError(str(error)) from error
    finally:
        print(asker.line())
        asker.cache.close()


def synonyms_of(path: str | None) -> dict[str, list[str]]:
    if path is None:
        return {}
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"`--synonyms {path}` is no JSON: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(others, list) for others in found.values()):
        raise ValueError(f'`--synonyms {path}` must hold an object of lists: {{"hand": ["palm"]}}.')
    return found
