# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The paper's first table in miniature: how a detector stops crying wolf, rung by rung (DiffDoctor, table 1).

The imbalance is rebuilt with the renderer. *Annotated*: images of poor generators, in which hands and faces are always wrong, with
masks painted by a broad brush.
*Photographs*: another style, never wrong. *Pool*: images of a better generator, in all styles, nobody has labelled; people's masks of
its hard cases are the renderer's truth. Generated images are seen as the miniature's VAE reproduces them, photographs are not.

The data goes through the same stages that users run: `photos`, `mine`, `label`, `inject`. Rungs, each trained from the same random
weights for as many steps:

    annotated      the annotations alone: the naive detector
    photos         + photographs
    mined          + hard cases that `mine` chose with the detector of `photos`
    random         + as many cases chosen by chance: the control that the paper omits
    pseudo         mined + pseudo-labels of the rest of the pool, by the detector of `mined`, of which only confidences from 0.5 count
    dynamic        the same with the paper's dynamic augmentation: sound images are shrunk and padded
    injected       injection into photographs and the pool's sound images alone, no annotation at all

Sources of generated images are drawn as often as each other, so that many pseudo-labels do not thin out few masks, and photographs
as often as all of them together, so that no rung sees fewer than the one before.

Measured on fresh images of the better generator and on fresh photographs, and on both at half their side. A cell is a rung with a seed
and its settings; one that exists is not run again.
"""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from diffusers import AutoencoderKL
from PIL import Image, ImageFilter
from small_detector import arguments, new_detector

from diffusers_diffdoctor import ArtifactDetectorForSemanticSegmentation
from diffusers_diffdoctor.data import FEATURES, Label, Photos, Score, find_shards, mine, run_stage
from diffusers_diffdoctor.data.schema import conform, encode_png
from diffusers_diffdoctor.data.shards import PATTERN, write_shard
from diffusers_diffdoctor.detector import ArtifactDetectorTrainer
from diffusers_diffdoctor.detector.augmentation import moved
from diffusers_diffdoctor.evaluation.detector_figures import DetectorFigures
from diffusers_diffdoctor.files import digest, write_atomically
from diffusers_diffdoctor.miniature import load
from diffusers_diffdoctor.miniature.check import reproduce
from diffusers_diffdoctor.miniature.muon import Muon
from diffusers_diffdoctor.miniature.renderer import CATEGORIES, render, sample_scene


RUNGS = ("annotated", "photos", "mined", "random", "pseudo", "dynamic", "injected")
BY_PSEUDO_LABELS = ("pseudo", "dynamic")
SHARD_ROWS = 500
BRUSH = 9  # pixels by which people paint too broadly, both sides together, of 64


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a cell depends on, besides its rung and its seed."""

    steps: int = 1000
    batch_size: int = 24
    learning_rate: float = 2e-3
    annotated: int = 2000
    photos: int = 2000
    pool: int = 6000
    hard: int = 400
    tested: int = 1000  # images of the better generator, and as many photographs
    photos_weight: float = 1.0  # of photographs in what is drawn, to all other sources together
    shrink_probability: float = 0.25  # of dynamic augmentation


# --- the world ---------------------------------------------------------------------------------------------------------------------


