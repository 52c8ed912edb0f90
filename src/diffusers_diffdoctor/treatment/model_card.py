# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The page that a treated LoRA shows on the Hub, and the way there."""

import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import torch
import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import PeftConfig

from ..evaluation import to_pil
from ..files import write_atomically
from ..names import markdown, shortened
from .adapter import loading_lines, scaling_call
from .config import TreatmentConfig
from .examine import Sample


RECIPE = (
    "num_inference_steps",
    "gradient_fraction",
    "gradient_placement",
    "gradient_placement_kwargs",
    "guidance_scale",
    "base_lora",
    "base_lora_scale",
    "pixel_selection",
    "pixel_threshold",
    "pixel_weight",
    "offline_weight",
    "drift_weight",
    "noise_level",
    "num_images_per_prompt",
    "updates_per_pass",
    "passes",
    "advantages",
    "clip_range",
    "kl_weight",
    "timestep_fraction",
    "beta",
    "learning_rate",
    "lr_scheduler_type",
    "optim",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "ema_decay",
    "bf16",
    "seed",
)
FIGURES = ("artifact_frequency", "max_confidence", "area_ratio", "reward")


@dataclass
class Treatment:
    """What the card tells of a treatment.

    Attributes:
        args: its configuration.
        pipeline: what was treated; it says how its LoRA is loaded.
        base: its description, see [`describe_base`].
        size: height and width of its images in pixels.
        adapter: the LoRA's configuration.
        rewards: name -> weight.
        detector: whether an artifact detector is among the rewards.
        offline: whether there was an offline loss.
        prompts: those it was trained on.
        step: updates of the LoRA that lies beside the card.
        log_history: the run's log, of which the figures of step 0 and of `step` are shown.
        images: the same prompts and seeds without that LoRA and with it; may be empty.
        method: how it was trained, as the end of a sentence; None for the gradient of rewards.
        report: contents of the report.json beside the card, see [`~diffusers_diffdoctor.evaluation.render`]; its figures and
            its picture are shown instead of those of the log.
    """

    args: TreatmentConfig
    pipeline: DiffusionPipeline
    base: dict[str, str]
    size: tuple[int, int]
    adapter: PeftConfig
    rewards: dict[str, float]
    detector: bool
    offline: bool
    prompts: list[str]
    step: int
    log_history: list[dict[str, Any]]
    images: tuple[list[Sample], list[Sample]]
    method: str | None = None
    report: Mapping[str, Any] | None = None


def write_model_card(
    folder: Path,
    treatment: Treatment,
    title: str | None,
    repo_id: str,
    paper: dict[str, str],
    tags: list[str],
    **metadata: Any,
) -> None:
    """Write `folder/README.md` and the pictures it shows.

    Args:
        folder: where to.
        treatment: what to tell.
        title: the folder's name without it.
        repo_id: the LoRA's id on the Hub.
        paper: `title` and `id` (arXiv) of the method's paper.
        tags: the card's tags.
        **metadata: further entries of the card's data; None is left out.
    """
    args, base, adapter = treatment.args, treatment.base, treatment.adapter
    images = _save_images(folder, *treatment.images) if treatment.report is None else []
    prompts = [image["prompt"] for image in images] or list(dict.fromkeys(treatment.prompts))
    widget = [{"text": image["prompt"], "output": {"url": image["after"]}} for image in images]
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        # the Hub refuses a base that is not a repository's id
        base_model=base["pipeline"] if _is_hub_id(base["pipeline"]) else None,
        tags=list(dict.fromkeys(tags)),
        widget=widget or [{"text": prompt} for prompt in prompts[:3]],
        **{key: value for key, value in metadata.items() if value is not None},
    )
    unused = () if treatment.offline else ("offline_weight",)
    unused += () if args.base_lora is not None else ("base_lora_scale",)
    unused += () if treatment.detector else ("pixel_selection", "pixel_threshold")
    recipe = [
        (name, shortened(getattr(value := getattr(args, name), "value", value)))
        for name in RECIPE
        if hasattr(args, name) and name not in unused
    ]
    recipe += [] if treatment.offline else [("offline loss", "left out")]
    recipe += [("height x width", f"{treatment.size[0]} x {treatment.size[1]} pixels")]
    targets = adapter.target_modules if isinstance(adapter.target_modules, str) else sorted(adapter.target_modules)
    recipe += [("LoRA", f"rank {adapter.r}, alpha {adapter.lora_alpha}, on {targets}")]
    recipe += [("rewards", ", ".join(f"{weight:g} x {name}" for name, weight in treatment.rewards.items()))]
    recipe += [("updates", treatment.step), ("processes", args.world_size)]
    first, last, figures = (None, None, [])
    if treatment.report is None:
        first, last, figures = _first_and_last(treatment.log_history, treatment.step)
    template = Path(__file__).with_name("model_card_template.md").read_text(encoding="utf-8")
    page = jinja2.Template(template, undefined=jinja2.StrictUndefined, keep_trailing_newline=True).render(
        card_data=_yaml(data),
        model_name=markdown(title or folder.resolve().name),
        base_name=markdown(base["pipeline"] or base["pipeline_class"]),
        loading=loading_lines(
            treatment.pipeline,
            base["denoiser"],
            base=base["pipeline"] or base["pipeline_class"],
            lora=repo_id,
            dtype=getattr(torch, base["dtype"]),
            base_lora=shortened(args.base_lora) if args.base_lora is not None else None,
            base_lora_scale=args.base_lora_scale,
        ),
        weaker=scaling_call(treatment.pipeline, base["denoiser"], 0.7),
        example=example_call(treatment.pipeline, args, treatment.size, prompts[0]),
        detector=treatment.detector,
        method=treatment.method,
        images=[{**image, "prompt": markdown(image["prompt"])} for image in images],
        report=treatment.report,
        report_figures=[] if treatment.report is None else _report_figures(treatment.report),
        judged=any("judge" in figure["name"] for figure in figures),
        figures=[{**row, "name": markdown(row["name"])} for row in figures],
        first=first,
        last=last,
        step=treatment.step,
        recipe=[(name, markdown(str(value))) for name, value in recipe if value is not None],
        args=args,
        versions=", ".join(f"{name} {version(name)}" for name in ("diffusers", "transformers", "peft", "torch")),
        paper_id=paper["id"],
        paper_title=paper["title"],
    )
    write_atomically(folder / "README.md", page)


