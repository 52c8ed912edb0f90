# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The whole paper in miniature: a small world with ground truth, a pipeline that draws it wrong, a detector and a judge.

Scenes of 64x64 pixels show hands, faces, persons, dogs, houses and cups; see `renderer` for how they go wrong. The bundled
parts are real classes of diffusers and transformers, small enough for a CPU; see `build` for how they were trained.
"""

from pathlib import Path


WEIGHTS = Path(__file__).parent / "weights"
PARTS = ("pipeline", "detector", "judge", "clip")


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


def prompts(held_out: bool, categories: tuple[str, ...] | None = None) -> list[dict[str, str]]:
    """Captions with their attributes, in a fixed order.

    Args:
        held_out: those of the combinations of category, colour and background that are kept from treatment (a quarter of
            all), or the others.
        categories: only these; all six by default.
    """
    from .renderer import CATEGORIES, all_prompts, is_held_out

    rows = all_prompts(categories or CATEGORIES)
    return [row for row in rows if is_held_out(row["category"], row["color"], row["background"]) is held_out]


def regularization_dataset(count: int = 768, seed: int = 0):
    """Right scenes with their captions, none of a held-out combination: what photographs are to a full-size pipeline.

    Returns:
        A [`~datasets.Dataset`] with the columns `image` and `prompt`.
    """
    import numpy as np
    from datasets import Dataset, Features, Image, Value
    from PIL import Image as PILImage

    from .renderer import render, sample_scene

    rng = np.random.default_rng([seed, 7])
    allowed = prompts(held_out=False)
    rows = {"image": [], "prompt": []}
    for _ in range(count):
        row = allowed[rng.integers(len(allowed))]
        attributes = {key: row[key] for key in ("category", "color", "background", "style")}
        scene = sample_scene(rng, wrong_share=0.0, **attributes)
        rows["image"].append(PILImage.fromarray(render(scene)[0]))
        rows["prompt"].append(scene.caption)
    return Dataset.from_dict(rows, features=Features({"image": Image(), "prompt": Value("string")}))
