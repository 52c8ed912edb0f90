# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Look at a pipeline during its treatment: generate held-out prompts, judge the images, write a picture and a report."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..evaluation import area_ratio, before_after_grid, image_grid, max_confidence, plot_curves
from ..evaluation.report import Figure, Picture, Section, Table, html_report
from ..rewards import RewardOutput


@dataclass
class Sample:
    """One generated image and what was found in it; its tensors lie on the CPU.

    Attributes:
        prompt: what was asked for.
        seed: seed of its noise.
        image: (3, H, W) in [0, 1].
        map: (1, H, W) in [0, 1], 1 = artifact; `None` if no reward gives a map.
        figures: its score and what its maps say, under the names that are logged.
    """

    prompt: str
    seed: int
    image: torch.Tensor
    map: torch.Tensor | None
    figures: dict[str, float]


def diagnose_maps(maps: torch.Tensor, prefix: str = "") -> dict[str, torch.Tensor]:
    """Artifact maps (B, 1, H, W) -> figures of each image, (B,), under the names that are logged."""
    highest = max_confidence(maps)
    return {
        f"{prefix}artifact_frequency": (highest >= 0.5).float(),
        f"{prefix}max_confidence": highest,
        f"{prefix}area_ratio": area_ratio(maps),
    }


@torch.no_grad()
def examine(
    generate: Callable[[list[str], list[int]], torch.Tensor],
    reward: Callable[[torch.Tensor, Sequence[str]], RewardOutput] | None,
    judge: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch_size: int,
    device: torch.device,
) -> list[Sample]:
    """Generate and judge one image for each prompt and seed. Without a reward the map that is shown is the judge's."""
    samples = []
    for start in range(0, len(prompts), batch_size):
        batch, numbers = list(prompts[start : start + batch_size]), list(seeds[start : start + batch_size])
        images = generate(batch, numbers).to(device).float()
        figures, maps = {}, None
        if reward is not None:
            output = reward(images, batch)
            figures = {"reward": output.score} | {f"rewards/{name}": score for name, score in output.parts.items()}
            maps = output.map
        if maps is not None:
            figures |= diagnose_maps(maps)
        if judge is not None:
            judged = judge.confidence(images)
            figures |= diagnose_maps(judged, "judge_")
            maps = judged if reward is None else maps
        samples += [
            Sample(
                prompt=prompt,
                seed=numbers[i],
                image=images[i].cpu(),
                map=None if maps is None else maps[i].float().cpu(),
                figures={name: values[i].item() for name, values in figures.items()},
            )
            for i, prompt in enumerate(batch)
        ]
    return samples


def mean_figures(samples: Sequence[Sample]) -> dict[str, float]:
    """The mean over the images of each figure of [`examine`]; the figures of no image are an empty dictionary."""
    names = samples[0].figures if samples else ()
    return {name: math.fsum(sample.figures[name] for sample in samples) / len(samples) for name in names}


def draw(before: Sequence[Sample], after: Sequence[Sample]) -> Image.Image:
    """One picture of the same prompts and seeds before and after, with heatmaps where the reward gives maps."""
    captions = [sample.prompt for sample in after]
    if all(sample.map is not None for sample in [*before, *after]):
        images = [torch.stack([sample.image for sample in side]) for side in (before, after)]
        maps = [torch.stack([sample.map for sample in side]) for side in (before, after)]
        return before_after_grid(*images, *maps, captions=captions)
    rows = [[old.image, new.image] for old, new in zip(before, after)]
    return image_grid(rows, column_labels=["before", "after"], captions=captions)


def show_in_trackers(callbacks: Sequence[Any], tag: str, picture: Image.Image, step: int) -> None:
    """Send the picture to TensorBoard and Weights & Biases where their callbacks are active."""
    for callback in callbacks:
        if (writer := getattr(callback, "tb_writer", None)) is not None:
            pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
            writer.add_image(tag, pixels.view(picture.height, picture.width, 3), step, dataformats="HWC")
        if (wandb := getattr(callback, "_wandb", None)) is not None and getattr(wandb, "run", None) is not None:
            wandb.log({tag: wandb.Image(picture), "train/global_step": step})


def _alarms(log_history: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """(step, figure, value, limit, what followed) of each alarm in the log."""
    rows = []
    for entry in log_history:
        back = entry.get("rollback/step")
        followed = "nothing" if back is None else f"back to the LoRA of step {back:.0f}"
        for key, value in entry.items():
            if key.startswith("alarm/") and f"{key}/limit" in entry:
                figure = key.removeprefix("alarm/").replace("_", " ")
                rows.append((str(entry["step"]), figure, f"{value:.4g}", f"{entry[f'{key}/limit']:.4g}", followed))
    return rows


def write_training_report(output_dir: str | Path, log_history: Sequence[Mapping[str, Any]], title: str) -> Path:
    """`training_report.html`: how the figures moved from the first evaluation to the last, the curves, the newest pictures."""
    output_dir = Path(output_dir)
    figures = []
    for name in ("artifact_frequency", "judge_artifact_frequency", "max_confidence", "reward"):
        values = [(row["step"], row[f"eval_{name}"]) for row in log_history if f"eval_{name}" in row]
        if values:
            (first_step, first), (last_step, last) = values[0], values[-1]
            better = first < last if name == "reward" else last < first
            shape = "{:.1%} → {:.1%}" if "frequency" in name else "{:.3f} → {:.3f}"
            label = name.removeprefix("judge_").replace("_", " ").capitalize()
            judged_by = "by the judge" if name.startswith("judge_") else "by the rewards that are trained against"
            # a fresh LoRA changes nothing, so step 0 is the untreated pipeline, which later steps are not
            steps = f"{f'step {first_step}' if first_step else 'untreated'} → step {last_step}"
            tone = "plain" if first == last else "good" if better else "bad"
            figures.append(Figure(label, shape.format(first, last), f"{steps}, {judged_by}", tone))
    alarms = _alarms(log_history)
    if any("spectral_growth" in key for row in log_history for key in row):
        note = f"the first at step {alarms[0][0]}" if alarms else "of the guards, in all evaluations"
        figures.append(Figure("Alarms", str(len(alarms)), note, "bad" if alarms else "good"))
    sections = []
    if alarms:
        sections.append(Section("Alarms", table=Table(("step", "figure", "value", "limit", "what followed"), alarms)))
    curves = plot_curves(log_history, output_dir / "curves.png")
    if curves is not None:
        sections.append(Section("Curves", pictures=[Picture(curves)], wide=True))
    drawn: dict[int, list[Path]] = {}  # step -> the picture of each set of held-out prompts
    for path in sorted(output_dir.glob("eval*/step-*.png")):
        if (match := re.fullmatch(r"step-(\d+)\.png", path.name)) and re.match(r"eval(-|$)", path.parent.name):
            drawn.setdefault(int(match[1]), []).append(path)
    for step in sorted(drawn, reverse=True)[:3]:
        for path in drawn[step]:
            name = path.parent.name.removeprefix("eval").removeprefix("-")
            heading = f"Step {step}, {name}" if name else f"Step {step}"
            sections.append(Section(heading, pictures=[Picture(path)], wide=True))
    steps = max((entry.get("step", 0) for entry in log_history), default=0)
    return html_report(output_dir / "training_report.html", title, figures, sections, f"After {steps} steps.")
