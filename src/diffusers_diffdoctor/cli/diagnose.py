# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor diagnose PATH... --output DIR`: heatmaps, a table and a ranked report of image files."""

import argparse
import sys
from pathlib import Path

from ..names import printable
from .reach import check_reachable


MINIATURE = "miniature"  # `--detector miniature` is the bundled detector of 64-pixel scenes
# said wherever a detector is missing
HOW_TO_GET_ONE = (
    "convert the release of the paper's authors (`diffdoctor convert-detector ad_pytorch_model.bin detector/`) or train one "
    "(`ArtifactDetectorTrainer`)"
)
NO_DEFAULT = f"no detector is published yet, so that there is no default. To get one, {HOW_TO_GET_ONE}."
LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
COLUMNS = "{:>5}  {:>10}  {:>7}  {}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="image files, or folders that are searched for images"
    )
    parser.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="folder for the report; run again to continue"
    )
    parser.add_argument(
        "--detector",
        metavar="NAME",
        help="Hub id or folder of a detector, which is needed; `miniature` is the bundled one for its scenes",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.5,
        help="confidence in (0, 1] from which a pixel is an artifact (default: %(default)s)",
    )
    parser.add_argument(
        "--tile", action="store_true", help="also look at large images piece by piece: finds smaller artifacts, slower"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=8,
        help="most images at a time, fewer where they do not fit into the accelerator's memory (default: %(default)s)",
    )
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="list the K cleanest images, for the best of N samples"
    )
    parser.add_argument("--device", default=None, help="such as cpu, cuda, cuda:1, mps; by default the best there is")
    parser.add_argument("--workers", type=int, default=4, help="threads that read images (default: %(default)s)")
    parser.add_argument(
        "--strict",
        action="store_true",
        help="exit with status 1 if anything that is or may hide an image was not read: a file was quarantined, or something "
        "else was skipped than a file whose name is no image's and a folder that is searched under another name",
    )
    parser.add_argument("--restart", action="store_true", help="replace a diagnosis with other settings in DIR")


def run(args: argparse.Namespace) -> int:
    from ..evaluation.diagnosis import diagnose_images, written_to
    from ..files import FolderInUse, find_images

    find_images(args.paths, excluded=written_to(args.output))  # a wrong path is said before a detector is loaded
    if args.detector is None:
        raise ValueError(f"`--detector` is missing: {NO_DEFAULT}")
    detector = load_detector(args.detector, args.device)
    try:
        result = diagnose_images(
            args.paths,
            args.output,
            detector,
            detector_name=args.detector,
            threshold=args.threshold,
            tile=args.tile,
            batch_size=args.batch_size,
            top_k=args.top_k,
            restart=args.restart,
            workers=args.workers,
        )
    except FolderInUse as error:
        raise ValueError(f"`--output`: {error}") from error
    except KeyboardInterrupt:
        print(f"\nStopped. What is done is kept in {args.output}: run the same command again to continue.")
        return 130
    _print(result)
    if args.strict and result["unread"]:
        print(f"--strict: {result['unread']} that are or may hide images were not read", file=sys.stderr)
        return 1
    return 0 if result["diagnosed"] else 1


def load_detector(name: str, device: str | None = None):
    """The detector of `--detector`, on the device or the best there is, in evaluation mode.

    Raises:
        ValueError: the device does not exist; and what [`find_detector`] raises.
    """
    device = checked_device(device)
    return open_detector(find_detector(name, "--detector"), device)


def checked_device(device: str | None) -> str:
    """The device, or the best there is.

    Raises:
        ValueError: the device does not exist.
    """
    import torch

    device = device or best_device()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"`--device {device}` cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def best_device(local_rank: int = 0) -> str:
    """The accelerator that there is, the one of this process where a launcher started several, or "cpu"."""
    import torch

    if torch.cuda.is_available():
        return f"cuda:{local_rank}" if local_rank else "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def find_detector(name: str, argument: str) -> str | Path:
    """Where the detector of a Hub id, a folder, or "miniature" lies, for [`open_detector`]. Its weights are not looked at.

    Args:
        name: the id or path.
        argument: what errors call it, such as `--detector`.

    Raises:
        ValueError: there is a model, but not a detector of this package.
        OSError: there is no such model, or the Hub cannot be reached.
    """
    from transformers import PreTrainedConfig

    from ..detector import ArtifactDetectorConfig
    from ..loading import errors_named

    location = name
    if name == MINIATURE:
        from ..miniature import load

        location = load("detector")
    if not Path(location).is_dir():
        check_reachable(name, argument, remedy=f"To get a detector, {HOW_TO_GET_ONE}.")
    elif not Path(location, "config.json").is_file():
        loras = [file for file in LORA_FILES if Path(location, file).is_file()]
        held = f"a LoRA ({loras[0]})" if loras else "no config.json"
        raise ValueError(f"`{argument} {name}` is a folder with {held}, not an artifact detector: {HOW_TO_GET_ONE}.")
    try:
        with errors_named(location, f"`{argument} {name}`"):
            config, _ = PreTrainedConfig.get_config_dict(location)
    except OSError as error:
        raise OSError(
            f"`{argument} {name}` is no model that can be read: {' '.join(str(error).split())[:200]} To get a detector, "
            f"{HOW_TO_GET_ONE}."
        ) from error
    found, expected = config.get("model_type"), ArtifactDetectorConfig.model_type
    if found != expected:
        raise ValueError(
            f"`{argument} {name}` is not an artifact detector: its model type is {found!r}, expected {expected!r}. To get one, "
            f"{HOW_TO_GET_ONE}."
        )
    return location


def open_detector(location: str | Path, device: str, argument: str = "--detector"):
    """The detector in float32 on the device, in evaluation mode.

    Raises:
        ValueError: its weights are missing or damaged.
    """
    import torch

    from ..detector import ArtifactDetectorForSemanticSegmentation
    from ..loading import errors_named

    try:
        with errors_named(location, f"`{argument} {location}`"):
            detector = ArtifactDetectorForSemanticSegmentation.from_pretrained(location, dtype=torch.float32)
    except OSError as error:
        raise ValueError(
            f"`{argument} {location}` cannot be loaded: {' '.join(str(error).split())[:300]} Copy or download it anew."
        ) from error
    return detector.to(device).eval()


def _print(result: dict) -> None:
    from ..files import listed

    print(
        f"{result['found']} found = {result['diagnosed']} diagnosed + {result['quarantined']} quarantined + "
        f"{result['skipped']} skipped"
    )
    if result["skipped"]:
        print(f"Skipped: {listed(result['skipped_reasons'])}")
    if result["resumed"]:
        print(f"{result['resumed']} of them were diagnosed by an earlier run")
    if result["damaged_lines"]:
        print(f"{result['damaged_lines']} lines of the earlier journal were cut or damaged: diagnosed again")
    if result["dropped"]:
        print(f"{result['dropped']} images of an earlier run are not among the paths now and left the report")
    if result["diagnosed"]:
        low, high = result["interval"]
        share = 100 * result["artifacts"] / result["diagnosed"]
        print(f"{result['artifacts']} with an artifact: {share:.1f} % (95 %: {100 * low:.1f} to {100 * high:.1f} %)")
    if result["best"]:
        print("\nThe cleanest:\n" + COLUMNS.format("rank", "confidence", "area", "image"))
        for row in result["best"]:
            area = f"{100 * row['area_ratio']:.2f} %"
            print(COLUMNS.format(row["rank"], f"{row['max_confidence']:.4f}", area, printable(row["path"])))
        print()
    print(f"Report: {result['report']}")
