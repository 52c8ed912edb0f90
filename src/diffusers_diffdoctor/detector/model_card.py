# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What a detector's card says beside how to call it: what it learned from, since when, under which licence, and how well it does.

`ArtifactDetectorForSemanticSegmentation.model_card` writes the page, which a saved detector can do by itself; this adds what the
trainer, or an evaluation, knows.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..evaluation.detector_figures import GROUPS, SHOWN, figure_table, from_headline
from ..files import write_atomically
from ..names import markdown, shortened
from ..training.record import plain
from .modeling_artifact_detector import ArtifactDetectorForSemanticSegmentation


CARD = "README.md"
MOST_LINES = 30  # of a table
# beginning of an encoder's name -> its licence, as the Hub names it, and what that means
LICENCES = {
    "nvidia/mit-b": ("nvidia-source-code-license", "which allows non-commercial use only"),
    "nvidia/segformer": ("nvidia-source-code-license", "which allows non-commercial use only"),
}
UNKNOWN, PHOTOGRAPHS = "not said", "photographs"


# --- what the trainer knows ----------------------------------------------------------------------------------------------------


def data_facts(dataset: Any) -> dict[str, Any] | None:
    """What is said about the rows of a training set by its columns `source`, `generator` and `year`.

    Args:
        dataset: a `datasets.Dataset`, a list of dictionaries, or a dictionary of them, whose names are sources where there is no
            column of that name.

    Returns:
        `rows`; `sources` and `generators`, each name -> number of rows, of which photographs are no generator's; `years`, generator
        -> first and last. None for a stream, or what knows no columns.
    """
    sources, generators, years = Counter(), Counter(), {}
    for name, part in dataset.items() if isinstance(dataset, dict) else [(None, dataset)]:
        rows = _facts_of_rows(part)
        if rows is None:
            return None
        for source, generator, year in rows:
            source = source or name or UNKNOWN
            sources[source] += 1
            generator = generator or (PHOTOGRAPHS if source == "photo" else UNKNOWN)
            generators[generator] += 1
            if isinstance(year, int):
                first, last = years.get(generator, (year, year))
                years[generator] = (min(first, year), max(last, year))
    return {
        "rows": sum(sources.values()),
        "sources": dict(sources.most_common()),
        "generators": dict(generators.most_common()),
        "years": years,
    }


def _facts_of_rows(dataset: Any) -> Iterator[tuple[Any, Any, Any]] | None:
    names = ("source", "generator", "year")
    if isinstance(dataset, Sequence) and all(isinstance(row, dict) for row in dataset):
        return ((*map(row.get, names),) for row in dataset)
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "column_names"):
        return None
    columns = [dataset[name] if name in dataset.column_names else [None] * len(dataset) for name in names]
    return zip(*columns)


# --- the card ------------------------------------------------------------------------------------------------------------------


def write_card(
    folder: str | os.PathLike,
    model: ArtifactDetectorForSemanticSegmentation,
    name: str | None = None,
    *,
    record: Mapping[str, Any] | None = None,
    log_history: Sequence[Mapping[str, Any]] = (),
    evaluation: Mapping[str, Any] | None = None,
) -> bool:
    """Write the card of the detector in a folder, unless somebody has edited the one that is there.

    Args:
        folder: of the detector.
        model: the detector.
        name: its id on the Hub; the folder's name without it.
        record: what its trainer wrote beside it: `data` (of [`data_facts`]), `started_from`, `trained` (a month), `step`.
        log_history: of its trainer, of which the last evaluation of `step` is shown.
        evaluation: what `diffdoctor evaluate-detector` wrote, which is shown instead.

    Returns:
        Whether it was written.
    """
    card = Path(folder, CARD)
    if card.exists() and not _as_written(card.read_text(encoding="utf-8", errors="replace")):
        return False
    record = shortened(plain(record or {}))
    base = record.get("started_from")
    logged = {} if evaluation else _logged(log_history, record.get("step"))
    metadata = _licence_and_base(base) | _model_index(evaluation, logged)
    sections = [*_data(record.get("data"), base, record.get("trained")), *_figures(evaluation, logged)]
    text = model.model_card(
        name or os.path.basename(os.path.abspath(folder)),
        yaml.safe_dump(metadata, sort_keys=False) if metadata else "",
        "".join(f"{section.strip()}\n\n" for section in sections),
    )
    write_atomically(card, text.encode("utf-8", "replace"))
    return True