def scenes(kind: str, count: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray, dict[str, Any]]]:
    """(image, map, columns) of one kind of source."""
    rng = np.random.default_rng([seed, *kind.encode()])
    for number in range(count):
        category = CATEGORIES[number % len(CATEGORIES)]
        if kind == "annotated":  # of two generators that can draw neither hands nor faces
            share = 1.0 if category in ("hand", "face") else 0.85
            scene = sample_scene(rng, share, category=category, style=("drawing", "render")[number // 6 % 2])
            generator = f"poor-{number // 12 % 2}"
        elif kind == "photos":
            scene = sample_scene(rng, 0.0, category=category, style="photo")
            generator = None
        else:  # the better generator
            scene = sample_scene(rng, 0.4, under_treatment=True, category=category)
            generator = "better"
        image, artifact_map = render(scene)
        if kind == "annotated":  # in a hurry, with a broad brush
            artifact_map = np.asarray(Image.fromarray(artifact_map).filter(ImageFilter.MaxFilter(BRUSH)))
        yield image, artifact_map, {"prompt": scene.caption, "category": [category], "generator": generator}


def write_source(folder: Path, kind: str, count: int, seed: int, source: str | None) -> Path:
    """A dataset of one kind, as if it came from outside; with its truth where `source` says who labelled it."""
    if (folder / "done").exists():
        return folder
    found = list(scenes(kind, count, seed))
    rows = rows_of(kind, found)
    if source is not None:
        for row, (_, artifact_map, _) in zip(rows, found):
            row |= {"artifact_map": encode_png(artifact_map), "source": source}
    write_rows(folder, rows)
    return folder


def rows_of(kind: str, found: Sequence[tuple[np.ndarray, np.ndarray, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Scenes as rows without a label: generated ones as the miniature's VAE reproduces them, photographs as they are."""
    images = torch.from_numpy(np.stack([image for image, _, _ in found])).permute(0, 3, 1, 2).contiguous()
    if kind != "photos":
        images = reproduce(vae(), images, noise=0.15)
    return [
        {"image": encode_png(image.permute(1, 2, 0).numpy(), f"{kind}-{number}"), **columns}
        for number, (image, (_, _, columns)) in enumerate(zip(images, found))
    ]


def write_rows(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A dataset; the file `done` says that it is whole."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "data").mkdir(parents=True)
    shards = -(-len(rows) // SHARD_ROWS)
    for number in range(shards):
        part = [conform(row) for row in rows[number * SHARD_ROWS : (number + 1) * SHARD_ROWS]]
        write_shard(folder / "data" / PATTERN.format(split="train", number=number, count=shards), part, FEATURES)
    (folder / "done").touch()


@functools.cache
def vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(load("pipeline") / "vae", torch_dtype=torch.float32).eval()


class World:
    """The datasets of one seed, each made when it is asked for first."""

    def __init__(self, settings: Settings, seed: int, cache: Path, detector_of: Callable[[str], Path]):
        self.settings, self.seed, self.cache, self.detector_of = settings, seed, cache, detector_of

    def annotated(self) -> Path:
        return write_source(self.cache / "annotated", "annotated", self.settings.annotated, self.seed, "human")

    def photos(self) -> Path:
        raw = write_source(self.cache / "photos-raw", "photos", self.settings.photos, self.seed, None)
        run_stage(Photos(), find_shards(raw), self.cache / "photos", show_progress=False)
        return self.cache / "photos"

    def pool(self) -> Path:
        return write_source(self.cache / "pool", "pool", self.settings.pool, self.seed, None)

    def hard(self, at_random: bool) -> Path:
        """The pool's hard cases with the truth as people's masks, and the rest, as splits "hard" and "simple"."""
        name = "random" if at_random else "mined"
        score = Score.by(str(self.detector_of("photos")), batch_size=100)
        options = {"at_random": at_random, "seed": self.seed, "show_progress": False}
        mine(score, find_shards(self.pool()), self.cache / name, self.settings.hard, **options)
        painted = self.cache / f"{name}-painted"
        truth = {f"pool-{i}": artifact_map for i, (_, artifact_map, _) in enumerate(self._pool_scenes())}
        rows = [
            row | {"artifact_map": encode_png(truth[row["image"]["path"]]), "source": "human"}
            for shard in find_shards(self.cache / name, "hard")
            for row in shard.read()
        ]
        (painted / "data").mkdir(parents=True, exist_ok=True)
        write_shard(painted / "data" / PATTERN.format(split="train", number=0, count=1), rows, FEATURES)
        return painted

    def pseudo(self) -> Path:
        self.hard(at_random=False)
        stage = Label.by(str(self.detector_of("mined")), batch_size=100, full_size=True, floor=0.5)
        run_stage(stage, find_shards(self.cache / "mined", "simple"), self.cache / "pseudo", show_progress=False)
        return self.cache / "pseudo"

    def injected(self) -> Path:
        from diffusers_diffdoctor.data import Inject

        raw = self.photos()
        run_stage(Inject(seed=self.seed), find_shards(raw), self.cache / "injected", show_progress=False)
        return self.cache / "injected"

    @functools.cache  # noqa: B019  one world lives as long as the benchmark
    def _pool_scenes(self) -> list:
        return list(scenes("pool", self.settings.pool, self.seed))

    def datasets_of(self, rung: str) -> dict[str, Path]:
        if rung == "injected":
            return {"injected": self.injected()}
        found = {"annotated": self.annotated()}
        if rung != "annotated":
            found["photos"] = self.photos()
        if rung in ("mined", "random", *BY_PSEUDO_LABELS):
            found["hard"] = self.hard(at_random=rung == "random")
        if rung in BY_PSEUDO_LABELS:
            found["pseudo"] = self.pseudo()
        return found


# --- a rung ------------------------------------------------------------------------------------------------------------------------


def weights_of(sources: Iterable[str], photos_weight: float) -> dict[str, float]:
    """Sources of generated images alike, photographs as often as all of them together, times `photos_weight`."""
    others = [name for name in sources if name != "photos"]
    return dict.fromkeys(others, 1.0) | ({"photos": photos_weight * len(others)} if "photos" in sources else {})


def train(rung: str, datasets: dict[str, Path], settings: Settings, seed: int, output: Path) -> None:
    torch.manual_seed(seed)
    model = new_detector()
    rows = {
        name: load_dataset(str(path), split="train", cache_dir=str(output.parent / "arrow"))
        for name, path in datasets.items()
    }
    args = arguments(
        str(output / "run"),
        settings.steps,
        seed,
        overwrite_output_dir=True,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        source_weights=weights_of(rows, settings.photos_weight),
        augmentation="light",
        shrink_probability=settings.shrink_probability if rung == "dynamic" else 0.0,
        augmentation_kwargs={"shrink_below": 0.5},
    )
    trainer = ArtifactDetectorTrainer(
        model, args, train_dataset=rows, optimizers=(Muon(model, args.learning_rate), None)
    )
    trainer.train()
    model.eval().save_pretrained(output / "detector")
    shutil.rmtree(output / "run")


@torch.inference_mode()
def measure(detector: Path, settings: Settings, seed: int) -> dict[str, Any]:
    """Figures on fresh images of the better generator (`generated`) and on fresh photographs (`photographs`), and of both `small`:
    at half their side amid their mean colour, which does not count."""
    model = ArtifactDetectorForSemanticSegmentation.from_pretrained(detector).eval()
    result = {}
    for name, kind in (("generated", "test"), ("photographs", "photos")):
        figures, small_figures = DetectorFigures(), DetectorFigures()
        found = list(scenes(kind, settings.tested, seed + 1_000_000))
        images = torch.from_numpy(np.stack([image for image, _, _ in found])).permute(0, 3, 1, 2).contiguous()
        truth = torch.from_numpy(np.stack([artifact_map for _, artifact_map, _ in found]))[:, None].float() / 255
        if kind != "photos":
            images = reproduce(vae(), images, noise=0.15)
        for start in range(0, len(images), 100):
            batch = slice(start, start + 100)
            columns = [columns for _, _, columns in found[batch]]
            described = (
                [one["category"] for one in columns],
                [one["generator"] for one in columns],
                ["photo" if kind == "photos" else "rendered"] * len(columns),
            )
            floats = images[batch].float() / 255
            figures.update(model.confidence(floats), truth[batch], *described)
            small = [moved(*pair, scale=0.5, reflect=False) for pair in zip(floats, truth[batch])]
            small_images, small_truth = (torch.stack(part) for part in zip(*small))
            small_figures.update(model.confidence(small_images), small_truth, *described)
        result[name], result[f"small {name}"] = figures.compute(), small_figures.compute()
    return result


def cell(rung: str, seed: int, settings: Settings, results: Path, cache: Path) -> dict[str, Any]:
    """The figures of a rung, from its file or from a training that then writes it."""
    name = f"{rung}-seed{seed}-{digest(json.dumps(dataclasses.asdict(settings)))[:10]}"
    path = results / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    detector = detector_of(rung, seed, settings, cache)
    figures = measure(detector, settings, seed)
    found = {"rung": rung, "seed": seed, "settings": dataclasses.asdict(settings), "figures": figures}
    results.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(found, indent=1) + "\n")
    return found


def detector_of(rung: str, seed: int, settings: Settings, cache: Path) -> Path:
    """The detector of a rung, trained if it is not there, and so those that it needs."""
    folder = cache / f"{digest(json.dumps(dataclasses.asdict(settings)))[:10]}-seed{seed}"
    output = folder / "rungs" / rung
    if not (output / "detector/config.json").exists():
        world = World(settings, seed, folder, lambda other: detector_of(other, seed, settings, cache))
        train(rung, world.datasets_of(rung), settings, seed, output)
    return output / "detector"
