# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What a round taught, as a page."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...evaluation.report import Figure, Picture, Section, Table, html_report


# what a report says of a detector: name in figures.json -> heading
FIGURES = {
    "misses": "artifacts missed",
    "false_alarms": "false alarms",
    "kl_misses": "KL (misses)",
    "kl_false_alarms": "KL(1-) (false alarms)",
    "pixel_ap": "pixel AP",
}


def write_report(path: Path, rounds: Sequence[dict[str, Any]], balance: Path, pictures: Sequence[Picture]) -> None:
    """A page about the last of some rounds.

    Args:
        path: of the page.
        rounds: what [`Loop.summary`] gives, round 0 first.
        balance: folder of the round's balance, whose picture is shown.
        pictures: of hard cases.
    """
    last, before = rounds[-1], rounds[-2] if len(rounds) > 1 else None
    figures, sections = [], []
    for name, groups in last["figures"].items():
        then = before["figures"].get(name) if before else None
        now, old = groups["all"]["false_alarms"], then["all"]["false_alarms"] if then else None
        if now is not None:
            value = f"{now:.1%}" if old is None else f"{old:.1%} → {now:.1%}"
            tone = "plain" if old is None or old == now else "good" if now < old else "bad"
            figures.append(Figure(f"False alarms, {name}", value, "sound images that are blamed", tone))
    if "masks" in last:
        masks = last["masks"]
        figures.append(
            Figure("Masks", str(masks["images"]), f"{masks['people']} people, {masks['minutes']:g} minutes")
        )
    for name in last["figures"]:
        rows = [
            [f"round {one['round']}", *cells(one["figures"][name]["all"])] for one in rounds if name in one["figures"]
        ]
        sections.append(Section(f"Measured on {name}", "", Table(("", *FIGURES.values()), rows)))
    if "flagged" in last:
        sections += _learned(last, before, balance, pictures)
    html_report(
        path, f"Round {last['round']}", figures, sections, "What a round of the loop found, and what it taught."
    )


def cells(figures: Mapping[str, float | None]) -> list[str]:
    """The entries of a table for `FIGURES`."""
    values = {name: figures.get(name) for name in FIGURES}
    shares = ("misses", "false_alarms")
    return ["" if v is None else f"{v:.1%}" if name in shares else f"{v:.4f}" for name, v in values.items()]


def _learned(
    last: dict[str, Any], before: dict[str, Any] | None, balance: Path, pictures: Sequence[Picture]
) -> Iterable[Section]:
    flagged = last["flagged"]
    picture = balance / "categories.png"
    yield Section(
        "What stood out",
        ", ".join(f"{name} ({flag})" for name, flag in flagged.items()) or "No category.",
        pictures=[Picture(picture)] if picture.is_file() else [],
        wide=True,
    )
    rows = []
    for name, groups in last["figures"].items():
        for category in flagged:
            now = (groups.get("categories") or {}).get(category)
            then = ((before or last)["figures"].get(name) or {}).get("categories", {}).get(category)
            if now and then:
                rows += [
                    [f"{category}, {name}, {when}", *cells(one)] for when, one in (("before", then), ("now", now))
                ]
    if rows:
        yield Section("What was learned about it", "", Table(("", *FIGURES.values()), rows))
    counts = {
        "images in the pool": last["images"],
        "prompts written": last["prompts"],
        "images synthesized": last["synthesized"],
        "hard cases": last["hard"],
        "simple cases": last["simple"],
        "masks painted": last["masks"]["images"],
        "of these with artifacts": last["masks"]["with_artifacts"],
    }
    kinds = {f"masks of kind {kind}": count for kind, count in last["masks"]["kinds"].items()}
    rows = [[name, str(count)] for name, count in (counts | kinds).items()]
    yield Section("What was done", "", Table(("", "number"), rows))
    if pictures:
        yield Section("Hard cases, as people painted them", "", pictures=pictures)
