# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Treat SDXL: `diffdoctor treat --config sdxl`, with its defaults.

One GPU, with photographs to stay close to and a judge that training never sees:
    accelerate launch examples/treat_sdxl.py --detector detector/ --regularization_dataset photos/ --judge judge/ \
        --output_dir sdxl-treated

A fine-tuned SDXL:
    accelerate launch examples/treat_sdxl.py --pipeline my/sdxl --detector detector/ --output_dir treated
"""

import sys

from diffdoctor import command_module


if __name__ == "__main__":
    sys.exit(
        command_module("treat").run(
            sys.argv[1:], "stabilityai/stable-diffusion-xl-base-1.0", "sdxl", prog="treat_sdxl.py"
        )
    )
