# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The images on which a detector is most wrong, as one picture."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from ..files import written_atomically
from ..pictures import heatmap_overlay, image_grid


FOLDER = "worst_cases"
TILE = 256  # longest side in pixels of what is kept of an image
PICTURES = 20  # newest ones that are kept of a set of images


@dataclass
class Case:
    """An image (3, h, w), its truth and what the detector says of it (1, h, w), all in 8 bits, with what there is to say."""

    number: int  # of the row in its dataset
    error: float
    caption: str
    image: torch.Tensor
    truth: torch.Tensor
    confidence: torch.Tensor


class WorstCases:
    """The images of highest error among all that were added; what is kept of them is few and small, to be sent between processes.

    Args:
        most: how many.
    """

    def __init__(self, most: int):
        self.most = most
        self.cases: list[Case] = []

    def add(
        self, number: int, error: float, image: torch.Tensor, truth: torch.Tensor, confidence: torch.Tensor
    ) -> None:
        """Keep an image if it is among the worst.

        Args:
            number: of its row.
            error: the higher the worse.
            image: (3, h, w) in [0, 1].
            truth: (1, H, W) in [0, 1], or -1 where a pixel does not count.
            confidence: (1, H, W) in [0, 1].
        """
        if self.most == 0 or (len(self.cases) == self.most and not error > self.cases[-1].error):
            return
        truth = truth.clamp(min=0)
        caption = (
            f"row {number}: error {error:.4f}, highest confidence {confidence.max():.2f}, in truth {truth.max():.2f}"
        )
        size = _within(image.shape[-2:], TILE)
        parts = (_small(part, size) for part in (image, truth, confidence))
        self.cases.append(Case(number, error, caption, *parts))
        self._sort()

    def merge(self, other: "WorstCases") -> None:
        """Those of another process."""
        self.cases += other.cases
        self._sort()

    def _sort(self) -> None:
        self.cases.sort(key=lambda case: (-case.error, case.number))
        del self.cases[self.most :]

    def draw(self) -> Image.Image:
        """A row for each, the worst first: the image, the truth over it, the diagnosis over it."""
        rows = []
        for case in self.cases:
            image, truth, confidence = (part[None].float() / 255 for part in (case.image, case.truth, case.confidence))
            rows.append([image[0], heatmap_overlay(image, truth)[0], heatmap_overlay(image, confidence)[0]])
        return image_grid(rows, ["image", "truth", "detector"], [case.caption for case in self.cases])


def write_picture(cases: WorstCases, output_dir: str | os.PathLike, name: str, step: int) -> Path | None:
    """Write `worst_cases/NAME-STEP.png`, and delete all but the newest pictures of that name. None without cases."""
    if not cases.cases:
        return None
    path = Path(output_dir, FOLDER, f"{name}-{step:08d}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(path) as unfinished:
        cases.draw().save(unfinished, "PNG")
    for old in _pictures(output_dir, name)[:-PICTURES]:
        old.unlink(missing_ok=True)
    return path


def remove_pictures(output_dir: str | os.PathLike, after: int) -> None:
    """Those of evaluations after a step, which a run that begins or resumes there will not have made."""
    for path in _pictures(output_dir):
        if int(path.stem[-8:]) > after:
            path.unlink(missing_ok=True)


def _pictures(output_dir: str | os.PathLike, name: str = "*") -> list[Path]:
    """The oldest first."""
    return sorted(Path(output_dir, FOLDER).glob(f"{name}-{8 * '[0-9]'}.png"), key=lambda path: path.stem[-8:])


def _within(size: tuple[int, int], most: int) -> tuple[int, int]:
    scale = min(1, most / max(size))
    return tuple(max(1, round(side * scale)) for side in size)


def _small(picture: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    small = F.interpolate(picture[None].float(), size=size, mode="bilinear", align_corners=False, antialias=True)[0]
    return (small.clamp(0, 1) * 255).round().to("cpu", torch.uint8)
