# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The page that diagnoses: drop images, move the threshold, take the maps with you."""

import atexit
import json
import shutil
import tempfile
import time
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import gradio as gr
import numpy as np
from PIL import Image

from ..data.schema import encode_png
from ..files import IMAGE_SUFFIXES
from ..images import read_image
from ..names import file_name, printable
from .looking import Detector, figures, heatmap


MOST_IMAGES = 50  # at once
KEPT_SECONDS = 600  # results, until they are copied
HEADERS = ["image", "highest", "area", "artifact"]


@dataclass(frozen=True)
class Diagnosed:
    """An image that was dropped, and the detector's map of it, uint8 (H, W)."""

    name: str
    image: Image.Image
    found: np.ndarray


def diagnose_page(detector: Detector, max_upload_megabytes: int) -> None:
    """Build the page."""
    diagnosed, chosen = gr.State([]), gr.State(0)
    with gr.Row():
        with gr.Column(scale=1, min_width=360):
            files = gr.File(
                file_count="multiple",
                file_types=list(IMAGE_SUFFIXES),
                label=f"Images, at most {MOST_IMAGES} of {max_upload_megabytes} MB",
                height=180,
                elem_id="drop",
            )
            tile = gr.Checkbox(label="Tiles: look at large images piece by piece, for small faces and hands")
            threshold = gr.Slider(
                0.01,
                1,
                0.5,
                step=0.01,
                label="Threshold: confidence from which a pixel is an artifact",
                elem_id="threshold",
            )
            gr.Markdown(f"Detector: {printable(detector.name)}")
            with gr.Row():
                maps = gr.DownloadButton("Maps (ZIP)", interactive=False, elem_id="maps")
                table_file = gr.DownloadButton("Figures (JSON)", interactive=False, elem_id="figures")
            table = gr.Dataframe(headers=HEADERS, interactive=False, elem_id="table")
        with gr.Column(scale=3):
            slider = gr.ImageSlider(label="Image and diagnosis", interactive=False, format="png", max_height=620)
            gallery = gr.Gallery(
                label="Diagnoses", columns=6, height="auto", allow_preview=False, interactive=False, format="png"
            )

    def look(paths, tile, threshold, progress=gr.Progress()):  # noqa: B008, gradio looks for it there
        images, problems = [], []
        for path in progress.tqdm((paths or [])[:MOST_IMAGES], desc="diagnosing"):
            try:
                images.append(diagnose(detector, Path(path), tile))
            except Exception as error:  # decoders raise many types; one bad file must not stop the rest
                problems.append(f"{printable(Path(path).name)}: {reason(error, path)}")
        if len(paths or []) > MOST_IMAGES:
            problems.append(f"{len(paths) - MOST_IMAGES} images beyond the first {MOST_IMAGES} were left out.")
        for problem in problems:
            gr.Warning(problem)
        return images, 0, *show(images, threshold, 0)

    def show(images, threshold, chosen):
        pictures = [heatmap(one.image, one.found, threshold) for one in images]
        facts = [{"image": one.name, **figures(one.found, threshold)} for one in images]
        rows = [list(fact.values()) for fact in table_rows(facts)]
        found = (images[chosen].image, pictures[chosen]) if images else None
        captioned = [
            (picture, f"{fact['image']}: {fact['max_confidence']:.2f}") for picture, fact in zip(pictures, facts)
        ]
        if not images:
            return (
                found,
                captioned,
                rows,
                gr.update(value=None, interactive=False),
                gr.update(value=None, interactive=False),
            )
        saved = write_results(images, facts, {"detector": detector.name, "threshold": threshold})
        return found, captioned, rows, *(gr.update(value=str(path), interactive=True) for path in saved)

    def pick(images, threshold, event: gr.SelectData):
        index = event.index if isinstance(event.index, int) else event.index[0]
        return index, (images[index].image, heatmap(images[index].image, images[index].found, threshold))

    shown = [slider, gallery, table, maps, table_file]
    hidden = {"api_visibility": "private"}
    gr.on([files.change, tile.input], look, [files, tile, threshold], [diagnosed, chosen, *shown], **hidden)
    threshold.release(show, [diagnosed, threshold, chosen], shown, **hidden)
    gr.on([gallery.select, table.select], pick, [diagnosed, threshold], [chosen, slider], **hidden)


def diagnose(detector: Detector, path: Path, tile: bool) -> Diagnosed:
    """Read a file and let the detector look at it. Raises what [`read_image`] raises."""
    image = read_image(path)
    return Diagnosed(path.name, image, detector.map_of(image, tile))


def reason(error: Exception, path: str) -> str:
    """Why a file was not read, without where it lies on the server."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return printable(text.replace(repr(path), "the file").replace(path, "the file"))[:200]


def table_rows(facts: list[dict]) -> list[dict]:
    """Figures for people."""
    return [
        fact
        | {"artifact": "yes" if fact["artifact"] else "no", "area_ratio": f"{100 * fact['area_ratio']:.2f} %"}
        | {"max_confidence": f"{fact['max_confidence']:.2f}"}
        for fact in facts
    ]


@cache
def _results() -> Path:
    """A folder that goes with this process."""
    folder = tempfile.TemporaryDirectory(prefix="diffdoctor-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def write_results(images: list[Diagnosed], facts: list[dict], settings: dict) -> tuple[Path, Path]:
    """(ZIP of the maps, JSON of the figures), in a folder of their own. Maps are 8-bit gray, 255 = 1.0, of their images' sizes."""
    top = _results()
    for old in top.iterdir():  # gradio has copied them into its own cache, which it clears
        if time.time() - old.stat().st_mtime > KEPT_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(dir=top))
    names = [f"{number:03d}-{file_name(Path(one.name).stem)}.png" for number, one in enumerate(images)]
    with zipfile.ZipFile(folder / "maps.zip", "w") as archive:
        for name, one in zip(names, images):
            archive.writestr(name, encode_png(one.found)["bytes"])
    rows = [fact | {"map": name} for name, fact in zip(names, facts)]
    text = json.dumps(settings | {"images": rows}, indent=2, ensure_ascii=False)
    (folder / "figures.json").write_text(text, encoding="utf-8")
    return folder / "maps.zip", folder / "figures.json"
