# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""A kind of artifact that a generator makes itself: a region painted anew by an inpainting pipeline, from much noise in few steps."""

import functools
import inspect
import os

import numpy as np
import torch
from PIL import Image

from ...loading import dtype_argument, errors_named
from .parts import NoChange


MULTIPLE = 64  # of pixels: no pipeline wants a coarser one
SAME = 20  # steps of which a retouch takes the last, in which next to nothing changes


class Repainter:
    """Draws regions anew by a diffusers pipeline.

    Args:
        pipeline: of a class of `AutoPipelineForInpainting`, loaded.
        prompts: one is chosen for each region. A wrong one, or none, makes the mistakes.
        steps: of the denoiser. Few make mistakes.
        strength: share in (0, 1] of the noise from which it starts; 1 forgets what was there.
        size: pixels of the longer side at which it paints, a multiple of 64; what it is given is brought to that size and back.
    """

    def __init__(
        self, pipeline, prompts: tuple[str, ...] = ("",), steps: int = 8, strength: float = 0.9, size: int = 512
    ):
        self.pipeline, self.prompts, self.steps, self.strength, self.size = pipeline, prompts, steps, strength, size
        self._known = inspect.signature(pipeline.__call__).parameters

    def repaint(self, image: np.ndarray, region: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Whatever the generator gets wrong: hands, faces, text.

        Arguments and result are those of a kind.
        """
        return self._painted(image, region, rng, self.steps, self.strength)

    def retouch(self, image: np.ndarray, region: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A decoy: the region through the pipeline and its autoencoder in its last step, so that it stays what it was."""
        return self._painted(image, region, rng, SAME, 1 / SAME)

    def _painted(
        self, image: np.ndarray, region: np.ndarray, rng: np.random.Generator, steps: int, strength: float
    ) -> np.ndarray:
        height, width = region.shape
        scale = self.size / max(height, width)
        size = tuple(max(MULTIPLE, round(side * scale / MULTIPLE) * MULTIPLE) for side in (width, height))
        picture = Image.fromarray(np.clip(image + 0.5, 0, 255).astype(np.uint8)).resize(size, Image.Resampling.LANCZOS)
        mask = Image.fromarray((region > 0).astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)
        arguments = {
            "prompt": str(rng.choice(self.prompts)),
            "image": picture,
            "mask_image": mask,
            "width": size[0],
            "height": size[1],
            "num_inference_steps": steps,
            "strength": strength,
            "generator": torch.Generator("cpu").manual_seed(int(rng.integers(2**31))),
            "output_type": "np",
        }
        with torch.no_grad():
            drawn = self.pipeline(**{name: value for name, value in arguments.items() if name in self._known}).images[
                0
            ]
        drawn = np.asarray(drawn, np.float32)
        if not np.isfinite(drawn).all() or not drawn.any():  # black: a safety checker's answer
            raise NoChange
        new = Image.fromarray(np.rint(drawn.clip(0, 1) * 255).astype(np.uint8)).resize(
            (width, height), Image.Resampling.LANCZOS
        )
        return image + region[..., None] * (np.asarray(new, np.float32) - image)


@functools.lru_cache(maxsize=1)
def load_repainter(
    pipeline: str, prompts: tuple[str, ...], steps: int, strength: float, size: int, device: str, dtype: str
) -> Repainter:
    """The pipeline of a Hub id or a folder, once for each process.

    Raises:
        ValueError: it cannot be loaded, or is of no class of `AutoPipelineForInpainting`.
    """
    from diffusers import AutoPipelineForInpainting

    with errors_named(pipeline, f"`pipeline` {os.fspath(pipeline)!r}"):
        loaded = AutoPipelineForInpainting.from_pretrained(pipeline, **dtype_argument(getattr(torch, dtype)))
    loaded.set_progress_bar_config(disable=True)
    return Repainter(loaded.to(device), prompts, steps, strength, size)
