# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What a treatment did, for people: the figures of `measure` as a page, a picture, a file and a few printed lines."""

import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from .. import __version__
from ..files import digest, write_atomically, written_atomically
from ..names import shortened
from ..pictures import before_after_grid, heatmap_overlay, plot_curves, to_pil
from ..tables import write_csv
from .pairs import ImagePairs, Judge, diagnose, json_ready, verdict
from .report import PICTURES, Card, Figure, Gallery, Picture, Section, Table, View, encode, fitted, html_report


LONGEST = 768  # pixels of the longer side of a pair's pictures
VIEWS = ("before", "after", "diagnosis before", "diagnosis after")
TONES = {"healed": "good", "harmed": "bad", "both wrong": "bad", "both sound": "plain"}


@dataclass
class TreatmentRun:
    """What a report says of a run besides its figures; all of it may be left out.

    Attributes:
        lora_dir: where the treated weights lie.
        base_model: id or folder of the untreated pipeline.
        loading_code: the lines of Python that load the LoRA, as they are for this pipeline.
        judge_error_rates: published error rates of the first judge, see [`error_rates`]: shares, counts (integers) and tables
            of them; shown with its figures.
        training_log: `trainer.state.log_history`; its curves are drawn.
        details: further facts to keep, such as settings.
    """

    lora_dir: str | os.PathLike | None = None
    base_model: str | None = None
    loading_code: str | None = None
    judge_error_rates: Mapping[str, Any] | None = None
    training_log: Sequence[Mapping] = ()
    details: Mapping[str, object] = field(default_factory=dict)


@dataclass
class PairPictures:
    """What [`draw_pairs`] drew.

    Attributes:
        grid: some of the pairs in one picture.
        each: of every pair four pictures as WEBP files: before, after, and the diagnoses of the two.
        size: their width and height in pixels.
    """

    grid: Picture
    each: list[list[bytes]]
    size: tuple[int, int]


def draw_pairs(pairs: ImagePairs, judge: Judge, count: int = 12) -> PairPictures:
    """The images before and after with the judge's diagnosis: each pair, and a picture of some.

    Args:
        pairs: the images.
        judge: whose diagnosis is drawn.
        count: most pairs in the picture of some; they are evenly spaced over all of them, not picked.
    """
    chosen = torch.linspace(0, len(pairs) - 1, min(count, len(pairs))).round().long().tolist()
    each, maps = [], {}
    for i, sides in enumerate(zip(pairs.before, pairs.after)):
        images = torch.stack(sides)
        found = diagnose(judge, images).float().cpu()
        each.append([encode(to_pil(picture), LONGEST) for picture in (*images, *heatmap_overlay(images, found))])
        if i in chosen:
            maps[i] = found
    captions = [
        pairs.prompts[i] if pairs.seeds is None else f"{pairs.prompts[i]} (seed {pairs.seeds[i]})" for i in chosen
    ]
    before_maps, after_maps = torch.stack([maps[i] for i in chosen], dim=1)
    grid = Picture(
        before_after_grid(pairs.before[chosen], pairs.after[chosen], before_maps, after_maps, captions),
        note=f"{len(chosen)} of {len(pairs)} images, evenly spaced and not picked.",
    )
    return PairPictures(grid, each, fitted((pairs.before.shape[3], pairs.before.shape[2]), LONGEST))