class _Dumper(yaml.SafeDumper):
    """Writes every text so that it is read back to the letter: YAML folds what it takes for line breaks."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = '"' if re.search("[\x85\u2028\u2029]", text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(str, _Dumper.represent_text)


def _yaml(data: ModelCardData) -> str:
    return yaml.dump(data.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf).rstrip()


def example_call(pipeline: DiffusionPipeline, args: TreatmentConfig, size: tuple[int, int], prompt: str) -> str:
    """The line of Python that draws as the LoRA was trained: its size, steps and guidance, where the pipeline takes them."""
    accepted = inspect.signature(pipeline.__call__).parameters
    settings = {
        "height": size[0],
        "width": size[1],
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "max_sequence_length": args.max_sequence_length,
    }
    given = [f"{name}={value}" for name, value in settings.items() if value is not None and name in accepted]
    return f"image = pipe({', '.join([repr(prompt), *given])}).images[0]"


def _report_figures(report: Mapping[str, Any]) -> list[dict[str, str]]:
    rows = [
        {"name": markdown(f"artifact frequency, {name}"), "before": f"{x['before']:.1%}", "after": f"{x['after']:.1%}"}
        for name, x in report["artifact_frequency"].items()
    ]
    fidelity = report["fidelity"]
    if fidelity["before"] is not None:
        rows.append(
            {"name": markdown(fidelity["name"]), **{side: f"{fidelity[side]:.2f}" for side in ("before", "after")}}
        )
    return rows


def _save_images(folder: Path, before: list[Sample], after: list[Sample]) -> list[dict[str, str]]:
    images = []
    for i, (old, new) in enumerate(zip(before, after)):
        (folder / "images").mkdir(parents=True, exist_ok=True)
        names = {"before": f"images/before_{i}.png", "after": f"images/after_{i}.png"}
        for side, sample in (("before", old), ("after", new)):
            to_pil(sample.image).save(folder / names[side])
        images.append({"prompt": new.prompt, **names})
    return images


def _first_and_last(
    log_history: list[dict[str, Any]], step: int
) -> tuple[int | None, int | None, list[dict[str, str]]]:
    """The evaluation of step 0, which is of the untreated pipeline, and the last one up to `step`: their steps, and a row for
    each figure. Where step 0 was not evaluated there is nothing to compare with: its step is None, and its figures are empty."""
    evaluations = [entry for entry in log_history if any(_figure(key) for key in entry) and entry["step"] <= step]
    if not evaluations:
        return None, None, []
    # a step's entries are several where there are several sets of held-out prompts, or where it was evaluated again
    first, last = 0 if evaluations[0]["step"] == 0 else None, evaluations[-1]["step"]
    start = {key: value for entry in reversed(evaluations) if entry["step"] == first for key, value in entry.items()}
    end = {key: value for entry in evaluations if entry["step"] == last for key, value in entry.items()}
    names = sorted((key for key in end if _figure(key) and (first is None or key in start)), key=_figure)
    rows = [
        {"name": _label(key), "first": f"{start[key]:.4g}" if key in start else "", "last": f"{end[key]:.4g}"}
        for key in names
    ]
    return first, last, rows


def _figure(key: str) -> tuple[str, bool, int] | None:
    """`eval_[set_][judge_]figure` -> the set, whether it is not the judge's, and the figure's place; None for other keys."""
    for place, figure in enumerate(FIGURES):
        if key.startswith("eval_") and key.endswith(figure):
            group = key.removeprefix("eval_").removesuffix(figure)
            return group.removesuffix("judge_"), not group.endswith("judge_"), place
    return None


def _label(key: str) -> str:
    return key.removeprefix("eval_").replace("_", " ")


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists()
