# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor data STAGE`: one stage of the data engine. A stage is a row of `STAGES` and a module `data_<stage>` beside this one."""

import argparse
import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any


# stage -> what it does
STAGES = {
    "import": "annotations that exist, of RichHF-18K, PAL4VST, COCO and others, as rows of one schema",
    "photos": "real photographs, from a folder or a dataset, as rows without artifacts",
    "inject": "artifacts without annotators: a share of sound images is spoiled, and it is known where",
    "categorize": "what is in each image, named by a language model that sees",
    "label": "a detector's own maps for images without a better label",
    "balance": "categories and generators in which a detector sees more artifacts, or fewer, than elsewhere",
    "mine": "the hard cases of a dataset, which people should label, apart from the simple ones",
    "annotate": "the masks that people painted in `diffdoctor ui`, where they agree",
    "export": "masks for people to correct, as tasks of Label Studio",
    "drift": "whether a new generator's images look like what a detector knows",
    "prompts": "prompts for categories that need more images, written by a language model",
    "synthesize": "images for prompts, by any pipelines of diffusers",
    "merge": "several datasets as one, in given proportions",
    "loop": "all of it round by round, until the detector is robust: waits for people, skips what is done",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    stages = parser.add_subparsers(dest="stage", metavar="STAGE", required=True, title="stages")
    for name, summary in STAGES.items():
        stage = stages.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        _module(name).add_arguments(stage)


def run(args: argparse.Namespace) -> int:
    return _module(args.stage).run(args)


def _module(name: str):
    return importlib.import_module(f".data_{name}", __package__)


# --- what stages have in common ------------------------------------------------------------------------------------------------


def add_dataset(parser: argparse.ArgumentParser, *flags: str, **options: Any) -> None:
    """An argument that names a dataset."""
    options.setdefault("metavar", "DATASET")
    what = options.pop("help", "the dataset")
    parser.add_argument(
        *flags,
        **options,
        help=f"{what}: a folder of a stage, or with Parquet files, or the id of one on the Hub; NAME:SPLIT",
    )


def add_output(parser: argparse.ArgumentParser, workers: bool = True) -> None:
    """Where the dataset goes that the stage makes, and how."""
    parser.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="folder of the new dataset; run again to continue"
    )
    if workers:
        parser.add_argument("--workers", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument(
        "--restart", action="store_true", help="replace what another stage or other settings left in DIR"
    )
    parser.add_argument("--push-to-hub", metavar="ID", help="upload the finished dataset to this repository")
    parser.add_argument("--private", action="store_true", help="make a repository that is created private")


def add_report(
    parser: argparse.ArgumentParser,
    threshold: str = "highest confidence in (0, 1] from which an image has an artifact",
):
    """Where a report goes, and what it calls an artifact."""
    parser.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="folder for the report; run again to continue"
    )
    parser.add_argument("--threshold", type=float, default=0.5, help=f"{threshold} (default: %(default)s)")
    parser.add_argument("--restart", action="store_true", help="replace what other settings left in DIR")


def add_looking(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Which detectors look at the images, how, and in which of several processes."""
    what = (
        "Hub ids or folders of detectors, such as checkpoints of one"
        if several
        else "Hub id or folder of the detector"
    )
    parser.add_argument("--detector", required=True, nargs="+" if several else 1, metavar="NAME", help=what)
    parser.add_argument(
        "--precision",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the network; auto is bfloat16 on a GPU and float32 elsewhere (default: %(default)s)",
    )
    parser.add_argument("--batch-size", type=int, default=32, help="most images at a time (default: %(default)s)")
    parser.add_argument("--decoders", type=int, default=4, help="threads that decode images (default: %(default)s)")
    add_place(parser)


def add_place(parser: argparse.ArgumentParser, device: str = "by default the best there is") -> None:
    """Where this process works, and which of several it is."""
    parser.add_argument("--device", help=f"such as cpu, cuda, cuda:1, mps; {device}")
    parser.add_argument(
        "--rank", type=int, help="of this process among those that share the work; by default the launcher's"
    )
    parser.add_argument("--world-size", type=int, help="number of these processes; by default the launcher's")


def detectors_of(args: argparse.Namespace) -> list[str]:
    """Where the detectors of [`add_looking`] lie."""
    from .diagnose import find_detector

    return [str(find_detector(name, "--detector")) for name in args.detector]


def looking(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a `DetectorStage`."""
    device = device_of(args)
    precision = precision_on(device, args.precision)
    return {"precision": precision, "device": device, "batch_size": args.batch_size, "decoders": args.decoders}


def device_of(args: argparse.Namespace) -> str:
    """The device that the arguments name, or the best there is: each process of a launcher has a GPU of its own."""
    from .diagnose import best_device

    return args.device or best_device(int(os.environ.get("LOCAL_RANK", 0)))


def precision_on(device: str, precision: str = "auto") -> str:
    """What "auto" means on a device."""
    if precision != "auto":
        return precision
    return "bfloat16" if device.startswith("cuda") else "float32"


def place(args: argparse.Namespace) -> dict[str, int]:
    """`rank` and `world_size` of this process, by the arguments or by the environment that launchers set."""
    if (args.rank is None) != (args.world_size is None):
        raise ValueError("`--rank` and `--world-size` belong together: give both, or none.")
    if args.rank is not None:
        return {"rank": args.rank, "world_size": args.world_size}
    return {"rank": int(os.environ.get("RANK", 0)), "world_size": int(os.environ.get("WORLD_SIZE", 1))}


def searched(found: int, skipped: dict[str, int]) -> dict[str, Any]:
    """Say what was skipped of the files that were found in folders. Returns it as facts for the plan of a stage."""
    from ..files import listed

    if skipped:
        count = sum(skipped.values())
        print(f"{found} found = {found - count} images + {count} skipped: {listed(skipped)}")
    return {"found": found, "skipped": dict(skipped)}


def shards_of(name: str, number: int = 0) -> list:
    """The shards of a dataset of the command line."""
    from ..data import find_shards
    from ..data.shards import split_name

    return find_shards(*split_name(name), number=number)


def run_stage_of(args: argparse.Namespace, stage: Any, shards: Sequence, **options: Any) -> int:
    """Run the stage as [`add_output`] says, and [`report`]. Returns the exit status."""
    from ..data import run_stage

    options.setdefault("workers", getattr(args, "workers", 1))
    return report(args, lambda: run_stage(stage, shards, args.output, restart=args.restart, **options))


def report(args: argparse.Namespace, work: Callable[[], dict[str, Any] | None]) -> int:
    """Do the work that gives the counts of a stage, print them, push. Returns the exit status."""
    from ..data import push_dataset
    from ..data.stage import line_of
    from ..files import FolderInUse, listed

    try:
        counts = work()
    except FolderInUse as error:
        raise ValueError(f"`--output`: {error}") from error
    except KeyboardInterrupt:
        print(f"\nStopped. What is done is kept in {args.output}: run the same command again to continue.")
        return 130
    if counts is None:
        print(
            f"This process is done. Others are not yet, or were stopped: run the command again to finish {args.output}."
        )
        return 0
    print(line_of(counts))
    if counts["quarantined"]:
        print(f"Quarantined ({args.output}/quarantine): {listed(counts['quarantined'])}")
    if counts["again"]:
        print(f"{counts['again']} of them failed and might succeed: run the same command again to try them alone.")
        return 1
    if args.push_to_hub:
        print(push_dataset(args.output, args.push_to_hub, private=args.private or None))
    return 0 if sum(counts["rows_out"].values()) else 1
