# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Draws docs/source/assets/data_loop.svg: python docs/data_loop.py [OTHER_FILE]"""

import sys
from pathlib import Path

import matplotlib


matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch


SOURCE, STAGE, MODEL = "#f4f4f1", "#e4eefb", "#ffe9c7"
WIDTH, HEIGHT = 2.3, 0.62
# name -> (x, y of its centre, what it is, colour)
BOXES = {
    "annotations": (0, 3, "masks that people painted", SOURCE),
    "photographs": (0, 2, "zero everywhere", SOURCE),
    "injected artifacts": (0, 1, "no annotator needed", SOURCE),
    "detector": (3.4, 2, "of the round before", MODEL),
    "pool": (6.8, 3, "pictures of many generators", SOURCE),
    "pseudo-labels": (6.8, 2, "what the detector sees", STAGE),
    "categories": (6.8, 1, "which stand out", STAGE),
    "hard cases": (6.8, 0, "and simple ones", STAGE),
    "people": (3.4, 0, "paint masks", SOURCE),
    "new images": (10.2, 3, "of what stands out", STAGE),
    "prompts": (10.2, 1, "by a language model", STAGE),
}
# from, side, to, side, curvature, words (commands of `diffdoctor`), how far from the middle of the arrow
ARROWS = [
    ("annotations", "right", "detector", "left", 0.0, "", (0, 0)),
    ("photographs", "right", "detector", "left", 0.0, "train-detector", (0, 0.1)),
    ("injected artifacts", "right", "detector", "left", 0.0, "", (0, 0)),
    ("detector", "right", "pseudo-labels", "left", 0.0, "data label", (0, 0.12)),
    ("pool", "bottom", "pseudo-labels", "top", 0.0, "", (0, 0)),
    ("pseudo-labels", "bottom", "categories", "top", 0.0, "data balance", (0.72, 0)),
    ("categories", "bottom", "hard cases", "top", 0.0, "data mine", (0.6, 0)),
    ("categories", "right", "prompts", "left", 0.0, "data prompts", (0, 0.12)),
    ("prompts", "top", "new images", "bottom", 0.0, "data synthesize", (0.8, 0)),
    ("new images", "left", "pool", "right", 0.0, "data merge", (0, 0.12)),
    ("hard cases", "left", "people", "right", 0.0, "diffdoctor ui", (0, 0.12)),
    ("people", "top", "detector", "bottom", 0.0, "data annotate,\ntrain-detector", (0.75, 0)),
    ("pseudo-labels", "left", "detector", "top", 0.45, "simple cases keep\nthe detector's labels", (-0.35, 0.95)),
]
SIDES = {"left": (-WIDTH / 2, 0), "right": (WIDTH / 2, 0), "top": (0, HEIGHT / 2), "bottom": (0, -HEIGHT / 2)}


def place(name: str, side: str) -> tuple[float, float]:
    x, y = BOXES[name][:2]
    return x + SIDES[side][0], y + SIDES[side][1]


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "source/assets/data_loop.svg"
    plt.rcParams |= {"svg.hashsalt": "data_loop", "svg.fonttype": "none", "font.family": "sans-serif"}
    figure, axes = plt.subplots(figsize=(13.6, 4.8))
    for name, (x, y, what, color) in BOXES.items():
        corner = (x - WIDTH / 2, y - HEIGHT / 2)
        axes.add_patch(FancyBboxPatch(corner, WIDTH, HEIGHT, "round,pad=0,rounding_size=0.08", fc=color, ec="#555555"))
        axes.text(x, y + 0.1, name, ha="center", va="center", fontsize=11, weight="bold")
        axes.text(x, y - 0.15, what, ha="center", va="center", fontsize=8.5, color="#444444")
    for start, side, end, other, bend, words, (right, up) in ARROWS:
        a, b = place(start, side), place(end, other)
        style = {"connectionstyle": f"arc3,rad={bend}", "arrowstyle": "-|>", "mutation_scale": 13, "color": "#333333"}
        axes.add_patch(FancyArrowPatch(a, b, shrinkA=1, shrinkB=1, **style))
        x, y = (a[0] + b[0]) / 2 + right, (a[1] + b[1]) / 2 + up
        style = {"color": "#333333"} if bend else {"color": "#7a1f5c", "family": "monospace"}
        axes.text(x, y, words, ha="center", va="center", fontsize=7.5, **style)
    axes.set(xlim=(-1.2, 11.6), ylim=(-0.45, 3.75))
    axes.axis("off")
    figure.savefig(target, bbox_inches="tight", metadata={"Date": None} if target.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
