# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The page that compares two folders of images of the same prompts and seeds: what was healed, and what was harmed."""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ..evaluation import pairs
from ..files import find_images
from ..images import read_image
from ..names import markdown
from .looking import Detector, heatmap


HEADERS = ["image", "category", "before", "after", "harm", "verdict"]
ALL = "all categories"
METADATA = "metadata.jsonl"
MOST_FACTS = 64 * 2**20  # bytes of it


@dataclass(frozen=True)
class Pair:
    """Two images of one name."""

    name: str
    before: Path
    after: Path
    prompt: str = ""
    category: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measured:
    """What the detector says of a pair.

    Attributes:
        before, after: highest confidence in [0, 1].
        harm: mean confidence of the pixels after, minus that before, in [-1, 1]: above 0 it became worse.
    """

    pair: Pair
    before: float
    after: float
    harm: float

    def verdict(self, threshold: float) -> str:
        """ "healed", "harmed", "both wrong" or "both sound"."""
        return pairs.verdict(self.before, self.after, threshold)


class Comparison:
    """The pairs of two folders, measured when that is asked for first.

    Args:
        before, after: folders. Images belong together that have the same path in both, whatever the ending. A `metadata.jsonl` in
            either one may name their `prompt` and `category`; without it the category is the folder that an image lies in.
        detector: that ranks them.
        threshold: highest confidence in (0, 1] from which an image has an artifact.

    Raises:
        ValueError: the folders have no image in common; or an argument is out of range.
        OSError: a folder does not exist.
    """

    def __init__(
        self, before: str | os.PathLike, after: str | os.PathLike, detector: Detector, *, threshold: float = 0.5
    ):
        if not 0 < threshold <= 1:
            raise ValueError(f"`threshold` must be in (0, 1], found {threshold}.")
        self.folders, self.detector, self.threshold = (Path(before), Path(after)), detector, threshold
        files = [_images_of(folder) for folder in self.folders]
        self.alone = len(set(files[0]) ^ set(files[1]))
        facts = _facts(self.folders[0]) | _facts(self.folders[1])
        common = [name for name in files[0] if name in files[1]]
        if not common:
            raise ValueError(f"{self.folders[0]} and {self.folders[1]} have no image of the same name.")
        self.pairs = [
            Pair(name, files[0][name], files[1][name], *facts.get(name, _from_folder(name))) for name in common
        ]
        self.measured: list[Measured] | None = None
        self.problems: list[str] = []

    def categories(self) -> list[str]:
        """In the order of their names."""
        return sorted({name for pair in self.pairs for name in pair.category})

    def measure(self, progress: Callable[[Iterable], Iterable] = lambda pairs: pairs) -> None:
        """Let the detector look at every image, once."""
        if self.measured is not None:
            return
        measured, problems = [], []
        for pair in progress(self.pairs):
            try:
                maps = [self.detector.map_of(read_image(file)) for file in (pair.before, pair.after)]
            except Exception as error:  # decoders raise many types; one bad file must not stop the rest
                problems.append(f"{pair.name}: {error}")
                continue
            highest, mean = zip(*((int(found.max()) / 255, float(found.mean()) / 255) for found in maps))
            measured.append(Measured(pair, *highest, mean[1] - mean[0]))
        self.measured, self.problems = sorted(measured, key=lambda one: (-one.harm, one.pair.name)), problems

    def ranked(self, category: str | None = None) -> list[Measured]:
        """The most harmed first, of all or of one category."""
        return [one for one in self.measured or [] if category is None or category in one.pair.category]

    def pictures(self, pair: Pair) -> tuple[Image.Image, Image.Image, Image.Image, Image.Image]:
        """(before, after, diagnosis before, diagnosis after); those after at the size of those before."""
        before, after = (read_image(file) for file in (pair.before, pair.after))
        maps = [heatmap(image, self.detector.map_of(image)) for image in (before, after)]
        fitted = [image if image.size == before.size else image.resize(before.size) for image in (after, maps[1])]
        return before, fitted[0], maps[0], fitted[1]


