# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""How strong a treatment is best: its LoRA at several scales, on held-out prompts, by a judge; and the best one written.

The scale that was trained need not be the best: less of it may heal as much and change less.
"""

import ast
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..evaluation.metrics import pairwise_diversity
from ..files import write_atomically, written_atomically
from ..rollout import DifferentiableRollout
from ..rollout.requirements import check_pipeline
from ..training.record import missing_entries_named, read_record
from .adapter import CONFIG_NAME, load_saved_lora, lora_files
from .checkpoint import RECORD_FILE
from .prepare import load_pipeline


# how much of the untreated pipeline's fidelity and diversity a scale may lose to be chosen; ours
FIDELITY_LOSS, DIVERSITY_LOSS = 0.02, 0.2
SECTION = "## Which scale"


@dataclass(frozen=True)
class ScaleFigures:
    """What a scale of the LoRA does. 0 is the untreated pipeline.

    Attributes:
        scale: of what was trained.
        frequency: share of images in which the judge sees an artifact, in [0, 1].
        fidelity: mean score of how images fit their prompts; None where it was not measured.
        diversity: mean distance between the seeds of a prompt; None where it was not measured.
    """

    scale: float
    frequency: float
    fidelity: float | None = None
    diversity: float | None = None


@torch.no_grad()
def sweep_scales(
    draw: Callable[[float], torch.Tensor],
    scales: Sequence[float],
    prompts: Sequence[str],
    judge: Any,
    fidelity: Callable[[torch.Tensor, Sequence[str]], torch.Tensor] | None = None,
    features: Callable[[torch.Tensor], torch.Tensor] | None = None,
    batch_size: int = 8,
) -> list[ScaleFigures]:
    """The figures of each scale, of the untreated pipeline first.

    Args:
        draw: a scale -> images (N, 3, H, W) in [0, 1], of the same prompts and seeds for every scale.
        scales: above 0.
        prompts: N, one for each image.
        judge: with `confidence(images)`; best one that the treatment never saw.
        fidelity: (images, prompts) -> (N,), higher is better.
        features: images -> (N, F), whose distance is the diversity; measured where a prompt comes twice.
        batch_size: images that the judge is shown at a time.

    Raises:
        ValueError: no scale, one that is not above 0, or images that are not as many as prompts.
    """
    if not scales or not all(scale > 0 for scale in scales):
        raise ValueError(f"`scales` is {list(scales)!r}, but must be numbers above 0: 0 is measured anyway.")
    found = []
    for scale in (0.0, *sorted(set(scales))):
        images = draw(scale)
        if len(images) != len(prompts):
            raise ValueError(f"`draw` made {len(images)} images for {len(prompts)} prompts.")
        parts = [(images[i : i + batch_size], prompts[i : i + batch_size]) for i in range(0, len(images), batch_size)]
        wrong = torch.cat([judge.confidence(part).flatten(1).amax(1) >= 0.5 for part, _ in parts])
        fits = None if fidelity is None else torch.cat([fidelity(*part) for part in parts]).mean().item()
        spread = None
        if features is not None and len(set(prompts)) < len(prompts):
            spread = pairwise_diversity(torch.cat([features(part) for part, _ in parts]), prompts, "euclidean")
        found.append(ScaleFigures(scale, wrong.float().mean().item(), fits, spread))
    return found


def best_scale(figures: Sequence[ScaleFigures]) -> ScaleFigures:
    """
    The scale with the fewest images that the judge calls wrong, among those that keep fidelity and diversity; of equals the least.

    Kept is 98 % of the untreated pipeline's fidelity and 80 % of its diversity (ours), where they were measured. If none
    keeps them, it is the untreated pipeline: scale 0.

    Args:
        figures: of [`sweep_scales`], the untreated pipeline first.
    """
    untreated = figures[0]
    kept = [
        one
        for one in figures
        if (one.fidelity is None or one.fidelity >= untreated.fidelity - FIDELITY_LOSS * abs(untreated.fidelity))
        and (one.diversity is None or one.diversity >= (1 - DIVERSITY_LOSS) * untreated.diversity)
    ]
    return min(kept, key=lambda one: (one.frequency, one.scale))


class SavedTreatment:
    """A treatment's folder upon its pipeline, drawn as it was trained, at any scale.

    Args:
        pipeline: id, folder or loaded pipeline that was treated.
        folder: what `trainer.save_model()` wrote.
        base_lora: the LoRA that the pipeline wore; the recorded one without it, whose folder may lie elsewhere by now.
        dtype: the type of a pipeline given by name.

    Raises:
        ValueError: the folder has no LoRA or no record of its treatment.
    """

    def __init__(
        self,
        pipeline: str | DiffusionPipeline,
        folder: str | os.PathLike,
        base_lora: str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        folder = Path(folder)
        if not lora_files(folder) or not (folder / RECORD_FILE).is_file():
            raise ValueError(
                f"`folder` is {str(folder)!r}, which has no LoRA with a {RECORD_FILE}. Pass what trainer.save_model() wrote."
            )
        with missing_entries_named(folder / RECORD_FILE):
            args = {key: _recorded(value) for key, value in read_record(folder / RECORD_FILE)["args"].items()}
        worn = {"base_lora": base_lora or args.get("base_lora"), "base_lora_scale": args.get("base_lora_scale", 1.0)}
        self.pipeline = load_pipeline(pipeline, dtype, **worn)
        name = check_pipeline(self.pipeline)
        load_saved_lora(self.pipeline, name, str(folder))
        names = ("height", "width", "num_inference_steps", "guidance_scale", "max_sequence_length", "pipeline_kwargs")
        self.rollout = DifferentiableRollout(self.pipeline, **{key: args[key] for key in names if key in args})
        self.layers = [module for module in self.rollout.denoiser.modules() if isinstance(module, BaseTunerLayer)]

    def draw(self, scale: float, prompts: Sequence[str], seeds: Sequence[int], batch_size: int = 8) -> torch.Tensor:
        """Images (N, 3, H, W) in [0, 1] of the LoRA at a scale; 1 is as it was trained, 0 without it."""
        for layer in self.layers:
            for adapter in layer.active_adapters:
                layer.set_scale(adapter, scale)
        return self.rollout.generate(list(prompts), list(seeds), batch_size)


def _recorded(value: Any) -> Any:
    """A setting out of a record, which keeps what JSON has no word for as Python writes it."""
    try:
        return ast.literal_eval(value) if isinstance(value, str) and value[:1] in ("N", "{") else value
    except (ValueError, SyntaxError):
        return value


def write_scaled(folder: str | os.PathLike, output: str | os.PathLike, figures: Sequence[ScaleFigures]) -> Path:
    """Write the LoRA of a folder at its best scale, with the figures of all scales in its card.

    Args:
        folder: what `trainer.save_model()` wrote.
        output: another folder, for the scaled LoRA and its card.
        figures: of [`sweep_scales`].

    Raises:
        ValueError: `output` is `folder`, the best scale is 0, or the folder has no LoRA.
    """
    folder, output, best = Path(folder), Path(output), best_scale(figures)
    if output.resolve() == folder.resolve():
        raise ValueError(
            f"`output` is {str(output)!r}, the folder of the LoRA itself: what was trained would be lost."
        )
    if best.scale == 0:
        raise ValueError(
            "`figures` say that the untreated pipeline is best, or that no scale keeps fidelity and diversity."
        )
    files = lora_files(folder)
    if not files:
        raise ValueError(f"`folder` is {str(folder)!r}, which has no LoRA.")
    output.mkdir(parents=True, exist_ok=True)
    with safe_open(files[0], "pt") as opened:
        metadata = opened.metadata()
    weights = {
        name: value * best.scale if ".lora_B." in name else value for name, value in load_file(files[0]).items()
    }
    with written_atomically(output / files[0].name) as unfinished:
        save_file(weights, unfinished, metadata=metadata)
    if files[0].name != files[-1].name:
        write_atomically(output / CONFIG_NAME, files[-1].read_text(encoding="utf-8"))
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    text = re.sub(rf"\n*{re.escape(SECTION)}\n.*?(?=\n## |\Z)", "", text, flags=re.S)
    write_atomically(output / "README.md", f"{text.rstrip()}\n\n{scale_section(figures)}\n")
    write_atomically(output / "scales.json", json.dumps([vars(one) for one in figures], indent=1) + "\n")
    return output


def scale_section(figures: Sequence[ScaleFigures]) -> str:
    """The section of the card: the figures of all scales, and which one these weights have."""
    best = best_scale(figures)
    lines = [
        SECTION,
        "",
        f"These weights are the trained ones times {best.scale:g}: the scale with the fewest images that the judge calls wrong on "
        "held-out prompts, among those that keep 98 % of the fidelity and 80 % of the diversity, where these were measured.",
        "",
        "| scale | judged wrong | fidelity | diversity |",
        "|---|---|---|---|",
    ]
    for one in figures:
        name = f"**{one.scale:g}**" if one is best else f"{one.scale:g}"
        numbers = ("" if value is None else f"{value:.4g}" for value in (one.fidelity, one.diversity))
        lines.append(f"| {name} | {one.frequency:.1%} | {' | '.join(numbers)} |")
    return "\n".join(lines)
