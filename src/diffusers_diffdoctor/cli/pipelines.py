# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What the commands that call a pipeline have in common: whatever else it is called with."""

import argparse
import json


def add_pipeline_kwargs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pipeline-kwargs",
        type=named_values,
        default={},
        metavar="JSON",
        help="what else the pipeline is called with, such as '{\"max_sequence_length\": 256}'",
    )


def named_values(text: str) -> dict:
    """A JSON object."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'must be a JSON object such as {{"guidance_scale": 3.5}}, found {text!r}')
    return found
