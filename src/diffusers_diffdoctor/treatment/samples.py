# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What a step of treatment is made of: prompts, seeds and regularization images.

Everything that looks random is a pure function of the run's seed and of a sample's position in the run. So a resumed run, and
a run on another number of processes with the same total batch, see the same noise and the same images, and nothing of it has
to be stored in a checkpoint.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from PIL import Image

from ..images import read_image
from ..seeds import derive_seed


NAME = "regularization_dataset"
# Encoded images in memory, 0.5 MB each for FLUX at 1024 pixels; those beyond are encoded at every use.
LATENTS_KEPT = 4096


def read_prompts(dataset: Any, name: str) -> list[str]:
    """The column "prompt" of a `datasets.Dataset` or of any sequence of rows.

    Raises:
        ValueError: nothing given, no row, no such column, or a prompt that is empty or no text; the row is named.
        TypeError: a dataset without a length, such as an `IterableDataset`, several splits, or a table of another library.
    """
    if dataset is None:
        raise ValueError(f'`{name}` is missing. Pass a dataset with the column "prompt".')
    if isinstance(dataset, str) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(
            f"`{name}` is a {type(dataset).__name__}, but must have a length and rows that can be picked, like a "
            "`datasets.Dataset`: every prompt is checked and encoded before training. Load it with `streaming=False`."
        )
    if isinstance(dataset, Mapping):  # of splits or of columns
        raise TypeError(
            f"`{name}` is a {type(dataset).__name__} of {list(dataset)}, but must be a sequence of rows. Pass one of its splits "
            '(`dataset["train"]`), or make rows of its columns (`Dataset.from_dict(columns)`).'
        )
    if not hasattr(dataset, "column_names") and hasattr(dataset, "to_dict"):
        raise TypeError(
            f"`{name}` is a {type(dataset).__name__}, but must be a sequence of rows. Make it one: `Dataset.from_pandas(frame)`."
        )
    if len(dataset) == 0:
        raise ValueError(f"`{name}` is empty. Pass at least one prompt.")
    if not hasattr(dataset, "column_names") and isinstance(dataset[0], str):
        raise ValueError(
            f'`{name}` holds texts, but must hold rows with the column "prompt": [{{"prompt": text}} for text in texts].'
        )
    check_column(dataset, "prompt", name)
    prompts = dataset["prompt"] if hasattr(dataset, "column_names") else [row.get("prompt") for row in dataset]
    prompts = list(prompts)
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(
                f"`{name}` has no prompt in row {row}: found {prompt!r}. Remove the row or give it a text."
            )
    return prompts


def check_column(dataset: Any, column: str, name: str) -> None:
    """Raise a `ValueError` if the rows do not have the column."""
    columns = getattr(dataset, "column_names", None)
    if columns is None:
        columns = list(dataset[0]) if isinstance(dataset[0], dict) else []
    if column not in columns:
        raise ValueError(
            f'`{name}` has no column "{column}", only {columns}. Rename one: dataset.rename_column("text", "{column}").'
        )


class RegularizationImages:
    """An endless, seeded, shuffled sequence of images with prompts that can be entered at any position.

    Args:
        dataset: rows with the columns "image" (anything that [`read_image`] reads) and "prompt".
        seed: decides the order; every pass over the dataset has another one.
        encode: a picture -> its latents (1, C, h, w).
    """

    def __init__(self, dataset: Any, seed: int, encode: Callable[[Image.Image], torch.Tensor] | None = None):
        self.prompts = read_prompts(dataset, NAME)
        check_column(dataset, "image", NAME)
        self.dataset, self.seed, self.encode = dataset, seed, encode
        self._latents: dict[int, torch.Tensor] = {}
        self._order = lru_cache(maxsize=2)(self._shuffle)

    def __len__(self) -> int:
        return len(self.prompts)

    def _shuffle(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "regularization order", epoch))
        return torch.randperm(len(self), generator=generator).tolist()

    def row(self, position: int) -> int:
        """The row that stands at a position of the endless sequence."""
        return self._order(position // len(self))[position % len(self)]

    def picture(self, row: int) -> Image.Image:
        """One picture, by [`read_image`]. A `ValueError` names the row that cannot be read."""
        try:
            return read_image(self.dataset[row]["image"])
        except Exception as error:
            raise ValueError(
                f"`{NAME}` has an image in row {row} that cannot be used: {error} Remove the row or repair the image."
            ) from error

    def latents(self, row: int) -> torch.Tensor:
        """Latents of an image, (1, C, h, w). It is encoded alone, so that they do not depend on who shares a batch."""
        latents = self._latents.get(row)
        if latents is None:
            latents = self.encode(self.picture(row))
            if len(self._latents) < LATENTS_KEPT:
                self._latents[row] = latents.cpu()
        return latents
