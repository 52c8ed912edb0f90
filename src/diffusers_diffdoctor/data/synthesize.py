# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Synthesis: prompts to images, by any pipelines of diffusers. A shard is some prompts for one pipeline and one number of steps."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Features, Value

from ..files import digest
from ..loading import dtype_argument, errors_named
from ..names import shortened
from ..seeds import derive_seed
from .schema import FEATURES, Row, encode_png
from .shards import Quarantined, Shard
from .stage import Result, Stage, row_name


@dataclass(frozen=True)
class PromptShard:
    """Prompts that one pipeline renders with one number of steps. Their rows have no image yet."""

    prompts: tuple[tuple[str, tuple[str, ...], int], ...]  # prompt, its categories, seed of its image
    pipeline: str
    steps: int
    first: int
    dataset: int = 0

    @property
    def rows(self) -> int:
        return len(self.prompts)

    @property
    def identity(self) -> dict[str, Any]:
        given = json.dumps([self.prompts, self.steps])
        name = f"{shortened(self.pipeline)}, {self.steps} steps"
        return {"name": name, "rows": self.rows, "bytes": len(given), "sha256": digest(given)}

    @property
    def features(self) -> Features:
        return FEATURES

    def read(self) -> Iterator[Row]:
        for number, (prompt, categories, seed) in enumerate(self.prompts, self.first):
            yield {
                "image": {"bytes": b"", "path": f"{number:08d}.png"},
                "artifact_map": None,
                "prompt": prompt,
                "category": list(categories),
                "generator": shortened(self.pipeline),
                "source": None,
                "steps": self.steps,
                "seed": seed,
            }


OWN = {"prompt", "num_inference_steps", "generator", "output_type", "return_dict", "width", "height", "guidance_scale"}


