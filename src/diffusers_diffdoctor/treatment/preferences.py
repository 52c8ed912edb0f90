# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Pairs of images of which one was preferred: read from a dataset, or drawn by a pipeline and ranked by a reward."""

import io
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers.utils import logging

from ..evaluation import to_pil
from ..files import only_run, write_atomically, written_atomically
from ..images import read_image
from ..rewards import CombinedReward
from ..seeds import derive_seed
from .samples import LATENTS_KEPT, check_column


logger = logging.get_logger(__name__)

NAME = "train_dataset"
METADATA = "metadata.jsonl"
PROMPTS = ("prompt", "caption")
SIDES = ("chosen", "rejected")
VOTED = ("jpg_0", "jpg_1", "label_0")  # Pick-a-Pic


class Pairs:
    """The pairs of a dataset, whose images are read at their use.

    Args:
        dataset: rows with the columns "prompt" (or "caption") and "chosen" and "rejected"; or, as Pick-a-Pic has them, "jpg_0",
            "jpg_1" and "label_0", which is 1 where the first was preferred, 0 where the second was, and between them where
            neither was. Such ties are left out. Images are anything that [`read_image`] reads, or the bytes of a file.
        encode: a picture -> its latents (1, C, h, w).

    Attributes:
        rows: of each pair its row in the dataset, and the columns of the preferred image and of the other.
        prompts: of each pair.

    Raises:
        ValueError: no row, no pair, columns that are missing, a prompt that is no text or a label that is no share.
        TypeError: a dataset without a length.
    """

    def __init__(self, dataset: Any, encode: Callable[[Image.Image], torch.Tensor] | None = None):
        if dataset is None:
            raise ValueError(
                f'`{NAME}` is missing. Pass a dataset with the columns "prompt", "chosen" and "rejected".'
            )
        if isinstance(dataset, str) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise TypeError(
                f"`{NAME}` is a {type(dataset).__name__}, but must have a length and rows that can be picked, like a "
                "`datasets.Dataset`. Load it with `streaming=False`."
            )
        if len(dataset) == 0:
            raise ValueError(f"`{NAME}` is empty. Pass at least one pair.")
        self.dataset, self.encode = dataset, encode
        columns = getattr(dataset, "column_names", None) or list(dataset[0])
        voted = not set(SIDES) <= set(columns) and set(VOTED) & set(columns)
        for column in VOTED if voted else SIDES:
            check_column(dataset, column, NAME)
        name = next((name for name in PROMPTS if name in columns), PROMPTS[0])
        check_column(dataset, name, NAME)
        prompts = self._column(name)
        self.rows = [(row, *SIDES) for row in range(len(dataset))] if not voted else self._voted()
        if not self.rows:
            raise ValueError(f"`{NAME}` has {len(dataset)} rows, all of them ties: there is no pair to learn from.")
        self.prompts = [prompts[row] for row, _, _ in self.rows]
        for (row, _, _), prompt in zip(self.rows, self.prompts):
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(
                    f"`{NAME}` has no prompt in row {row}: found {prompt!r}. Remove the row or give it a text."
                )
        self._latents: dict[tuple[int, str], torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def _column(self, name: str) -> list[Any]:
        named = hasattr(self.dataset, "column_names")
        return list(self.dataset[name]) if named else [row.get(name) for row in self.dataset]

    def _voted(self) -> list[tuple[int, str, str]]:
        rows, (first, second, label) = [], VOTED
        for row, share in enumerate(self._column(label)):
            if not isinstance(share, (int, float)) or not 0 <= share <= 1:
                raise ValueError(
                    f"`{NAME}` has the {label} {share!r} in row {row}, but it must lie in [0, 1]. Remove the row."
                )
            if share != 0.5:
                rows.append((row, first, second) if share > 0.5 else (row, second, first))
        if ties := len(self.dataset) - len(rows):
            logger.warning(f"`{NAME}`: {ties} of {len(self.dataset)} rows are ties and left out.")
        return rows

    def picture(self, pair: int, side: int) -> Image.Image:
        """The preferred image of a pair (`side` 0) or the other (1). A `ValueError` names the row that cannot be read."""
        row, column = self.rows[pair][0], self.rows[pair][1 + side]
        value = self.dataset[row][column]
        try:
            if isinstance(value, dict):  # undecoded, as `datasets` stores it
                value = value.get("bytes") or value.get("path")
            return read_image(io.BytesIO(value) if isinstance(value, bytes) else value)
        except Exception as error:
            raise ValueError(
                f"`{NAME}` has a {column} image in row {row} that cannot be used: {error} Remove the row or repair the image."
            ) from error

    def check(self, show_progress: bool = True) -> None:
        """Open every image once, so that none ends a run hours later; a `ValueError` names the first that cannot be used."""
        for pair in tqdm(range(len(self)), f"opening the images of {NAME}", delay=2.0, disable=not show_progress):
            for side in (0, 1):
                self.picture(pair, side)

    def latents(self, pair: int, side: int) -> torch.Tensor:
        """Latents of an image, (1, C, h, w). It is encoded alone, so that they do not depend on who shares a batch."""
        latents = self._latents.get((pair, side))
        if latents is None:
            latents = self.encode(self.picture(pair, side)).cpu()
            if len(self._latents) < LATENTS_KEPT:
                self._latents[pair, side] = latents
        return latents


@torch.no_grad()
def write_preferences(
    generate: Callable[[list[str], list[int]], torch.Tensor],
    reward_funcs: Any,
    prompts: Sequence[str],
    output_dir: str | os.PathLike,
    images_per_prompt: int = 4,
    seed: int = 0,
    reward_weights: Sequence[float] | None = None,
    show_progress: bool = True,
) -> dict[str, int]:
    """
    Draw several images of every prompt, and keep the best and the worst of them as a pair.

    What is written is an image folder: `load_dataset("imagefolder", data_dir=output_dir)` has the columns `prompt`, `chosen` and
    `rejected`, and what each scored. Stopped, it goes on with the first prompt that is not there.

    Args:
        generate: `(prompts, seeds) -> images` (N, 3, H, W) in [0, 1], such as `DifferentiableRollout.generate`.
        reward_funcs, reward_weights: as of [`PixelRewardTrainer`]; need not be differentiable.
        prompts: texts, each of which gives one pair.
        output_dir: folder to write to.
        images_per_prompt: at least 2.
        seed: decides all noise.
        show_progress: show a bar.

    Returns:
        `written`, pairs in the folder, and `quarantined`, prompts whose images all scored alike, or not a finite number.
    """
    if images_per_prompt < 2:
        raise ValueError(
            f"`images_per_prompt` is {images_per_prompt}, but must be at least 2: a pair is made of them."
        )
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"`prompts` is {prompts!r}, but must be a list of at least one text.")
    functions = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    reward, folder = CombinedReward(functions, reward_weights), Path(output_dir)
    with only_run(folder):
        path = folder / METADATA
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        known, quarantined = {json.loads(line)["number"] for line in lines}, 0
        for number, prompt in enumerate(tqdm(prompts, "pairs", disable=not show_progress)):
            if number in known:
                continue
            seeds = [derive_seed(seed, "preference", number, i) for i in range(images_per_prompt)]
            images = generate([prompt] * images_per_prompt, seeds)
            scores = reward(images, [prompt] * images_per_prompt).score.double().cpu()
            best, worst = int(scores.argmax()), int(scores.argmin())
            if not torch.isfinite(scores).all() or math.isclose(scores[best], scores[worst], abs_tol=1e-12):
                quarantined += 1
                continue
            row: dict[str, Any] = {"number": number, "prompt": prompt}
            for side, i in zip(SIDES, (best, worst)):
                file = f"{number:06d}-{side}.png"
                with written_atomically(folder / file) as unfinished:
                    to_pil(images[i].cpu()).save(unfinished)
                row |= {f"{side}_file_name": file, f"{side}_score": scores[i].item(), f"{side}_seed": seeds[i]}
            lines.append(json.dumps(row))
            write_atomically(path, "\n".join(lines) + "\n")
    return {"written": len(lines), "quarantined": quarantined}
