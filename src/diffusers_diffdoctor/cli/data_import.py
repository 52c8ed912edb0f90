# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor data import FORMAT SOURCE --output DIR`: annotations that exist, as rows of the source "human"."""

import argparse
from pathlib import Path

from .data import add_output, run_stage_of, searched


# format -> what it is, and what SOURCE is
FORMATS = {
    "richhf": ("RichHF-18K, with images of Pick-a-Pic", "a TFRecord file, or a folder with some"),
    "pal4vst": ("PAL4VST", "the folder with `images` and `labels`"),
    "had": ("the Human Artifact Dataset", "the folder with `annotations` and `images`"),
    "synthscars": ("SynthScars", "the JSON file"),
    "folders": ("images and masks of the same names", "the folder of the images"),
    "coco": ("a COCO file with polygons or masks", "the JSON file"),
    "label-studio": ("an export of Label Studio with brushes, polygons or rectangles", "the JSON file"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    formats = parser.add_subparsers(dest="format", metavar="FORMAT", required=True, title="formats")
    for name, (summary, source) in FORMATS.items():
        one = formats.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        one.add_argument("source", metavar="SOURCE", help=source)
        OPTIONS[name](one)
        one.add_argument("--generator", metavar="ID", help="model that made all images, where the format does not say")
        one.add_argument(
            "--category", nargs="+", default=[], metavar="NAME", help="what is in all images, such as hand"
        )
        one.add_argument(
            "--shard-size",
            type=float,
            default=256,
            metavar="MB",
            help="images of a Parquet file (default: %(default)s)",
        )
        add_output(one)


def run(args: argparse.Namespace) -> int:
    import dataclasses

    from ..data.readers import READERS

    if not args.shard_size > 0:
        raise ValueError(f"`--shard-size` must be positive, found {args.shard_size}.")
    kind = READERS[args.format]
    names = [field.name for field in dataclasses.fields(kind) if hasattr(args, field.name)]
    given = {name: getattr(args, name) for name in names}
    reader = kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})
    shards = reader.find(Path(args.source), args.shard_size)
    return run_stage_of(args, reader, shards, extra=searched(shards.found, shards.skipped))


# --- what formats have of their own: options named as the fields of their reader -------------------------------------------------


def _richhf(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images",
        required=True,
        metavar="PATH",
        help="folder of image files named by uid; or Pick-a-Pic: a folder with Parquet files, one, or an id of the Hub, such as "
        "yuvalkirstain/pickapic_v1, which is downloaded as a whole",
    )


def _split(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--split", default=default, metavar="NAME", help="that is imported (default: %(default)s)")


def _images(parser: argparse.ArgumentParser, default: str = "that of SOURCE") -> None:
    parser.add_argument("--images", metavar="DIR", help=f"folder of the images (default: {default})")


def _regions(parser: argparse.ArgumentParser) -> None:
    for name, what in (
        ("labels", "artifacts (default: all that are not named below)"),
        ("ignore", "not to count, such as unsure"),
        ("skip", "no matter"),
    ):
        flag = "--labels" if name == "labels" else f"--{name}-labels"
        parser.add_argument(flag, nargs="+", default=[], metavar="NAME", help=f"regions of these names are {what}")


def _pal4vst(parser: argparse.ArgumentParser) -> None:
    _split(parser, "train")
    parser.add_argument(
        "--artifact",
        type=int,
        choices=(1, 255),
        help="value of artifacts; with 1, 255 does not count (default: 1 in labels that have a 1, 255 in others)",
    )


def _folders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--masks", metavar="DIR", help="folder of the masks (default: `masks` in SOURCE or beside it)")
    parser.add_argument(
        "--suffix", default="", help="of a mask's name, before its ending: _mask for a.jpg and a_mask.png"
    )
    parser.add_argument(
        "--map-maximum",
        type=int,
        choices=(1, 255),
        help="value of an artifact (default: 255, and a doubtful 1 is refused)",
    )
    parser.add_argument("--ignore", type=int, metavar="VALUE", help="value of pixels that do not count")
    parser.add_argument(
        "--sound-without",
        action="store_true",
        help="images without a mask have no artifacts (default: they are quarantined)",
    )


def _had(parser: argparse.ArgumentParser) -> None:
    _split(parser, "train_ALL")
    _images(parser, "`images` of SOURCE")
    for level in ("mild", "severe"):
        parser.add_argument(
            f"--{level}", type=float, default=1.0, help=f"value of a {level} artifact, 0 to 1 (default: %(default)s)"
        )
    parser.add_argument(
        "--humans",
        default="ignore",
        choices=("ignore", "artifact", "skip"),
        help="what the box of a person says who lacks a part or has one too many: it does not count, it is an artifact, or nothing "
        "(default: %(default)s)",
    )


def _coco(parser: argparse.ArgumentParser) -> None:
    _images(parser)
    _regions(parser)


def _label_studio(parser: argparse.ArgumentParser) -> None:
    _coco(parser)
    parser.add_argument(
        "--image-key", default="image", metavar="KEY", help="of the image in a task's data (default: %(default)s)"
    )
    parser.add_argument(
        "--predictions",
        action="store_true",
        help='also take the predictions of tasks that nobody has annotated, as rows of the source "pseudo"',
    )


OPTIONS = {
    "richhf": _richhf,
    "pal4vst": _pal4vst,
    "had": _had,
    "synthscars": _images,
    "folders": _folders,
    "coco": _coco,
    "label-studio": _label_studio,
}
