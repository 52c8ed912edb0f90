# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Raise any reward of a pipeline's images by policy gradient (DDPO, Flow-GRPO): `diffdoctor ddpo`.

One GPU, a reward of one's own:
    accelerate launch examples/ddpo.py --pipeline stabilityai/stable-diffusion-3.5-medium --reward reward.py:score \
        --output_dir sd3-raised

No GPU, the bundled miniature and its detector, some minutes:
    python examples/ddpo.py --pipeline miniature --output_dir runs/miniature-ddpo
"""

import sys

from diffdoctor import command_module


if __name__ == "__main__":
    sys.exit(command_module("ddpo").run(sys.argv[1:], prog="ddpo.py"))
