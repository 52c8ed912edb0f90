# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Treat FLUX.1-schnell with the paper's values: `diffdoctor treat --config flux_schnell`, with its defaults.

One GPU:
    accelerate launch examples/treat_flux.py --detector detector/ --output_dir flux-treated

Eight GPUs, with photographs to stay close to and a judge that training never sees:
    accelerate launch --config_file examples/accelerate/multi_gpu.yaml examples/treat_flux.py \
        --regularization_dataset photos/ --judge judge/ --output_dir flux-treated

No GPU, the bundled miniature, some minutes:
    python examples/treat_flux.py --pipeline miniature --output_dir runs/miniature
"""

import sys

from diffdoctor import command_module


if __name__ == "__main__":
    sys.exit(
        command_module("treat").run(
            sys.argv[1:], "black-forest-labs/FLUX.1-schnell", "flux_schnell", prog="treat_flux.py"
        )
    )
