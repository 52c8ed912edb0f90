# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The whole paper in miniature: a small world with ground truth, a pipeline that draws it wrong, a detector and a judge.

Scenes of 64x64 pixels show hands, faces, persons, dogs, houses and cups; see `renderer` for how they go wrong. The bundled
parts are real classes of diffusers and transformers, small enough for a CPU. `build` trains such parts from random
weights; the bundled ones learned by its settings in several stages, which docs/experiments.md of the repository lists.
"""

from pathlib import Path


WEIGHTS = Path(__file__).parent / "weights"
PARTS = ("pipeline", "detector", "judge", "clip")
SPLITS = ("train", "development", "final")


def load(part: str) -> Path:
    """The folder of a bundled part, for `from_pretrained`.

    Args:
        part: "pipeline" (a `FluxPipeline`), "detector" (an `ArtifactDetectorForSemanticSegmentation`), "judge" (a
            `MiniatureJudge`) or "clip" (a `CLIPModel` with its processor).

    Raises:
        ValueError: there is no such part.
        FileNotFoundError: the part is not installed.
    """
    if part not in PARTS:
        raise ValueError(f"`part` is {part!r}, but the miniature consists of {list(PARTS)}.")
    folder = WEIGHTS / part
    if not folder.is_dir():
        raise FileNotFoundError(
            f"The miniature's {part} is not in {WEIGHTS}. Build it: diffdoctor miniature build --parts {part} --output "
            f"{WEIGHTS}"
        )
    return folder


def prompts(split: str, categories: tuple[str, ...] | None = None) -> list[dict[str, str]]:
    """Captions with their attributes, in a fixed order. The splits have no combination of category, colour and background
    in common.

    Args:
        split: "train" (half of all combinations), "development" (a quarter: what settings are compared on) or "final" (a
            quarter: what is reported, and nothing is tuned on).
        categories: only these; all six by default.

    Raises:
        ValueError: there is no such split.
    """
    from .renderer import CATEGORIES, all_prompts, split_of

    if split not in SPLITS:
        raise ValueError(f"`split` is {split!r}, but must be one of {list(SPLITS)}.")
    rows = all_prompts(categories or CATEGORIES)
    return [row for row in rows if split_of(row["category"], row["color"], row["background"]) == split]


def regularization_dataset(count: int = 768, seed: int = 0):
    """Right scenes with captions of the training split: what photographs are to a full-size pipeline.

    Returns:
        A [`~datasets.Dataset`] with the columns `image` and `prompt`.
    """
    import numpy as np
    from datasets import Dataset, Features, Image, Value
    from PIL import Image as PILImage

    from .renderer import render, sample_scene

    rng = np.random.default_rng([seed, 7])
    allowed = prompts("train")
    rows = {"image": [], "prompt": []}
    for _ in range(count):
        row = allowed[rng.integers(len(allowed))]
        attributes = {key: row[key] for key in ("category", "color", "background", "style")}
        scene = sample_scene(rng, wrong_share=0.0, **attributes)
        rows["image"].append(PILImage.fromarray(render(scene)[0]))
        rows["prompt"].append(scene.caption)
    return Dataset.from_dict(rows, features=Features({"image": Image(), "prompt": Value("string")}))
