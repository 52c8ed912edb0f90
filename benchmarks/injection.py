# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What does a detector learn from injection alone, measured on the mistakes of the renderer, of which injection knows nothing?

Detectors of one architecture, from random weights, are trained with as many scenes and steps as each other:

- `truth`: the renderer's own mistakes with their maps, from the distribution of the test: the strictest measure;
- `injection`: scenes that are all drawn right, 60 % of them spoiled by `data inject`.

Both are tested on fresh mistakes of the renderer: pixel average precision, over all and by kind, each kind with as many right scenes.

Each training is a cell, a file of results; a stopped benchmark goes on where it was.

And do the tools of injection leave traces? A small network is trained to find regions that were only retouched.

    python benchmarks/injection.py                          # the tables of docs/source/data_inject.md
    python benchmarks/injection.py --split development --seeds 0 --data injection
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from small_detector import cached, confidences, figures, trained

from diffusers_diffdoctor.data.injection import WEIGHTS, inject, saliency
from diffusers_diffdoctor.data.injection.composition import retouch_one
from diffusers_diffdoctor.data.injection.decoys import WAYS
from diffusers_diffdoctor.data.injection.pixels import blur, grow, shrink
from diffusers_diffdoctor.miniature.renderer import ARTIFACT_KINDS, PRONE_CATEGORIES, render, sample_scene
from diffusers_diffdoctor.seeds import derive_seed


ROOT = Path(__file__).parents[1]
DATA = ("truth", "injection")
WRONG_SHARE = 0.6
TESTED = 200  # scenes of each kind


def scenes(count: int, rng: np.random.Generator, wrong_share: float) -> tuple[np.ndarray, np.ndarray]:
    images, maps = zip(*(render(sample_scene(rng, wrong_share)) for _ in range(count)))
    return np.stack(images), np.stack(maps)


