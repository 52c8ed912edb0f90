# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Learn from pairs of images of which one was preferred (Diffusion-DPO): `diffdoctor dpo`.

One GPU, pairs of a data set:
    accelerate launch examples/dpo.py --pipeline stabilityai/stable-diffusion-xl-base-1.0 --pairs pairs/ --output_dir sdxl-preferred

No GPU, pairs that the bundled miniature draws and its detector ranks, some minutes:
    python examples/dpo.py --pipeline miniature --output_dir runs/miniature-dpo
"""

import sys

from diffdoctor import command_module


if __name__ == "__main__":
    sys.exit(command_module("dpo").run(sys.argv[1:], prog="dpo.py"))
