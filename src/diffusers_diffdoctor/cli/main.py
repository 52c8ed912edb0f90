# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor COMMAND`. A command's module is imported when the command is called, so that `--help` is instant.

A command is a row of `COMMANDS` and a module with `add_arguments(parser)` and `run(args) -> exit status`. A module without
`add_arguments` gets the rest of the command line as it is: `treat`, whose flags are those of a dataclass.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from .. import __version__


# command -> (module, what it does)
COMMANDS = {
    "diagnose": (".diagnose", "find the artifacts in images: heatmaps, a ranked report, the cleanest images"),
    "treat": (".treat", "train a LoRA against a detector and report before and after"),
    "export-lora": (".export_lora", "write a treated LoRA in the layout that ComfyUI, AUTOMATIC1111 and others read"),
    "convert-detector": (".convert_detector", "convert the detector that the paper's authors released"),
    "miniature": (".miniature", "find, measure or rebuild the parts of the embedded miniature, render its scenes"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit status: 0 success, 1 failure, 2 wrong use, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="diffdoctor",
        description="Find the broken pixels in generated images and teach the diffusion model not to make them.",
        epilog="On several GPUs: accelerate launch -m diffusers_diffdoctor.cli.treat, with the arguments of `treat`.",
    )
    parser.add_argument("--version", action="version", version=f"diffdoctor {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised, for bug reports")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    position = next((i for i, word in enumerate(argv) if not word.startswith("-")), None)
    called, module, rest = argv[position] if position is not None else None, None, None
    for name, (path, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name == called:
            module = importlib.import_module(path, __package__)
            if hasattr(module, "add_arguments"):
                module.add_arguments(command)
            else:
                argv, rest = argv[: position + 1], argv[position + 1 :]
    args = parser.parse_args(argv)
    if rest is not None:
        return module.run(rest)  # shows its own errors: hours later a traceback is needed
    try:
        return module.run(args)
    except (ValueError, TypeError, OSError) as error:  # what our own checks raise; the message is for the user
        if args.traceback:
            raise
        print(f"diffdoctor {args.command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ndiffdoctor {args.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
