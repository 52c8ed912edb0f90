# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""A kind of artifact that a generator makes itself: a region painted anew by an inpainting pipeline, from much noise in few steps."""

import functools

import numpy as np

from ...inpainting import inpainted, load_inpainting_pipeline
from .parts import NoChange


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
        prompt, seed = str(rng.choice(self.prompts)), int(rng.integers(2**31))
        new = inpainted(self.pipeline, image, region, prompt, steps, strength, self.size, seed)
        if new is None:
            raise NoChange
        return image + region[..., None] * (new - image)


@functools.lru_cache(maxsize=1)
def load_repainter(
    pipeline: str, prompts: tuple[str, ...], steps: int, strength: float, size: int, device: str, dtype: str
) -> Repainter:
    """The pipeline of a Hub id or a folder, once for each process.

    Raises:
        ValueError: it cannot be loaded, or is of no class of `AutoPipelineForInpainting`.
    """
    return Repainter(load_inpainting_pipeline(pipeline, device, dtype), prompts, steps, strength, size)
