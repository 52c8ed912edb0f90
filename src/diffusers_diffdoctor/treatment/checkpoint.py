# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints that are whole or not there, and the base they belong to."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .adapter import lora_files, plain_values


LIVE_LORA_FILE = "live_lora_weights.safetensors"  # the weights being trained, where the ones above are their average
RECORD_FILE = "treatment.json"
STATE_FILE = "trainer_state.json"


def describe_base(pipeline: Any, denoiser_name: str) -> dict[str, str]:
    """What tells one base from another: name, class and a digest of the denoiser. Call it before an adapter is added.

    The digest covers the name, shape and a few values of each weight, rounded to bfloat16, so that it does not depend on
    the floating-point type the pipeline was loaded in, nor on where the folder lies.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(getattr(pipeline, denoiser_name).state_dict().items()):
        sample = [value.to("cpu", torch.bfloat16).tolist() for value in plain_values(weight, 4)]
        digest.update(f"{name} {tuple(weight.shape)} {sample}\n".encode())
    return {
        "pipeline": str(getattr(pipeline, "name_or_path", "") or ""),
        "pipeline_class": type(pipeline).__name__,
        "denoiser": denoiser_name,
        "digest": digest.hexdigest()[:16],
    }


def check_same_base(checkpoint: str | os.PathLike, base: dict[str, str]) -> None:
    """Refuse a checkpoint that was trained on another base than `base`, a result of [`describe_base`]."""
    path = Path(checkpoint, RECORD_FILE)
    if not path.is_file():
        missing = f"it has no {RECORD_FILE}" if Path(checkpoint).is_dir() else "there is no such folder"
        raise ValueError(
            f"`resume_from_checkpoint` is {str(checkpoint)!r}, which is no checkpoint of treatment: {missing}."
        )
    saved = json.loads(path.read_text(encoding="utf-8"))["base"]
    if any(saved[key] != base[key] for key in ("pipeline_class", "denoiser", "digest")):
        then, now = (
            f"{side['pipeline'] or 'unnamed'!r} ({side['pipeline_class']}, weights {side['digest']})"
            for side in (saved, base)
        )
        raise ValueError(
            f"Checkpoint {str(checkpoint)!r} treats the pipeline {then}, but this trainer treats {now}. Resume with the "
            "pipeline of the checkpoint, or start anew in another `output_dir`."
        )


@contextmanager
def written_whole(folder: str | os.PathLike, accelerator: Any, writes: bool) -> Iterator[str]:
    """Yield a temporary folder that becomes `folder` once the block has ended without an error, on every process.

    A process that is killed meanwhile leaves a `_partial-...` folder: never resumed from, never uploaded, removed by the next
    save. `writes` is True on the processes that create and rename (one for each file system).
    """
    folder = Path(folder)
    partial = folder.with_name(f"_partial-{folder.name}")
    if writes:
        for leftover in folder.parent.glob("_partial-*"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    yield str(partial)
    accelerator.wait_for_everyone()
    if writes:
        for path in [*partial.rglob("*"), partial]:  # a rename must not reach the disk before what it names
            _sync(path)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
        _sync(folder.parent)
    accelerator.wait_for_everyone()


def _sync(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # folders cannot be opened on Windows
        return
    try:
        os.fsync(descriptor)
    except OSError:  # nor synchronised on some network file systems
        pass
    finally:
        os.close(descriptor)


def last_checkpoint(output_dir: str | os.PathLike) -> str:
    """The whole checkpoint of `output_dir` with the most steps. A `ValueError` if there is none."""
    found = {
        int(match[1]): path
        for path in (Path(output_dir).iterdir() if Path(output_dir).is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
        and lora_files(path)
        and all((path / name).is_file() for name in (RECORD_FILE, STATE_FILE))
    }
    if not found:
        raise ValueError(
            f"`resume_from_checkpoint` is True, but {str(output_dir)!r} has no whole checkpoint. Start without it, or pass "
            "the path of a checkpoint."
        )
    return str(found[max(found)])


class LoraAverage:
    """Exponential moving average of the trained weights, `average += (1 - d) * (weights - average)` after each step.

    d is `decay`, but no more than (1 + step) / (10 + step), so that the first steps do not weigh for ever.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], decay: float):
        self.parameters, self.decay = parameters, decay
        self.average = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for average, parameter in zip(self.average, self.parameters):
            average.lerp_(parameter.to(average.device), 1 - decay)

    @torch.no_grad()
    def copy_from_parameters(self) -> None:
        for average, parameter in zip(self.average, self.parameters):
            average.copy_(parameter)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The average stands in for the weights inside the block."""
        live = [parameter.detach().clone() for parameter in self.parameters]
        self._write(self.average)
        try:
            yield
        finally:
            self._write(live)

    @torch.no_grad()
    def _write(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self.parameters, values):
            parameter.copy_(value)
