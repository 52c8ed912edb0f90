# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Treat Kolors: `diffdoctor treat --config kolors`, with its defaults.

One GPU, with photographs to stay close to and a judge that training never sees:
    accelerate launch examples/treat_kolors.py --detector detector/ --regularization_dataset photos/ --judge judge/ \
        --output_dir kolors-treated
"""

import sys

from diffdoctor import command_module


if __name__ == "__main__":
    sys.exit(
        command_module("treat").run(sys.argv[1:], "Kwai-Kolors/Kolors-diffusers", "kolors", prog="treat_kolors.py")
    )
