# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Lets torchvision from PyPI be imported beside a torch for CPUs, for `make test-torchvision`; Python runs this at its start.

PyPI's torchvision is compiled for CUDA, so its own operators do not load there, and on import it asks for the signatures of two of
them. Image processing needs none: it is Python over torch. With both built for CUDA (5.6 GB), or both for CPUs, nothing of this
is needed.
"""

import sys
from importlib.metadata import version

import torch


if sys.platform == "linux" and torch.version.cuda is None and not version("torchvision").endswith("+cpu"):
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
