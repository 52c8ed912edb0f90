# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor convert-detector CHECKPOINT OUTPUT`: from the authors' pickle to a folder of transformers."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="state dict of a SegFormer of transformers 4, such as ad_pytorch_model.bin")
    parser.add_argument("output", help="folder for the detector; must not exist or be empty")
    parser.add_argument(
        "--image-size",
        type=int,
        default=512,
        help="short side in pixels at which the detector looks at images (default: %(default)s)",
    )
    parser.add_argument("--sha256", default=None, metavar="HEX", help="refuse a checkpoint with another checksum")


def run(args: argparse.Namespace) -> int:
    from ..detector.conversion import convert_detector_checkpoint

    result = convert_detector_checkpoint(args.checkpoint, args.output, image_size=args.image_size, sha256=args.sha256)
    print(f"sha256        {result.sha256}")
    print(f"checkpoint    {result.known_as or 'unknown: not a release that we know; be sure where it comes from'}")
    print(f"architecture  SegFormer-{result.architecture}, {result.parameters / 1e6:.1f} M parameters")
    print(f"written to    {result.output_dir}")
    print("Weights that started from nvidia/mit-b0 to mit-b5 inherit NVIDIA's licence: non-commercial use only.")
    return 0