def _images_of(folder: Path) -> dict[str, Path]:
    """Name without ending -> file."""
    top = folder.absolute()
    return {file.relative_to(top).with_suffix("").as_posix(): file for file in find_images([folder]).images}


def _from_folder(name: str) -> tuple[str, tuple[str, ...]]:
    parent = Path(name).parent.as_posix()
    return "", () if parent == "." else (parent,)


def _facts(folder: Path) -> dict[str, tuple[str, tuple[str, ...]]]:
    """(prompt, categories) of the images that a `metadata.jsonl` names."""
    path = folder / METADATA
    if not path.is_file():
        return {}
    if path.stat().st_size > MOST_FACTS:
        raise ValueError(f"{path} is larger than {MOST_FACTS} bytes.")
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row: dict[str, Any] = json.loads(line)
            category = row.get("category") or []
            category = [category] if isinstance(category, str) else category
            name = Path(row["file_name"]).with_suffix("").as_posix()
            found[name] = (str(row.get("prompt") or ""), tuple(map(str, category)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}, is no JSON object with a `file_name`: {error}.") from error
    return found


# --- the page ------------------------------------------------------------------------------------------------------------------


def compare_page(comparison: Comparison) -> None:
    """Build the page."""
    shown = gr.State([])
    with gr.Row():
        with gr.Column(scale=4, min_width=560):
            measure = gr.Button(f"Measure {len(comparison.pairs)} pairs", variant="primary", elem_id="measure")
            category = gr.Dropdown([ALL, *comparison.categories()], value=ALL, label="Category", elem_id="category")
            summary = gr.Markdown()
            table = gr.Dataframe(headers=HEADERS, interactive=False, elem_id="pairs", max_height=620)
        with gr.Column(scale=5):
            caption = gr.Markdown("The most harmed come first. Choose a row.")
            slider = gr.ImageSlider(
                label="Before | after", interactive=False, format="png", max_height=460, elem_id="slider"
            )
            with gr.Row():
                maps = [
                    gr.Image(
                        label=f"Diagnosis {side}",
                        interactive=False,
                        format="png",
                        height=300,
                        buttons=["download", "fullscreen"],
                        elem_id=f"map-{side}",
                    )
                    for side in ("before", "after")
                ]

    def listed(category):
        found = comparison.ranked(None if category == ALL else category)
        verdicts = [one.verdict(comparison.threshold) for one in found]
        rows = [
            [
                one.pair.name,
                ", ".join(one.pair.category),
                f"{one.before:.2f}",
                f"{one.after:.2f}",
                f"{one.harm:+.4f}",
                verdict,
            ]
            for one, verdict in zip(found, verdicts)
        ]
        text = f"{len(found)} pairs: {verdicts.count('healed')} healed, {verdicts.count('harmed')} harmed."
        if comparison.alone:
            text += f" {comparison.alone} images are in one folder only."
        if comparison.problems:
            text += f" {len(comparison.problems)} cannot be read."
        return rows, [one.pair for one in found], text, *first(found)

    def first(found):
        return view(found[0].pair) if found else ("", None, None, None)

    def view(pair):
        before, after, *diagnoses = comparison.pictures(pair)
        text = f"**{markdown(pair.name)}**" + (f": {markdown(pair.prompt)}" if pair.prompt else "")
        return text, (before, after), *diagnoses

    def all_of(category, progress=gr.Progress()):  # noqa: B008, gradio looks for it there
        comparison.measure(lambda pairs: progress.tqdm(pairs, desc="measuring"))
        return gr.update(visible=False), *listed(category)

    def pick(pairs, event: gr.SelectData):
        return view(pairs[event.index[0]])

    pictures = [caption, slider, *maps]
    results, hidden = [table, shown, summary, *pictures], {"api_visibility": "private"}
    measure.click(all_of, [category], [measure, *results], **hidden)
    category.input(listed, [category], results, **hidden)
    table.select(pick, [shown], pictures, **hidden)
