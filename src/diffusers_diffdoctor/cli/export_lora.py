# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor export-lora FOLDER`: a treated LoRA in the layouts that other programs read."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="folder of the treatment, or a checkpoint of it")
    parser.add_argument(
        "--format",
        default="kohya",
        choices=("kohya", "diffusers"),
        help="kohya: names and alpha as ComfyUI, AUTOMATIC1111 and Forge read them, for Stable Diffusion, SDXL and FLUX; "
        "diffusers: the names as they are, with alpha multiplied into the weights for programs that ignore it "
        "(default: %(default)s)",
    )
    parser.add_argument("--output", default=None, metavar="FILE", help="default: FOLDER/lora_FORMAT.safetensors")


def run(args: argparse.Namespace) -> int:
    from ..treatment.export import export_lora

    print(f"written to {export_lora(args.folder, args.format, args.output)}")
    return 0
