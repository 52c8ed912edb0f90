# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Draws docs/source/assets/data_loop.svg: python docs/data_loop.py [OTHER_FILE]"""

import sys
from pathlib import Path

import matplotlib


matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch


SOURCE, STAGE, MODEL = "#f4f4f1", "#e4eefb", "#ffe9c7"
WIDTH, HEIGHT = 2.1, 0.62
# name -> (x, y of its centre, what it is, colour)
BOXES = {
    "annotations": (0, 3, "masks that people painted", SOURCE),
    "photographs": (0, 2, "zero everywhere", SOURCE),
    "injected artifacts": (0, 1, "no annotator needed", SOURCE),
    "detector": (2.9, 2, "train-detector", MODEL),
    "pool": (5.8, 3, "pictures of many generators", SOURCE),
    "pseudo-labels": (5.8, 2, "data label", STAGE),
    "flagged categories": (5.8, 1, "data balance", STAGE),
    "hard cases": (5.8, 0, "data mine", STAGE),
    "people": (2.9, 0, "paint masks", SOURCE),
}
# from, side, to, side, curvature, words, where along and above
ARROWS = [
    ("annotations", "right", "detector", "left", 0.0, ""),
    ("photographs", "right", "detector", "left", 0.0, ""),
    ("injected artifacts", "right", "detector", "left", 0.0, ""),
    ("detector", "right", "pseudo-labels", "left", 0.0, "labels"),
    ("pool", "bottom", "pseudo-labels", "top", 0.0, ""),
    ("pseudo-labels", "bottom", "flagged categories", "top", 0.0, ""),
    ("flagged categories", "bottom", "hard cases", "top", 0.0, ""),
    ("hard cases", "left", "people", "right", 0.0, ""),
    ("people", "top", "detector", "bottom", 0.0, "their masks"),
    ("pseudo-labels", "left", "detector", "top", 0.45, "simple cases keep\nthe detector's labels"),
]
SIDES = {"left": (-WIDTH / 2, 0), "right": (WIDTH / 2, 0), "top": (0, HEIGHT / 2), "bottom": (0, -HEIGHT / 2)}


def place(name: str, side: str) -> tuple[float, float]:
    x, y = BOXES[name][:2]
    return x + SIDES[side][0], y + SIDES[side][1]


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "source/assets/data_loop.svg"
    plt.rcParams |= {"svg.hashsalt": "data_loop", "svg.fonttype": "none", "font.family": "sans-serif"}
    figure, axes = plt.subplots(figsize=(9.4, 4.6))
    for name, (x, y, what, color) in BOXES.items():
        corner = (x - WIDTH / 2, y - HEIGHT / 2)
        axes.add_patch(FancyBboxPatch(corner, WIDTH, HEIGHT, "round,pad=0,rounding_size=0.08", fc=color, ec="#555555"))
        axes.text(x, y + 0.1, name, ha="center", va="center", fontsize=11, weight="bold")
        axes.text(x, y - 0.15, what, ha="center", va="center", fontsize=8.5, color="#444444")
    for start, side, end, other, bend, words in ARROWS:
        a, b = place(start, side), place(end, other)
        style = {"connectionstyle": f"arc3,rad={bend}", "arrowstyle": "-|>", "mutation_scale": 13, "color": "#333333"}
        axes.add_patch(FancyArrowPatch(a, b, shrinkA=1, shrinkB=1, **style))
        if words:
            x, y = (a[0] + b[0]) / 2, (a[1] + b[1]) / 2
            x, y = (x - 0.25, y + 0.95) if bend else (x, y + 0.1) if a[1] == b[1] else (x + 0.55, y)
            axes.text(x, y, words, ha="center", va="center", fontsize=8.5, color="#333333")
    axes.set(xlim=(-1.1, 6.9), ylim=(-0.45, 3.75))
    axes.axis("off")
    figure.savefig(target, bbox_inches="tight", metadata={"Date": None} if target.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
