# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What a treatment did: the same prompts and seeds before and after it, judged, compared and shown."""

import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TextIO

import torch
from PIL import Image
from tqdm.auto import tqdm

from .. import __version__
from . import metrics
from .pictures import before_after_grid, plot_curves
from .report import Figure, Picture, Section, Table, html_report, write_atomically


class Judge(Protocol):
    """Anything that diagnoses images: an `ArtifactDetectorForSemanticSegmentation`, or a model of your own."""

    def confidence(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 1, H, W) in [0, 1], 1 = artifact."""


def treatment_report(
    before: torch.Tensor,
    after: torch.Tensor,
    prompts: Sequence[str],
    output_dir: str | os.PathLike,
    *,
    judges: Mapping[str, Judge],
    seeds: Sequence[int] | None = None,
    categories: Sequence[str] | None = None,
    fidelity: Callable[[torch.Tensor, Sequence[str]], torch.Tensor] | None = None,
    fidelity_name: str = "prompt fidelity",
    features: Callable[[torch.Tensor], torch.Tensor] | Mapping[str, Callable] | None = None,
    diversity_groups: Sequence | None = None,
    diversity_images: tuple[torch.Tensor, torch.Tensor] | None = None,
    other_categories: Mapping[str, Mapping] | None = None,
    judge_error_rates: Mapping[str, float] | None = None,
    training_log: Sequence[Mapping] | None = None,
    lora_dir: str | os.PathLike | None = None,
    base_model: str | None = None,
    title: str = "Treatment report",
    threshold: float = 0.5,
    change_threshold: float = 0.1,
    batch_size: int = 8,
    grid_images: int = 12,
    details: Mapping[str, object] | None = None,
    show_progress: bool = True,
) -> dict:
    """Compare images of the same prompts and seeds from before and after a treatment, and write the report.

    Args:
        before: (N, 3, H, W) in [0, 1], images of the untreated pipeline.
        after: (N, 3, H, W) in [0, 1], images of the treated pipeline from the same prompts and seeds.
        prompts: N texts.
        output_dir: folder for report.json, report.html, report.png (grid) and, with a `training_log`, curves.png.
        judges: name -> judge; the first one is the one that counts: its diagnosis is shown, and `change` is measured
            around it. Put a judge there that the treatment never saw, and the detector that was trained against after
            it, for example `{"judge": judge, "detector": detector}`.
        seeds: N seeds, only recorded.
        categories: N names; then the artifact frequency is also reported for each category.
        fidelity: callable(images, prompts) -> (N,) scores, higher is better, for example `ClipScore`.
        fidelity_name: what `fidelity` measures, for people.
        features: callable(images) -> (N, F), for the diversity: the Euclidean distance between images of one group. Or
            name -> callable, of which the first is the one that counts. Normalize embeddings whose length means nothing.
            Without it the diversity is not measured.
        diversity_groups: N labels (or one per image of `diversity_images`); distances are taken within a group. By
            default the prompts.
        diversity_images: images (before, after) made for the diversity, when those above have one seed per prompt.
        other_categories: `categories` of another report, of prompts that have no artifacts to treat, say. They are shown
            beside these, and count in no other figure.
        judge_error_rates: published error rates of the judge, see [`error_rates`]: shares, counts (integers) and tables
            of them; recorded and shown with its figures.
        training_log: `trainer.state.log_history`.
        lora_dir: where the treated weights lie, for the instructions.
        base_model: id or folder of the untreated pipeline, for the instructions.
        threshold: an image has an artifact if its maximum confidence is at least this.
        change_threshold: a pixel belongs to the diagnosed region above this confidence, see [`pixel_change`].
        batch_size: images per call of judges, fidelity and features.
        grid_images: images in report.png, evenly spaced over all of them, not picked.
        details: further facts to keep in report.json under "details", such as settings.

    Returns:
        The contents of report.json. Shares and confidences are in [0, 1]; a figure that was not measured is None:

        - `artifact_frequency[judge]`: `before`, `after` (lower is better), their `before_interval`, `after_interval`
          (95 %, Wilson), and the numbers of images `healed` and `harmed` (ill before and sound after, and the reverse)
        - `max_confidence[judge]`, `area_ratio[judge]`: means `before`, `after`
        - `fidelity`: `before`, `after`, and `difference_interval`, 95 % for the mean difference over the pairs
        - `diversity`, `sharpness`: `before`, `after`
        - `diversity_by[name]`: `before`, `after` for each of the `features`, if they have names
        - `change`: `inside`, `outside` the region that the first judge diagnosed
        - `categories[name][judge]`: as `artifact_frequency`
        - `counts`, `thresholds`, `judge_error_rates`, `lora_dir`, `base_model`, `details`, `training_log`
        - `images`: one row per image with prompt, seed, category and maximum confidences
    """
    _check(before, after, prompts, judges, seeds, categories, features, diversity_groups, diversity_images, batch_size)
    named_features = features if isinstance(features, Mapping) else {"": features} if features is not None else {}
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    prompts, count, main = list(prompts), len(before), next(iter(judges))
    sides = {"before": before, "after": after}
    diversity_sides = dict(zip(sides, diversity_images)) if diversity_images is not None else sides
    if diversity_groups is None:
        diversity_groups = prompts

    steps = 2 * math.ceil(count / batch_size) * (len(judges) + (fidelity is not None))
    steps += 2 * math.ceil(len(diversity_sides["before"]) / batch_size) * len(named_features)
    worst, area, shown_maps, scores = {}, {}, {}, {}
    diversity = {name: {} for name in named_features}
    with tqdm(total=steps, desc="judging", unit="batch", disable=None if show_progress else True) as progress:
        for side, images in sides.items():
            for name, judge in judges.items():
                maps = _in_batches(lambda x, judge=judge: _diagnose(judge, x), images, batch_size, progress)
                worst[name, side] = metrics.max_confidence(maps)
                area[name, side] = metrics.area_ratio(maps, threshold)
                if name == main:
                    shown_maps[side] = maps
            if fidelity is not None:
                scores[side] = _in_batches(fidelity, images, batch_size, progress, prompts)
            for name, function in named_features.items():
                rows = _in_batches(function, diversity_sides[side], batch_size, progress)
                diversity[name][side] = metrics.pairwise_diversity(rows, diversity_groups, distance="euclidean")

    report = {
        "artifact_frequency": {n: _frequency(worst[n, "before"], worst[n, "after"], threshold) for n in judges},
        "max_confidence": {n: {s: worst[n, s].mean().item() for s in sides} for n in judges},
        "area_ratio": {n: {s: area[n, s].mean().item() for s in sides} for n in judges},
        "fidelity": _paired(scores) | {"name": fidelity_name},
        "diversity": next(iter(diversity.values()), dict.fromkeys(sides)),
        "diversity_by": {name: values for name, values in diversity.items() if name},
        "sharpness": {side: metrics.sharpness(images).mean().item() for side, images in sides.items()},
        "change": metrics.pixel_change(before, after, shown_maps["before"], change_threshold) | {"region_of": main},
        "categories": {},
        "judge_error_rates": dict(judge_error_rates) if judge_error_rates is not None else None,
        "counts": {
            "images": count,
            "prompts": len(set(prompts)),
            "diversity_images": len(diversity_sides["before"]) if features is not None else 0,
            "height": before.shape[2],
            "width": before.shape[3],
        },
        "thresholds": {"artifact": threshold, "change": change_threshold},
        "lora_dir": os.fspath(lora_dir) if lora_dir is not None else None,
        "base_model": base_model,
        "details": dict(details or {}),
        "version": __version__,
    }
    for category in sorted(set(categories or ())):
        members = torch.tensor([name == category for name in categories])
        report["categories"][category] = {
            name: _frequency(worst[name, "before"][members], worst[name, "after"][members], threshold)
            for name in judges
        }
    report["categories"] |= other_categories or {}
    report["images"] = [
        {
            "prompt": prompts[i],
            "seed": int(seeds[i]) if seeds is not None else None,
            "category": categories[i] if categories is not None else None,
            **{name: {side: worst[name, side][i].item() for side in sides} for name in judges},
        }
        for i in range(count)
    ]
    report["training_log"] = list(training_log or [])
    report = _plain(report)

    chosen = torch.linspace(0, count - 1, min(grid_images, count)).round().long()
    grid = before_after_grid(
        before[chosen],
        after[chosen],
        shown_maps["before"][chosen],
        shown_maps["after"][chosen],
        [prompts[i] if seeds is None else f"{prompts[i]} (seed {seeds[i]})" for i in chosen],
    )
    _save_png(grid, output_dir / "report.png")
    curves = plot_curves(training_log, output_dir / "curves.png") if training_log else None
    _write_html(report, output_dir / "report.html", title, output_dir / "report.png", curves, len(chosen))
    # Last, so that a report.json stands for a whole report.
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(output_dir / "report.json", text.encode("utf-8"))
    return report


def print_summary(report: Mapping, file: TextIO | None = None) -> None:
    """Print the figures of a [`treatment_report`], where the LoRA lies and the three lines that load it."""
    rows = _rows(report)
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"Before and after the treatment, {report['counts']['images']} images of the same prompts and seeds:", ""]
    lines.append(f"  {'':{widths[0]}}  {'before':>{max(6, widths[1])}}  {'after':>{max(6, widths[2])}}")
    for name, old, new, note in rows:
        lines.append(f"  {name:{widths[0]}}  {old:>{max(6, widths[1])}}  {new:>{max(6, widths[2])}}  {note}".rstrip())
    judge = next(iter(report["artifact_frequency"]))
    if report["categories"]:
        lines += ["", f"  Artifact frequency by category, {judge}:"]
    for category, judges in report["categories"].items():
        old, new = _share(judges[judge]["before"]), _share(judges[judge]["after"])
        lines.append(f"  {'  ' + category:{widths[0]}}  {old:>{max(6, widths[1])}}  {new:>{max(6, widths[2])}}")
    if report["judge_error_rates"]:
        lines += ["", f"  The judge's own errors: {_errors(report['judge_error_rates'])}"]
    if report["lora_dir"]:
        lines += ["", f"The LoRA lies in {report['lora_dir']}. To use it:", ""]
        lines += ["    " + line for line in _loading_code(report).splitlines()]
    print("\n".join(lines), file=file or sys.stdout)


def _loading_code(report: Mapping) -> str:
    base, lora = (json.dumps(text, ensure_ascii=False) for text in (report["base_model"] or "...", report["lora_dir"]))
    return (
        "from diffusers import DiffusionPipeline\n"
        f"pipe = DiffusionPipeline.from_pretrained({base})\n"
        f"pipe.load_lora_weights({lora})"
    )


def _rows(report: Mapping) -> list[tuple[str, str, str, str]]:
    """(name, before, after, note) for each figure that was measured."""
    rows = []
    for name, x in report["artifact_frequency"].items():
        note = (
            f"95 %: {_interval(x['before_interval'])} and {_interval(x['after_interval'])}; "
            f"{x['healed']} healed, {x['harmed']} harmed"
        )
        rows.append((f"artifact frequency, {name}", _share(x["before"]), _share(x["after"]), note))
    for name, x in report["area_ratio"].items():
        rows.append((f"artifact area, {name}", _share(x["before"], 2), _share(x["after"], 2), ""))
    fidelity = report["fidelity"]
    if fidelity["before"] is not None:
        low, high = fidelity["difference_interval"] or (math.nan, math.nan)
        note = f"change {low:+.2f} to {high:+.2f} (95 %)" if fidelity["difference_interval"] else ""
        rows.append((fidelity["name"], f"{fidelity['before']:.2f}", f"{fidelity['after']:.2f}", note))
    diversity = {f"diversity, {name}": x for name, x in report["diversity_by"].items()}
    diversity = diversity or {"diversity": report["diversity"]}
    for key, x in (diversity | {"sharpness": report["sharpness"]}).items():
        if x["before"] is not None:
            rows.append((key, f"{x['before']:.4f}", f"{x['after']:.4f}", ""))
    change = report["change"]
    note = f"mean change of the pixels inside the region of the {change['region_of']}, and outside"
    inside, outside = (f"{x:.4f}" if x is not None else "-" for x in (change["inside"], change["outside"]))
    rows.append(("change inside, outside", inside, outside, note))
    return rows


def _write_html(report, path, title, grid, curves, shown) -> None:
    main = next(iter(report["artifact_frequency"]))
    figures = []
    for name, x in report["artifact_frequency"].items():
        better = x["after"] < x["before"]
        figures.append(
            Figure(
                f"Artifact frequency, {name}",
                f"{_share(x['before'])} → {_share(x['after'])}",
                f"95 %: {_interval(x['before_interval'])} → {_interval(x['after_interval'])}",
                "good" if better else "bad" if x["after"] > x["before"] else "plain",
            )
        )
    fidelity, change = report["fidelity"], report["change"]
    if fidelity["before"] is not None:
        figures.append(
            Figure(
                fidelity["name"].capitalize(),
                f"{fidelity['before']:.2f} → {fidelity['after']:.2f}",
                "higher is better",
            )
        )
    if report["diversity"]["before"] is not None:
        x = report["diversity"]
        figures.append(Figure("Diversity", f"{x['before']:.4f} → {x['after']:.4f}", "higher is better"))
    if change["inside"] is not None and change["outside"] is not None:
        figures.append(
            Figure(
                "Change inside / outside",
                f"{change['inside']:.4f} / {change['outside']:.4f}",
                "of the diagnosed region",
            )
        )

    frequency = report["artifact_frequency"][main]
    errors = report["judge_error_rates"]
    about_judge = f"“{main}” is the judge that counts."
    if errors:
        about_judge += f" Its own error rates: {_errors(errors)}."
    sections = [
        Section(
            "Before and after",
            f"{shown} of {report['counts']['images']} images, evenly spaced and not picked; "
            f"the diagnosis is by “{main}”.",
            pictures=[Picture(grid)],
            wide=True,
        ),
        Section(
            "Figures",
            f"{about_judge} Of {report['counts']['images']} images, {frequency['healed']} were healed and "
            f"{frequency['harmed']} harmed. An image has an artifact if its maximum confidence is at least "
            f"{report['thresholds']['artifact']:g}. Figures of a detector that was trained against are circular.",
            table=Table(("", "before", "after", ""), _rows(report)),
        ),
    ]
    if report["categories"]:
        rows = []
        for category, judges in report["categories"].items():
            x = judges[main]
            rows.append(
                (
                    category,
                    str(x["images"]),
                    f"{_share(x['before'])}  ({_interval(x['before_interval'])})",
                    f"{_share(x['after'])}  ({_interval(x['after_interval'])})",
                )
            )
        sections.append(
            Section(
                "By category",
                f"Artifact frequency by “{main}”, with its 95 % interval.",
                table=Table(("category", "images", "before", "after"), rows),
            )
        )
    if curves is not None:
        sections.append(Section("Training", pictures=[Picture(curves)], wide=True))
    if report["lora_dir"]:
        sections.append(Section("Use it", f"The LoRA lies in {report['lora_dir']}.", code=_loading_code(report)))
    if report["details"]:
        sections.append(
            Section("Details", table=Table(("", ""), [(str(k), _short(v)) for k, v in report["details"].items()]))
        )
    summary = (
        f"{report['counts']['images']} images of {report['counts']['prompts']} prompts, "
        f"{report['counts']['width']} x {report['counts']['height']} pixels, from the same seeds before and after."
    )
    html_report(path, title, figures, sections, summary)


def _frequency(before: torch.Tensor, after: torch.Tensor, threshold: float) -> dict:
    """(N,) maximum confidences before and after -> frequencies with intervals, and the images that changed sides."""
    ill, still_ill, count = before >= threshold, after >= threshold, len(before)
    return {
        "before": ill.double().mean().item(),
        "after": still_ill.double().mean().item(),
        "before_interval": metrics.wilson_interval(int(ill.sum()), count),
        "after_interval": metrics.wilson_interval(int(still_ill.sum()), count),
        "images": count,
        "healed": int((ill & ~still_ill).sum()),
        "harmed": int((~ill & still_ill).sum()),
    }


def _paired(scores: Mapping[str, torch.Tensor]) -> dict:
    if not scores:
        return {"before": None, "after": None, "difference_interval": None}
    before, after = scores["before"].double(), scores["after"].double()
    interval, difference = None, after - before
    if len(difference) > 1:
        half = 1.959964 * difference.std().item() / math.sqrt(len(difference))
        interval = (difference.mean().item() - half, difference.mean().item() + half)
    return {"before": before.mean().item(), "after": after.mean().item(), "difference_interval": interval}


@torch.no_grad()
def _in_batches(function, images: torch.Tensor, batch_size: int, progress, *columns: Sequence) -> torch.Tensor:
    results = []
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        result = torch.as_tensor(function(images[part], *(column[part] for column in columns))).detach().float().cpu()
        if len(result) != len(images[part]):
            raise ValueError(
                f"{function!r} returned {len(result)} rows for {len(images[part])} images; expected one per image."
            )
        results.append(result)
        progress.update()
    return torch.cat(results)


def _diagnose(judge: Judge, images: torch.Tensor) -> torch.Tensor:
    """Where the judge's weights lie, without dropout."""
    if not isinstance(judge, torch.nn.Module):
        return judge.confidence(images)
    weight, training = next(judge.parameters(), None), judge.training
    judge.eval()
    try:
        return judge.confidence(images if weight is None else images.to(weight.device))
    finally:
        judge.train(training)


