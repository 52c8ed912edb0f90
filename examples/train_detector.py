# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Train an artifact detector: `diffdoctor train-detector`, with its defaults.

One GPU, masks that people painted and photographs, two of the first for one of the second:
    accelerate launch examples/train_detector.py --train_dataset human=annotated/ photo=photos/ \
        --source_weights '{"human": 2, "photo": 1}' --output_dir detector

Eight GPUs, the paper's SegFormer-b5 (non-commercial):
    accelerate launch --config_file examples/accelerate/multi_gpu.yaml examples/train_detector.py \
        --config paper --train_dataset annotated/ photos/ --output_dir detector

No GPU, a small one from random weights:
    python examples/train_detector.py --config small --train_dataset annotated/ photos/ --output_dir detector
"""

import sys

from diffdoctor import command_module


if __name__ == "__main__":
    sys.exit(command_module("train-detector").run(sys.argv[1:], prog="train_detector.py"))