def training_data(data: str, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    if data == "truth":
        return scenes(count, rng, WRONG_SHARE)
    images, maps = scenes(count, rng, 0.0)
    for i in range(count):
        found = inject(images[i], rng, WEIGHTS if rng.random() < WRONG_SHARE else {})
        images[i], maps[i] = found.image, found.artifact_map
    return images, maps


def cell(data: str, split: str, seed: int, count: int, steps: int) -> dict:
    model = trained(*training_data(data, count, derive_seed(split, "training", data, seed)), steps, seed)
    rng = np.random.default_rng(derive_seed(split, "test", seed))
    result = {"all": figures_on(model, *scenes(3 * TESTED, rng, 0.5))}
    right = scenes(TESTED, rng, 0.0)
    for kind in ARTIFACT_KINDS:
        wrong = [
            render(sample_scene(rng, category=PRONE_CATEGORIES[i % len(PRONE_CATEGORIES)], artifact=kind))
            for i in range(TESTED)
        ]
        both = (np.concatenate([np.stack(some), part]) for some, part in zip(zip(*wrong), right))
        result[kind] = figures_on(model, *both)
    return result


def figures_on(model, images: np.ndarray, maps: np.ndarray) -> dict:
    found = figures(confidences(model, images), maps)
    names = ("pixel_ap", "iou", "image_auroc", "misses", "false_alarms")
    return {name: found[name] for name in names} | {"base_rate": float((maps > 0).mean())}


# --- traces --------------------------------------------------------------------------------------------------------------------


def blurred(image: np.ndarray, region: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What careless resampling does: the control that the network must find."""
    return image + region[..., None] * (blur(image, 0.6) - image)


def traces(
    ways: dict[str, Callable], count: int = 600, steps: int = 400, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Does what injection does to pixels give a region away, whatever it shows?

    Regions of right scenes get sound content by one of `ways`, and a small network of two-pixel sight is trained to find them. It
    is tested on other scenes, and on the same scenes without the change but with the same maps: what it finds there it knows from
    where regions are, not from traces.

    Args:
        ways: name -> function like a kind, which is to change nothing that can be seen.
        count: scenes, of which a third is for the test.
        steps: of 16 scenes.
        seed: of scenes, regions and the network.

    Returns:
        For each way the pixel average precision, `changed`, that on the `untouched` scenes, and the `base_rate`, which is that of
        guessing.
    """
    result = {}
    for name, way in ways.items():
        rng = np.random.default_rng(derive_seed("traces", seed))
        images, changed, maps = [], [], []
        while len(images) < count:
            image = render(sample_scene(rng, 0.0))[0]
            new = image.copy()
            retouch_one(way, new, saliency(image), rng, 0.15, 0.4)
            where = (new != image).any(-1)
            if where.sum() >= 12:
                images.append(image)
                changed.append(new)
                maps.append(grow(shrink(grow(where, 2), 2), 1))
        untouched, changed, maps = np.stack(images), np.stack(changed), np.stack(maps)
        tested = count // 3
        network = _trace_finder(changed[tested:], maps[tested:], steps, seed)
        result[name] = {"base_rate": float(maps[:tested].mean())}
        for which, some in (("changed", changed), ("untouched", untouched)):
            with torch.no_grad():
                found = torch.cat([network(_tensor(part)).sigmoid() for part in np.array_split(some[:tested], 20)])
            result[name][which] = figures(found, maps[:tested].astype(np.uint8) * 255)["pixel_ap"]
    return result


def _tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def _trace_finder(images: np.ndarray, maps: np.ndarray, steps: int, seed: int) -> torch.nn.Module:
    """A network that sees the grain: what a 3 x 3 mean leaves of the image, eightfold, then four layers of 3 x 3."""

    class Grain(torch.nn.Module):
        def forward(self, x):
            return torch.cat([8 * (x - F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)), x], 1)

    torch.manual_seed(seed)
    layers: list[torch.nn.Module] = [Grain()]
    for before in (6, 24, 24):
        layers += [torch.nn.Conv2d(before, 24, 3, padding=1), torch.nn.BatchNorm2d(24), torch.nn.ReLU()]
    network = torch.nn.Sequential(*layers, torch.nn.AvgPool2d(5, 1, 2), torch.nn.Conv2d(24, 1, 1))
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    rng = np.random.default_rng(seed)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, 2 - 2 * step / steps)
        rows = rng.integers(len(images), size=16)
        target = torch.from_numpy(maps[rows])[:, None].float()
        loss = F.binary_cross_entropy_with_logits(network(_tensor(images[rows])), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def table(cells: dict[str, list[dict]]) -> str:
    rows = ["all", *ARTIFACT_KINDS]
    lines = [
        "| mistakes | " + " | ".join(f"AP, {data}" for data in cells) + " | share |",
        "|---|" + "---|" * (len(cells) + 1),
    ]
    for row in rows:
        means = [statistics.fmean(cell["figures"][row]["pixel_ap"] for cell in some) for some in cells.values()]
        found = dict(zip(cells, means))
        share = f"{100 * found['injection'] / found['truth']:.0f} %" if len(found) > 1 else "-"
        lines.append(f"| {row} | " + " | ".join(f"{mean:.3f}" for mean in means) + f" | {share} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, list[dict]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), help="(default: both)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training and test (%(default)s)")
    parser.add_argument("--split", choices=["report", "development"], default="report", help="which scenes")
    parser.add_argument("--scenes", type=int, default=4000, help="for training (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="of 24 scenes (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/injection", help="for the cells")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    cells: dict[str, list[dict]] = {data: [] for data in args.data}
    for seed in args.seeds:
        for data in args.data:
            settings = {"data": data, "split": args.split, "seed": seed, "scenes": args.scenes, "steps": args.steps}
            one = cached(args.results, settings, cell, data, args.split, seed, args.scenes, args.steps)
            print(
                settings, one["seconds"], {k: round(v["pixel_ap"], 3) for k, v in one["figures"].items()}, flush=True
            )
            cells[data].append(one)
    print(table(cells))
    ways = {way.__name__: way for way in (*WAYS, blurred)}
    for name, way in ways.items():
        found = cached(args.results, {"data": "traces", "way": name}, lambda way=way: traces({"way": way}))["figures"][
            "way"
        ]
        print(
            f"{name}: AP {found['changed']:.3f}, untouched {found['untouched']:.3f}, guessing {found['base_rate']:.3f}"
        )
    return cells


if __name__ == "__main__":
    main()