@dataclass(frozen=True)
class Synthesize(Stage):
    """Rows get the image that their pipeline makes of their prompt. What it cannot make is quarantined: where the pipeline cannot be
    loaded or raises an error, for the next run to try again.

    Args:
        width, height: in pixels; the pipeline's own without them.
        guidance_scale: the pipeline's own without it.
        pipeline_kwargs: what else every pipeline is called with, such as `max_sequence_length`.
        dtype: of the weights: float32, bfloat16, float16.
        batch_size: images at a time; each has a generator of its own seed.
        device: of torch.
    """

    width: int | None = None
    height: int | None = None
    guidance_scale: float | None = None
    dtype: str = "float32"
    batch_size: int = 1
    device: str = field(default="cpu", compare=False)
    pipeline_kwargs: dict[str, Any] = field(default_factory=dict)

    name: ClassVar[str] = "synthesize"
    columns: ClassVar[dict[str, Any]] = {"steps": Value("int32"), "seed": Value("int64")}

    def __post_init__(self):
        for name in ("width", "height", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, found {value}.")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"`dtype` must be float32, bfloat16 or float16, found {self.dtype!r}.")
        if taken := sorted(OWN & set(self.pipeline_kwargs)):
            raise ValueError(f"`pipeline_kwargs` has {taken[0]!r}, which the stage sets. Remove it.")

    def process(self, rows: Iterator[Row], shard: Shard) -> Iterator[Result]:
        try:
            pipeline = _pipeline(shard.pipeline, self.dtype, self.device)
        except Exception as error:  # one pipeline must not stop the others
            yield from _failed(rows, shard.pipeline, error)
            return
        while batch := list(islice(rows, self.batch_size)):
            try:
                images = self._images(pipeline, batch)
            except Exception as error:
                yield from _failed(batch, shard.pipeline, error)
                continue
            for row, image in zip(batch, images, strict=True):
                if np.isfinite(image).all():
                    pixels = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
                    yield {**row, "image": encode_png(pixels, row["image"]["path"])}
                else:
                    yield Quarantined(row_name(row), "the pipeline gave pixels that are not numbers")

    def _images(self, pipeline: Any, rows: list[Row]) -> np.ndarray:
        options = {"width": self.width, "height": self.height, "guidance_scale": self.guidance_scale}
        with torch.inference_mode():
            images = pipeline(
                prompt=[row["prompt"] for row in rows],
                num_inference_steps=rows[0]["steps"],
                generator=[torch.Generator("cpu").manual_seed(row["seed"]) for row in rows],
                output_type="np",
                **{name: value for name, value in options.items() if value is not None},
                **self.pipeline_kwargs,
            ).images
        if len(images) != len(rows):
            raise ValueError(f"it gave {len(images)} images for {len(rows)} prompts")
        return images


def _failed(rows: Iterable[Row], pipeline: str, error: Exception) -> Iterator[Quarantined]:
    """Rows that another run should try. The reason does not say where the pipeline lies."""
    why = str(error).replace(pipeline, shortened(pipeline)) if os.path.isabs(pipeline) else str(error)
    reason = f"{shortened(pipeline)} failed: {shortened(' '.join(why.split()))[:200] or type(error).__name__}"
    return (Quarantined(row_name(row), reason, again=True) for row in rows)


_held: dict[tuple[str, str, str], Any] = {}  # the pipeline of the last shard: one at a time is in memory


def _pipeline(*key: str) -> Any:
    """The pipeline of (name, dtype, device)."""
    if key not in _held:
        _held.clear()  # shards come one pipeline after the other
        _held[key] = _load(*key)
    return _held[key]


def _load(name: str, dtype: str, device: str) -> Any:
    from diffusers import DiffusionPipeline

    with errors_named(name, f"`pipeline` {name!r}"):
        pipeline = DiffusionPipeline.from_pretrained(name, **dtype_argument(getattr(torch, dtype)))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def release_pipelines() -> None:
    """Forget the pipeline that this process keeps loaded."""
    _held.clear()


def prompt_shards(
    rows: Sequence[dict[str, Any]],
    pipelines: Sequence[str],
    steps: Sequence[int],
    *,
    images: int = 1,
    seed: int = 0,
    size: int = 256,
) -> list[PromptShard]:
    """Every prompt for every pipeline and number of steps, in shards of `size`.

    Args:
        rows: of [`read_prompt_file`].
        pipelines: ids or folders.
        steps: numbers of denoising steps; one for all pipelines, or several that each pipeline takes.
        images: of each prompt, pipeline and number of steps.
        seed: where a row has none of its own. All pipelines get the same seeds.
    """
    for name, value in (("images", images), ("size", size), ("steps", min(steps, default=0))):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, found {value}.")
    for name, values in (("pipelines", pipelines), ("steps", steps)):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"`{name}` must name at least one, each once, found {list(values)!r:.100}.")
    if not rows:
        raise ValueError("There are no prompts: the file is empty.")
    names = [shortened(pipeline) for pipeline in pipelines]
    if len(set(names)) < len(names):
        raise ValueError(f"`pipelines` must end in different names, found {', '.join(names)}: rename a folder.")
    prompts = []
    for row in rows:
        own = derive_seed(seed, row["prompt"]) if row.get("seed") is None else row["seed"]
        prompts += [
            (row["prompt"], tuple(row["category"]), own if image == 0 else derive_seed(own, image))
            for image in range(images)
        ]
    shards, first = [], 0
    for pipeline in pipelines:
        for number in steps:
            for start in range(0, len(prompts), size):
                shards.append(PromptShard(tuple(prompts[start : start + size]), pipeline, number, first))
                first += len(shards[-1].prompts)
    return shards


def read_prompt_file(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Rows with `prompt`, `category` (a list) and `seed` (or None) of a file: JSON lines as `diffdoctor data prompts` writes them,
    or a text with a prompt on each line.

    Raises:
        ValueError: a line is something else; its number is named.
    """
    path, rows = Path(path), []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line) if path.suffix == ".jsonl" else {"prompt": line.strip()}
            prompt, category, seed = row["prompt"], row.get("category") or [], row.get("seed")
            category = [category] if isinstance(category, str) else category
            if not isinstance(prompt, str) or not prompt.strip():
                raise TypeError("`prompt` must be a text")
            if not isinstance(category, list) or not all(isinstance(name, str) and name for name in category):
                raise TypeError("`category` must be a text or a list of texts")
            if seed is not None and not (type(seed) is int and 0 <= seed < 2**63):
                raise TypeError("`seed` must be a whole number in [0, 2**63)")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{str(path)!r}, line {number}: {type(error).__name__}: {error}") from error
        rows.append({"prompt": prompt, "category": category, "seed": seed})
    return rows