def _as_written(text: str) -> bool:
    """Whether a card is as [`ArtifactDetectorForSemanticSegmentation.model_card`] wrote it."""
    match = re.fullmatch(r"(.*)\n<!-- as written: ([0-9a-f]{64}) -->\s*", text, re.S)
    return match is not None and hashlib.sha256(match[1].encode()).hexdigest() == match[2]


def _data(facts: Mapping[str, Any] | None, base: str | None, trained: str | None) -> list[str]:
    told = [f"Trained in {markdown(trained)}" if trained else "Trained"]
    told.append(f" from {markdown(base)}" if base else " from random weights" if trained else "")
    licence = licence_of(base)
    told.append(f", whose licence it inherits: {licence[0]}, {licence[1]}" if licence else "")
    text = "## What it learned from\n\n" + "".join(told) + ".\n"
    if facts is None:
        return [text] if trained or base else []
    text = text.replace("Trained", f"{facts['rows']} images. Trained", 1)
    years = {
        name: f"{first}" if first == last else f"{first} to {last}" for name, (first, last) in facts["years"].items()
    }
    text += "\n" + _table(("source", "images"), facts["sources"])
    text += "\n" + _table(("generator", "images", *(["years"] if years else [])), facts["generators"], years)
    return [text]


def _table(columns: Sequence[str], counts: Mapping[str, int], notes: Mapping[str, str] | None = None) -> str:
    lines = [
        [markdown(name[:120]), str(count), *([markdown(notes.get(name, ""))] if notes else [])]
        for name, count in list(counts.items())[:MOST_LINES]
    ]
    rest = list(counts.values())[MOST_LINES:]
    if rest:
        lines.append([f"{len(rest)} others", str(sum(rest)), *([""] if notes else [])])
    return _markdown_table(columns, lines)


def _markdown_table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [columns, ["---"] * len(columns), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def licence_of(name: str | None) -> tuple[str, str] | None:
    """The licence that a detector inherits from the encoder it started from, as far as it is known here to restrict its use."""
    return next((licence for start, licence in LICENCES.items() if name and name.startswith(start)), None)


def _licence_and_base(base: str | None) -> dict[str, Any]:
    licence = licence_of(base)
    known = {"base_model": base} if base and re.fullmatch(r"[\w.-]+/[\w.-]+", base) else {}
    return known | ({"license": "other", "license_name": licence[0]} if licence else {})


# --- figures -------------------------------------------------------------------------------------------------------------------


def _logged(log_history: Sequence[Mapping[str, Any]], step: int | None) -> dict[str, dict[str, dict[str, float]]]:
    """The figures of the last evaluation up to a step: set of images -> group -> figures."""
    entries = [e for e in log_history if any(k.startswith("eval_") for k in e) and (step is None or e["step"] <= step)]
    latest = {key: value for e in entries if e["step"] == entries[-1]["step"] for key, value in e.items()}
    return from_headline(latest, "eval_")


def _figures(
    evaluation: Mapping[str, Any] | None, logged: Mapping[str, Mapping[str, Mapping[str, float]]]
) -> list[str]:
    if evaluation is not None:
        dataset = f" on {markdown(evaluation['dataset'])}" if evaluation["dataset"] else ""
        text = f"Measured{dataset} at a threshold of {evaluation['threshold']:g}. "
        tables = {"": evaluation["figures"]}
    elif logged:
        text, tables = "The last evaluation of the training, on images that were held out. ", logged
    else:
        return []
    text += "An image with several categories counts in each.\n"
    for name, figures in tables.items():
        columns, rows = figure_table(figures)
        lines = [[markdown(row[0][:120]), *row[1:]] for row in rows[: len(GROUPS) + MOST_LINES]]
        text += (f"\n{markdown(name)}:\n" if name else "") + "\n" + _markdown_table(columns, lines)
    return ["## Figures\n\n" + text]


def _model_index(
    evaluation: Mapping[str, Any] | None, logged: Mapping[str, Mapping[str, Mapping[str, float]]]
) -> dict[str, Any]:
    """The figures of all images as the Hub reads them."""
    tables = {name or "held-out images": figures for name, figures in logged.items()}
    if evaluation is not None:
        tables = {evaluation["dataset"] or "held-out images": evaluation["figures"]}
    results = []
    for name, figures in tables.items():
        values = figures.get("all", {})
        metrics = [
            {"type": key, "name": heading, "value": values[key]}
            for key, (heading, _) in SHOWN.items()
            if key != "images" and values.get(key) is not None and values[key] == values[key]
        ]
        if metrics:
            dataset = {"type": name, "name": name}
            results.append({"task": {"type": "image-segmentation"}, "dataset": dataset, "metrics": metrics})
    return {"model-index": [{"name": "Artifact detector", "results": results}]} if results else {}