def render(
    figures: Mapping,
    pictures: PairPictures,
    output_dir: str | os.PathLike,
    run: TreatmentRun | None = None,
    title: str = "Treatment report",
) -> dict:
    """Write a report of the figures.

    Args:
        figures: what [`measure`] returned.
        pictures: what [`draw_pairs`] returned for the same pairs.
        output_dir: folder for report.json, report.csv (its table of images), report.html with the pictures of the pairs in
            report_files/, report.png (some of the pairs) and, with a training log, curves.png.
        run: what else is to be said.
        title: heading of the page.

    Returns:
        The contents of report.json: the figures, the attributes of [`TreatmentRun`], and the `version` of this package. Of
        absolute paths the files have the last component only, since reports are shared; here they are whole.

    Raises:
        ValueError: figures and pictures are of different pairs.
    """
    if len(pictures.each) != len(figures["images"]):
        raise ValueError(
            f"`pictures` are of {len(pictures.each)} pairs, but `figures` of {len(figures['images'])}: draw the pairs that were "
            "measured."
        )
    run = TreatmentRun() if run is None else run
    report = json_ready({**figures, **asdict(run), "version": __version__})
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with written_atomically(output_dir / "report.png") as unfinished:
        pictures.grid.image.save(unfinished, "PNG")
    curves = plot_curves(run.training_log, output_dir / "curves.png") if run.training_log else None
    written = _without_local_paths(report)
    _write_table(written, output_dir / "report.csv")
    files = _write_pictures(pictures, output_dir / PICTURES)
    _write_html(written, output_dir / "report.html", title, _gallery(written, files, pictures.size), curves)
    _remove_others(output_dir / PICTURES, files)
    # Last, so that a report.json stands for a whole report.
    text = json.dumps(written, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(output_dir / "report.json", text)
    return report


def _without_local_paths(report: Mapping) -> dict:
    """The report without absolute paths, in its code as well. Figures and prompts stay as they are."""
    written = {**report, **{name: shortened(report[name]) for name in ("lora_dir", "base_model", "details")}}
    code = report["loading_code"]
    for name in ("lora_dir", "base_model"):
        if code and report[name]:
            before, after = (json.dumps(side[name], ensure_ascii=False) for side in (report, written))
            code = code.replace(before, after)
    return {**written, "loading_code": shortened(code)}


def print_summary(report: Mapping, file: TextIO | None = None) -> None:
    """Print the figures of a report that [`render`] wrote, where the LoRA lies and the lines that load it."""
    rows = _rows(report)
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"Before and after the treatment, {report['counts']['images']} images of the same prompts and seeds:", ""]
    lines.append(f"  {'':{widths[0]}}  {'before':>{max(6, widths[1])}}  {'after':>{max(6, widths[2])}}")
    for name, old, new, note in rows:
        lines.append(f"  {name:{widths[0]}}  {old:>{max(6, widths[1])}}  {new:>{max(6, widths[2])}}  {note}".rstrip())
    judge = _main(report)
    if report["categories"]:
        lines += ["", f"  Artifact frequency by category, {judge}:"]
    for category, judges in report["categories"].items():
        old, new = _share(judges[judge]["before"]), _share(judges[judge]["after"])
        lines.append(f"  {'  ' + category:{widths[0]}}  {old:>{max(6, widths[1])}}  {new:>{max(6, widths[2])}}")
    if report["judge_error_rates"]:
        lines += ["", f"  The judge's own errors: {_errors(report['judge_error_rates'])}"]
    if report["lora_dir"]:
        lines += ["", f"The LoRA lies in {report['lora_dir']}." + " To use it:" * bool(report["loading_code"])]
    if report["loading_code"]:
        lines += ["", *("    " + line for line in report["loading_code"].splitlines())]
    print("\n".join(lines), file=file or sys.stdout)


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
    spreads = {f"diversity, {name}": x for name, x in report["diversity_by"].items()}
    for key, x in (spreads | {"sharpness": report["sharpness"]}).items():
        rows.append((key, f"{x['before']:.4f}", f"{x['after']:.4f}", ""))
    change = report["change"]
    note = f"mean change of the pixels inside the region of the {change['region_of']}, and outside"
    inside, outside = (f"{x:.4f}" if x is not None else "-" for x in (change["inside"], change["outside"]))
    rows.append(("change inside, outside", inside, outside, note))
    return rows


def _main(report: Mapping) -> str:
    """The judge that counts."""
    return next(iter(report["artifact_frequency"]))


