# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Draws docs/source/assets/injection.png: python docs/injection_kinds.py [OTHER_FILE]

A column for each kind of injection, on two scenes of the miniature: the sound scene, the wrong one, its map.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffusers_diffdoctor.data.injection import WEIGHTS, inject
from diffusers_diffdoctor.miniature.renderer import PRONE_CATEGORIES, render, sample_scene


SCALE, GAP, HEAD = 2, 6, 22
SEED = 5


def column(kind: str, rng: np.random.Generator, number: int) -> np.ndarray:
    """Two scenes, each sound, wrong, and its map, one below the other: (6 * 64, 64, 3)."""
    found = []
    while len(found) < 2:
        category = PRONE_CATEGORIES[(number + len(found)) % len(PRONE_CATEGORIES)]
        sound = render(sample_scene(rng, 0.0, category=category))[0]
        done = inject(sound, rng, {kind: 1.0}, counts={1: 1.0}, decoys=0.0)
        if done.kinds:
            found.append(np.concatenate([sound, done.image, np.repeat(done.artifact_map[..., None], 3, -1)]))
    return np.concatenate(found)


def main(target: Path) -> None:
    rng = np.random.default_rng(SEED)
    columns = [column(kind, rng, number) for number, kind in enumerate(WEIGHTS)]
    height, width = (SCALE * side for side in columns[0].shape[:2])
    sheet = Image.new("RGB", (len(columns) * (width + GAP) - GAP, height + HEAD), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (kind, pixels) in enumerate(zip(WEIGHTS, columns)):
        left = number * (width + GAP)
        draw.text((left + width / 2, HEAD / 2), kind, "black", ImageFont.load_default(14), anchor="mm")
        sheet.paste(Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST), (left, HEAD))
    sheet.save(target, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "source/assets/injection.png")
