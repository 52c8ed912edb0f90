# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Scores of image files by rewards: read in batches, each file a row or a reason."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..images import to_image_tensor


Item = tuple[Path, torch.Tensor, str]


@torch.no_grad()
def score_images(
    images: Sequence[Path],
    prompts: Sequence[str],
    rewards: Mapping[str, Callable],
    batch_size: int = 8,
    device: str = "cpu",
    show_progress: bool = True,
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Score image files.

    Args:
        images: their paths.
        prompts: one for each.
        rewards: name -> `(images, prompts)` -> [`RewardOutput`], as [`as_reward`] makes them, on the device.
        batch_size: most images of one size at a time.
        device: that the images are brought to.
        show_progress: a bar.

    Returns:
        Rows with `path`, `prompt` and a number for each reward, in the order of the images; and rows with `path` and `reason` for each
        file that cannot be read, that a reward refuses or that it gives no finite score.

    Raises:
        ValueError: another number of prompts than of images, no reward, or a batch size below 1.
    """
    if len(prompts) != len(images):
        raise ValueError(f"There are {len(prompts)} prompts for {len(images)} images; give one for each.")
    if not rewards:
        raise ValueError("No reward was given; pass at least one.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, found {batch_size}.")
    rows: list[dict[str, Any]] = []
    bad: list[dict[str, str]] = []
    with tqdm(total=len(images), desc="scoring", unit="image", disable=None if show_progress else True) as bar:
        for batch in _batches(zip(images, prompts), batch_size, bad, bar):
            for part in _that_work(batch, rewards, device, bad):
                rows += part
            bar.update(len(batch))
    return rows, bad


def _batches(files: Iterator[tuple[Path, str]], batch_size: int, bad: list, bar: tqdm) -> Iterator[list[Item]]:
    """Neighbours of one size."""
    batch: list[Item] = []
    for path, prompt in files:
        try:
            pixels = to_image_tensor(path)
        except (OSError, ValueError) as error:
            bad.append({"path": str(path), "reason": f"{type(error).__name__}: {error}"})
            bar.update()
            continue
        if batch and (len(batch) == batch_size or batch[0][1].shape != pixels.shape):
            yield batch
            batch = []
        batch.append((path, pixels, prompt))
    if batch:
        yield batch


def _that_work(batch: list[Item], rewards: Mapping[str, Callable], device: str, bad: list) -> Iterator[list[dict]]:
    """The rows of a batch. If a reward refuses it, each image is asked for alone, so that one keeps no other from its score."""
    paths, pixels, prompts = zip(*batch)
    images = torch.stack(pixels).to(device)
    try:
        scores = {name: reward(images, list(prompts)).score.tolist() for name, reward in rewards.items()}
    except ValueError as error:
        if len(batch) > 1:
            for one in batch:
                yield from _that_work([one], rewards, device, bad)
        else:
            bad.append({"path": str(paths[0]), "reason": f"{type(error).__name__}: {error}"})
        return
    rows = []
    for i, (path, prompt) in enumerate(zip(paths, prompts)):
        wrong = [name for name in scores if not math.isfinite(scores[name][i])]
        if wrong:
            bad.append({"path": str(path), "reason": f"the score of {', '.join(wrong)} is not finite"})
        else:
            rows.append({"path": str(path), "prompt": prompt, **{name: scores[name][i] for name in scores}})
    yield rows