def _check(before, after, prompts, judges, seeds, categories, features, groups, diversity_images, batch_size) -> None:
    if before.ndim != 4 or before.shape[1] != 3 or before.shape != after.shape or len(before) == 0:
        raise ValueError(
            "`before` and `after` must be images (N, 3, H, W) of the same prompts and seeds, at least one, found "
            f"{tuple(before.shape)} and {tuple(after.shape)}."
        )
    for name, images in (("before", before), ("after", after)):
        if not images.is_floating_point() or not (0 <= images.min() and images.max() <= 1):
            raise ValueError(
                f"`{name}` must be floats in [0, 1], found {images.dtype} in "
                f'[{images.min():.3g}, {images.max():.3g}]; a pipeline gives them with output_type="pt".'
            )
    for name, column in (("prompts", prompts), ("seeds", seeds), ("categories", categories)):
        if column is not None and len(column) != len(before):
            raise ValueError(f"`{name}` must have one entry per image, found {len(column)} for {len(before)} images.")
    if not judges:
        raise ValueError('`judges` is empty; give at least one, for example {"judge": judge, "detector": detector}.')
    for name, judge in judges.items():
        if not callable(getattr(judge, "confidence", None)):
            raise TypeError(f"`judges[{name!r}]` has no method `confidence(images)`, found {type(judge).__name__}.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, found {batch_size}.")
    if diversity_images is not None and len(diversity_images[0]) != len(diversity_images[1]):
        raise ValueError(
            "`diversity_images` must be a pair (before, after) of equally many images, found "
            f"{len(diversity_images[0])} and {len(diversity_images[1])}."
        )
    if features is not None:
        images = before if diversity_images is None else diversity_images[0]
        labels = list(prompts if groups is None else groups)
        if len(labels) != len(images):
            raise ValueError(
                f"`diversity_groups` must have one label per image, found {len(labels)} for {len(images)} images."
            )
        if len(set(labels)) == len(labels):
            raise ValueError(
                "Diversity is a distance between images of one group, but every image is a group of its own: give "
                "`diversity_images` and `diversity_groups` with several seeds per prompt, or leave out `features`."
            )


def _plain(value):
    """What JSON can hold: tuples as lists, numbers as Python's own, nan and infinity as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, torch.Tensor) or hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _save_png(image: Image.Image, path: Path) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")
    image.save(unfinished, "PNG")
    os.replace(unfinished, path)


def _share(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def _errors(rates: Mapping) -> str:
    """Error rates for people: shares in per cent, counts as they are, tables in brackets."""
    texts = []
    for name, x in rates.items():
        value = f"({_errors(x)})" if isinstance(x, Mapping) else str(x) if isinstance(x, int) else _share(x)
        texts.append(f"{name.replace('_', ' ')} {value}")
    return ", ".join(texts)


def _interval(interval: Sequence[float]) -> str:
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."
