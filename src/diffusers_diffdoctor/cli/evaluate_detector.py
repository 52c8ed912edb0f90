# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor evaluate-detector DATASET --detector NAME --output DIR`: figures of a detector, and pictures of its worst mistakes."""

import argparse
from pathlib import Path

from ..names import printable
from .data import add_dataset, add_looking, add_report, detectors_of, looking, place


RECORD = "training.json"  # beside the weights, of the trainer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_dataset(parser, "dataset", help="labelled images, also a folder of images with a metadata.jsonl")
    add_report(parser, "confidence, and truth, in (0, 1] from which a pixel is an artifact")
    parser.add_argument("--tile", action="store_true", help="also look at large images piece by piece")
    parser.add_argument(
        "--pictures",
        type=int,
        default=12,
        metavar="N",
        help="most false alarms, and most misses, to show (default: %(default)s)",
    )
    add_looking(parser)
    parser.add_argument(
        "--card",
        action="store_true",
        help="write the figures into the model card of the detector, which must be a folder",
    )


def run(args: argparse.Namespace) -> int:
    from ..data import Compare, evaluate_detector, find_or_load_shards
    from ..data.shards import split_name
    from ..evaluation.detector_figures import figure_table
    from ..files import FolderInUse, listed

    if args.card and not Path(args.detector[0]).is_dir():
        raise ValueError(
            f"`--card` writes into the detector's folder, but `--detector {args.detector[0]}` is none here."
        )
    shards = find_or_load_shards(*split_name(args.dataset))
    stage = Compare.by(*detectors_of(args), **looking(args), tile=args.tile, threshold=args.threshold)
    try:
        result = evaluate_detector(
            stage,
            shards,
            args.output,
            detector_name=args.detector[0],
            dataset_name=args.dataset,
            pictures=args.pictures,
            restart=args.restart,
            **place(args),
        )
    except FolderInUse as error:
        raise ValueError(f"`--output`: {error}") from error
    if result is None:
        print("This process is done. Others are not yet, or were stopped: run the command again to finish.")
        return 0
    print_table(*figure_table(result["figures"]))
    print(
        f"{result['labelled']} labelled, {result['left_out']} left out, {sum(result['quarantined'].values())} quarantined"
    )
    if result["quarantined"]:
        print(f"Quarantined: {printable(listed(result['quarantined']))}")
    print(f"Report: {args.output}/report.html")
    if args.card:
        _write_card(Path(args.detector[0]), result, stage.models()[0])
    return 0


def _write_card(folder: Path, result: dict, model) -> None:
    from ..detector.model_card import CARD, write_card
    from ..training.record import read_record

    record = read_record(folder / RECORD) if (folder / RECORD).is_file() else None
    if write_card(folder, model, record=record, evaluation=result):
        print(f"Card: {folder / CARD}")
    else:
        print(f"{folder / CARD} was edited and is kept; delete it to have it written anew.")


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    """A column is as wide as its longest entry; the first is cut at 40 letters."""
    lines = [columns, *([printable(row[0])[:40], *row[1:]] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    for first, *others in lines:
        print("  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:]))]))
