# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor COMMAND`, the shell command of the package `diffusers_diffdoctor`.

A module beside the package, because importing the package registers the detector with transformers, which takes seconds:
`--help` and `--version` need not wait for that. A command's module is imported when the command is called.

A command is a row of `COMMANDS` and a module of its name in `diffusers_diffdoctor/cli`, with `add_arguments(parser)` and
`run(args) -> exit status`. A module without `add_arguments` gets the rest of the command line as it is: `treat`, `ddpo` and
`dpo`, whose flags are those of a dataclass.
"""

import argparse
import difflib
import importlib
import importlib.metadata
import logging
import sys
from collections.abc import Sequence
from types import ModuleType


# command -> what it does
COMMANDS = {
    "diagnose": "find the artifacts in images: heatmaps, a ranked report, the cleanest images",
    "score": "score images by rewards of whole images and the detector: a table",
    "treat": "train a LoRA against a detector and report before and after",
    "ddpo": "raise any reward of a pipeline's images by policy gradient",
    "dpo": "learn from pairs of images of which one was preferred",
    "repair": "draw anew what a detector marks in images, by any inpainting pipeline",
    "export-lora": "write a treated LoRA in the layout that ComfyUI, AUTOMATIC1111 and others read",
    "train-detector": "train a detector on labelled images, from a pretrained encoder or from nothing",
    "evaluate-detector": "measure a detector on labelled images: figures by category and generator, its worst mistakes",
    "convert-detector": "convert the detector that the paper's authors released",
    "data": "make what detectors learn from: photographs, injected artifacts, pseudo-labels, mixtures",
    "ui": "pages in the browser: paint masks, look at diagnoses, compare two folders",
    "miniature": "find, measure or rebuild the parts of the embedded miniature, render its scenes",
}

# Warnings of other libraries that the user of a command can do nothing about: logger -> words of its message. Whatever else these
# loggers say is shown, and a program that imports the package sees these too: its author may want to act.
LEFT_OUT = {
    # built for other versions of torch and Python, or for GPUs that are not here; only `--quantization` needs torchao
    "torchao": "Failed to load",
    "torch.utils._pytree": "is an Enum subclass and is now natively supported",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
    # a faster kernel for 4 bits on a CPU, which no command asks for
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
    # an image processor does the same with Pillow
    "transformers.utils.import_utils": "requires torchvision (not installed); falling back",
    # the command has said that the Hub does not answer, or the user that it is not to be asked
    "huggingface_hub.hf_api": "offline mode is enabled",
    "diffusers.pipelines.pipeline_utils": "offline mode is enabled",
}


class _Without(logging.Filter):
    def __init__(self, words: str):
        super().__init__()
        self.words = words

    def filter(self, record: logging.LogRecord) -> bool:
        return self.words not in record.getMessage()


class Parser(argparse.ArgumentParser):
    """Says what a misspelt flag may have meant, before it is said what is missing without it. Parsers of its commands do too."""

    def parse_known_args(self, args=None, namespace=None):
        words = list(sys.argv[1:] if args is None else args)
        if "--" in words:
            words = words[: words.index("--")]
        if any(
            isinstance(action, argparse._SubParsersAction) for action in self._actions
        ):  # the rest is for the command
            words = words[: next((i for i, word in enumerate(words) if not word.startswith("-")), None)]
        known = [option for action in self._actions for option in action.option_strings]
        unknown = [
            word
            for word in words
            if word.startswith("--") and not any(o.startswith(word.split("=")[0]) for o in known)
        ]
        if unknown:
            self.exit(2, f"{self.prog}: error: {suggestion(unknown, known)}\n")
        return super().parse_known_args(args, namespace)


def suggestion(unknown: Sequence[str], known: Sequence[str]) -> str:
    """A line that names arguments that do not exist, and those that may have been meant."""
    lines = []
    for flag in [word.split("=")[0] for word in unknown if word.startswith("--")] or unknown:
        close = [option for option in known if option.startswith(flag)] or difflib.get_close_matches(flag, known)
        lines.append(f"there is no argument {flag}" + (f", did you mean {close[0]}?" if close else "."))
    return " ".join(lines)


def command_module(name: str) -> ModuleType:
    """The module of a command, which imports the package, without the warnings of `LEFT_OUT`."""
    for library, words in LEFT_OUT.items():
        logger = logging.getLogger(library)
        if not any(isinstance(present, _Without) for present in logger.filters):
            logger.addFilter(_Without(words))
    return importlib.import_module(f"diffusers_diffdoctor.cli.{name.replace('-', '_')}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit status: 0 success, 1 failure, 2 wrong use, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(
        prog="diffdoctor",
        description="Find the broken pixels in generated images and teach the diffusion model not to make them.",
        epilog="On several GPUs: accelerate launch -m diffdoctor treat, with its arguments.",
    )
    version = importlib.metadata.version("diffusers-diffdoctor")
    parser.add_argument("--version", action="version", version=f"diffdoctor {version}")
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised, for bug reports")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    position = next((i for i, word in enumerate(argv) if not word.startswith("-")), None)
    called, module, rest = argv[position] if position is not None else None, None, None
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name == called:
            module = command_module(name)
            if hasattr(module, "add_arguments"):
                module.add_arguments(command)
            else:
                argv, rest = argv[: position + 1], argv[position + 1 :]
    args = parser.parse_args(argv)
    if rest is not None:
        try:
            return module.run(rest)  # shows its own errors: hours later a traceback is needed
        except SystemExit as end:
            if args.traceback and end.__cause__ is not None:
                raise end.__cause__ from None
            raise
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