def _verdict(row: Mapping, report: Mapping) -> str:
    confidences = row[_main(report)]
    return verdict(confidences["before"], confidences["after"], report["thresholds"]["artifact"])


def _write_table(report: Mapping, path: Path) -> None:
    """The table of images, for a spreadsheet."""
    judges = {
        f"{name}_{key}": (name, key) for name in report["artifact_frequency"] for key in ("before", "after", "harm")
    }
    facts = ("prompt", "seed", "category")
    rows = (
        {fact: row[fact] for fact in facts}
        | {"verdict": _verdict(row, report)}
        | {column: row[name][key] for column, (name, key) in judges.items()}
        for row in report["images"]
    )
    write_csv(path, [*facts, "verdict", *judges], rows)


def _write_pictures(pictures: PairPictures, folder: Path) -> list[list[str]]:
    """Write the pictures of each pair; returns their names. They are named by their content, so that none takes the place of one
    that an earlier page shows."""
    folder.mkdir(exist_ok=True)
    names = [[f"{digest(content)[:16]}.webp" for content in pair] for pair in pictures.each]
    for name, content in {name: data for pair in zip(names, pictures.each) for name, data in zip(*pair)}.items():
        if not (folder / name).exists():
            write_atomically(folder / name, content)
    return names


def _remove_others(folder: Path, files: Sequence[Sequence[str]]) -> None:
    """Remove the pictures of earlier pages."""
    shown = {name for pair in files for name in pair}
    for path in folder.glob("*.webp"):
        if re.fullmatch(r"[0-9a-f]{16}\.webp", path.name) and path.name not in shown:
            path.unlink()


def _gallery(report: Mapping, files: Sequence[Sequence[str]], size: tuple[int, int]) -> Gallery:
    """A card for each pair, the one that is worst after the treatment first."""
    main, cards = _main(report), []
    for row, names in zip(report["images"], files):
        x, word = row[main], _verdict(row, report)
        seed = "" if row["seed"] is None else f"seed {row['seed']}, "
        cards.append(
            Card(
                title=row["prompt"],
                views=[View(label, f"{PICTURES}/{name}", size) for label, name in zip(VIEWS, names)],
                numbers=(x["after"], x["harm"], x["before"]),
                verdict=word,
                tone=TONES[word],
                category=row["category"] or "",
                note=f"{seed}confidence {x['before']:.2f} → {x['after']:.2f}, harm {x['harm']:+.4f}",
            )
        )
    cards.sort(key=lambda card: (-card.numbers[0], -card.numbers[1]))
    numbers = ("confidence after", "harm", "confidence before")
    return Gallery(cards, numbers, "worst first", slider=True)


def _write_html(report: Mapping, path: Path, title: str, gallery: Gallery, curves: Path | None) -> None:
    main = _main(report)
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
    sections.append(
        Section(
            "Before and after",
            f"All {report['counts']['images']} pairs, worst after the treatment first; verdict and diagnosis are by “{main}”. The "
            "confidence is the highest of a pixel; the harm is the mean of all pixels after, minus that before.",
            files=("report.csv",),
            gallery=gallery,
        )
    )
    if curves is not None:
        sections.append(Section("Training", pictures=[Picture(curves)], wide=True))
    if report["lora_dir"] or report["loading_code"]:
        where = f"The LoRA lies in {report['lora_dir']}." if report["lora_dir"] else ""
        sections.append(Section("Use it", where, code=report["loading_code"] or ""))
    if report["details"]:
        sections.append(
            Section("Details", table=Table(("", ""), [(str(k), _short(v)) for k, v in report["details"].items()]))
        )
    summary = (
        f"{report['counts']['images']} images of {report['counts']['prompts']} prompts, "
        f"{report['counts']['width']} x {report['counts']['height']} pixels, from the same seeds before and after."
    )
    html_report(path, title, figures, sections, summary)


def _share(value: float | None, digits: int = 1) -> str:
    return "undefined" if value is None else f"{100 * value:.{digits}f} %"


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
