# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Repair an image: what the detector marks is drawn anew, and the rest stays as it was, to the bit."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..evaluation.metrics import dilate
from ..images import ImageSource, read_image, to_image_tensor
from ..inpainting import check_pipeline_kwargs, inpainted
from ..seeds import derive_seed


@dataclass(frozen=True)
class Repaired:
    """A repaired image.

    Attributes:
        image: the best try, or the image as it was where none was better.
        region: uint8 (H, W), 255 where it was drawn anew, falling off at the edge, 0 where nothing changed.
        before: the judge's mean confidence in the image as it was, in [0, 1].
        tries: the same for each try; infinite where the pipeline returned nothing.
        seed: of the best try; None where none was better.
    """

    image: Image.Image
    region: np.ndarray
    before: float
    tries: tuple[float, ...]
    seed: int | None

    @property
    def after(self) -> float:
        """The judge's mean confidence in `image`."""
        return min((self.before, *self.tries))


def check_repair(
    threshold: float = 0.5,
    growth: float = 0.02,
    feather: float = 0.01,
    tries: int = 1,
    strength: float = 1.0,
    steps: int = 1,
    size: int = 64,
    context: float = 0.5,
) -> None:
    """A `ValueError` that names what is out of its range."""
    for name, value in (("threshold", threshold), ("strength", strength)):
        if not 0 < value <= 1:
            raise ValueError(f"`{name}` must lie in (0, 1], got {value}.")
    for name, value in (("growth", growth), ("feather", feather)):
        if not 0 <= value <= 1:
            raise ValueError(f"`{name}` must lie in [0, 1], got {value}.")
    for name, value in (("tries", tries), ("steps", steps)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if size < 64 or size % 64:
        raise ValueError(f"`size` must be a multiple of 64, got {size}.")
    if not context >= 0:
        raise ValueError(f"`context` must be at least 0, or infinite for the whole image, got {context}.")


def artifact_regions(
    confidence: torch.Tensor, threshold: float = 0.5, growth: float = 0.02, feather: float = 0.01
) -> torch.Tensor:
    """From the detector's map to what is to be drawn anew.

    Args:
        confidence: (H, W) in [0, 1].
        threshold: in (0, 1], from which a pixel is wrong.
        growth: by how much wrong regions are grown, in shares of the shorter side: detectors mark cores, and pipelines need room.
        feather: width of the soft edge around that, in shares of the shorter side.

    Returns:
        (H, W) in [0, 1]: 1 in the grown regions, falling to 0 over the feather, 0 beyond.
    """
    check_repair(threshold=threshold, growth=growth, feather=feather)
    side = min(confidence.shape)
    wrong = (confidence >= threshold).float()[None, None]
    grown, edge = dilate(wrong, round(growth * side)), round(feather * side)
    result = grown
    for step in range(1, edge + 1):
        result = torch.maximum(result, dilate(grown, step) * (1 - step / (edge + 1)))
    return result[0, 0]


@torch.no_grad()
def repair(
    image: ImageSource,
    pipeline,
    detector: torch.nn.Module,
    judge: torch.nn.Module | None = None,
    prompt: str = "",
    tries: int = 4,
    seed: int = 0,
    threshold: float = 0.5,
    growth: float = 0.02,
    feather: float = 0.01,
    strength: float = 0.75,
    steps: int = 30,
    size: int = 512,
    context: float = 0.5,
    pipeline_kwargs: Mapping[str, Any] | None = None,
) -> Repaired:
    """Draw anew what the detector marks, several times, and keep the best by a judge.

    The pipeline sees a window around the regions, brought to `size` pixels, so that a small hand in a large image is drawn at the
    resolution that the pipeline was trained for. Only the regions are taken from its answer; every other pixel is that of the image.

    Args:
        image: a file, PIL image or array.
        pipeline: a loaded diffusers pipeline that inpaints, see
            [`load_inpainting_pipeline`][diffusers_diffdoctor.inpainting.load_inpainting_pipeline].
        detector: whose map says where. Of the house, with `confidence(images)`.
        judge: a second detector that says which try is best; the detector itself without one, which then judges its own work.
        prompt: what the image shows.
        tries: at least 1.
        seed: of the tries, from which each derives its own.
        threshold, growth, feather: see [`artifact_regions`].
        strength: share in (0, 1] of noise from which regions are drawn: 1 forgets what was there.
        steps: of the denoiser.
        size: pixels of the longer side of the window that the pipeline sees, a multiple of 64.
        context: how much of the image the window shows on each side of the regions, in shares of their longer side; `math.inf` for the
            whole image, which pipelines need that draw whole scenes only.
        pipeline_kwargs: what else the pipeline is called with, such as `guidance_scale`, or the `max_sequence_length` that it was
            trained with.

    Raises:
        ValueError: an argument out of its range.
        UnreadableImage: a file that cannot be read.
    """
    check_repair(threshold, growth, feather, tries, strength, steps, size, context)
    pipeline_kwargs = dict(pipeline_kwargs or {})
    check_pipeline_kwargs(pipeline, pipeline_kwargs)
    picture = read_image(image)
    region = artifact_regions(_confidence(detector, picture), threshold, growth, feather).cpu().numpy()
    judge = judge or detector
    before = _confidence(judge, picture).mean().item()
    shown = np.rint(region * 255).astype(np.uint8)
    if not region.any():
        return Repaired(picture, shown, before, (), None)
    place = _window(region, context)
    old = np.asarray(picture)
    best, scores = (before, picture, None), []
    for number in range(tries):
        own = derive_seed("repair", seed, number)
        shows = old[place].astype(np.float32), region[place]
        drawn = inpainted(pipeline, *shows, prompt, steps, strength, size, own, pipeline_kwargs)
        if drawn is None:
            scores.append(float("inf"))
            continue
        new = old.copy()
        weight = region[place][..., None]
        mixed = old[place] + weight * (drawn - old[place])
        new[place] = np.where(weight > 0, np.rint(mixed.clip(0, 255)), old[place]).astype(np.uint8)
        result = Image.fromarray(new)
        scores.append(_confidence(judge, result).mean().item())
        if scores[-1] < best[0]:
            best = scores[-1], result, own
    return Repaired(best[1], shown, before, tuple(scores), best[2])


def _confidence(detector: torch.nn.Module, picture: Image.Image) -> torch.Tensor:
    device = next(detector.parameters()).device
    return detector.confidence(to_image_tensor(picture)[None].to(device))[0, 0].float().cpu()


def _window(region: np.ndarray, context: float) -> tuple[slice, slice]:
    """What the pipeline sees: the regions with what is around them, at least square where the image allows it."""
    height, width = region.shape
    spans = [np.flatnonzero(region.any(axis)) for axis in (1, 0)]
    longest = max(int(span[-1] - span[0]) + 1 for span in spans)
    wanted = np.ceil(longest * (1 + 2 * context))
    slices = []
    for span, length in zip(spans, (height, width)):
        middle, side = (span[0] + span[-1] + 1) / 2, int(min(length, wanted))
        start = int(np.clip(round(middle - side / 2), 0, length - side))
        slices.append(slice(start, start + side))
    return slices[0], slices[1]
