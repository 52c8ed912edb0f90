# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""A renderer of small scenes that knows its own mistakes.

A scene is one thing (hand, face, person, dog, house or cup) in a colour, on a background, in a style. Things are made of
named parts. A wrong scene is a right one with a part too many, a part missing, a part in the wrong place, a part too small,
two parts fused, a warped region or a watermark, or several of them; houses and cups are never wrong. Both the wrong scene
and its right twin are drawn from the same pose, light and noise, and the artifact map is exactly where the two pictures
differ, one pixel wider.

Coordinates are in units of half the image: x to the right, y down, the thing is centred at (0, 0).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter


IMAGE_SIZE = 64
SUPERSAMPLING = 4

COLORS = {
    "red": (205, 45, 45),
    "orange": (240, 140, 40),
    "yellow": (240, 215, 70),
    "green": (60, 160, 75),
    "blue": (55, 95, 205),
    "purple": (145, 70, 175),
}
BACKGROUNDS = {
    "white": (236, 236, 232),
    "gray": (140, 144, 148),
    "black": (34, 34, 40),
    "pink": (244, 178, 196),
}
STYLES = ("drawing", "render", "photo")
PRONE_CATEGORIES = ("hand", "face", "person", "dog")
PLAIN_CATEGORIES = ("house", "cup")
CATEGORIES = PRONE_CATEGORIES + PLAIN_CATEGORIES
ARTIFACT_KINDS = ("extra", "missing", "misplaced", "stunted", "fused", "warped", "watermark")

# Local mistakes of anatomy are what the world is about; warps and watermarks are seen less often.
ARTIFACT_WEIGHTS = {"extra": 0.3, "missing": 0.25, "misplaced": 0.15, "fused": 0.14, "warped": 0.08, "watermark": 0.08}
# A pipeline under treatment tries out what it never learned: parts half there, and several mistakes at once.
TREATMENT_WEIGHTS = {
    "extra": 0.23,
    "missing": 0.27,
    "misplaced": 0.12,
    "stunted": 0.14,
    "fused": 0.12,
    "warped": 0.06,
    "watermark": 0.06,
}
TREATMENT_COUNTS = {1: 0.5, 2: 0.25, 3: 0.15, 4: 0.1}

WRONG_SHARE = 0.55  # of the scenes of prone categories that the pipeline learned to draw

INK = (28, 24, 30)
EYE_WHITE = (245, 245, 240)
MOUTH = (110, 30, 40)
DIFFERENCE = 18  # of 255; smaller differences between the wrong scene and its right twin cannot be seen
MIN_WRONG_PIXELS = 14


@dataclass(frozen=True)
class Shape:
    """A filled outline: `points` (N, 2) of a closed polygon, or of a thick line with round ends if `radius` is set."""

    points: np.ndarray
    radius: float | None = None
    color: tuple[int, int, int] | str = "main"  # "main", "dark" and "light" follow the colour of the thing
    outlined: bool = True


@dataclass(frozen=True)
class Part:
    """Shapes that belong together. `extra` and `misplaced` list the wrong placements (dx, dy, degrees) this part can take.

    A placement turns the part around `pivot`, then shifts it. `neighbour` names the part it can fuse with.
    """

    name: str
    shapes: tuple[Shape, ...]
    pivot: tuple[float, float] = (0.0, 0.0)
    extra: tuple[tuple[float, float, float], ...] = ()
    misplaced: tuple[tuple[float, float, float], ...] = ()
    removable: bool = True
    neighbour: str | None = None
    wrong: bool = False  # already a mistake, and not to be spoiled again


@dataclass(frozen=True)
class Scene:
    """What to draw.

    `seed` fixes pose, light and noise. `artifacts` are some of `ARTIFACT_KINDS`, none for a right scene; `artifact_seed` fixes
    where they are. With an `opacity` below 1 the right scene shines through the mistakes.
    """

    category: str
    color: str
    background: str
    style: str
    seed: int
    artifacts: tuple[str, ...] = ()
    artifact_seed: int = 0
    opacity: float = 1.0

    @property
    def caption(self) -> str:
        return (
            f"a {self.style} of {_article(self.color)} {self.color} {self.category} on a {self.background} background"
        )


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def all_prompts(categories: tuple[str, ...] = CATEGORIES) -> list[dict[str, str]]:
    """Every caption of the grammar with its attributes, in a fixed order: 72 for each category."""
    rows = []
    for category in categories:
        for color in COLORS:
            for background in BACKGROUNDS:
                for style in STYLES:
                    scene = Scene(category, color, background, style, seed=0)
                    rows.append(
                        {
                            "prompt": scene.caption,
                            "category": category,
                            "color": color,
                            "background": background,
                            "style": style,
                        }
                    )
    return rows


def split_of(category: str, color: str, background: str) -> str:
    """Where this combination belongs: "train", "development" or "final".

    For each category and colour, two of the four backgrounds are trained on, one is for development and one for the final
    figures, so that training sees every pair of values, and the splits no combination twice.
    """
    index = CATEGORIES.index(category) + list(COLORS).index(color) + list(BACKGROUNDS).index(background)
    return ("development", "train", "final", "train")[index % len(BACKGROUNDS)]


def sample_scene(
    rng: np.random.Generator, wrong_share: float = 0.5, under_treatment: bool = False, **fixed: str
) -> Scene:
    """Draw a scene at random.

    Args:
        rng: source of chance.
        wrong_share: chance in [0, 1] that a prone category is wrong.
        under_treatment: wrong scenes have one to four mistakes, also of kinds that the pipeline never learned, and some of them
            half transparent: what a detector has to know that is to be treated against. Else they have one mistake.
        fixed: attributes that are given: `category`, `color`, `background`, `style`, or the one `artifact`.
    """
    category = fixed.get("category") or CATEGORIES[rng.integers(len(CATEGORIES))]
    wrong = category in PRONE_CATEGORIES and rng.random() < wrong_share
    scene = Scene(
        category=category,
        color=fixed.get("color") or list(COLORS)[rng.integers(len(COLORS))],
        background=fixed.get("background") or list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))],
        style=fixed.get("style") or STYLES[rng.integers(len(STYLES))],
        seed=int(rng.integers(2**31)),
    )
    artifacts, opacity = (), 1.0
    if "artifact" in fixed:
        artifacts = (fixed["artifact"],)
    elif wrong:
        weights = TREATMENT_WEIGHTS if under_treatment else ARTIFACT_WEIGHTS
        count = rng.choice(list(TREATMENT_COUNTS), p=list(TREATMENT_COUNTS.values())) if under_treatment else 1
        artifacts = tuple(str(rng.choice(list(weights), p=list(weights.values()))) for _ in range(count))
        if under_treatment and rng.random() < 0.3:
            opacity = float(rng.uniform(0.4, 0.8))
    return replace(scene, artifacts=artifacts, artifact_seed=int(rng.integers(2**31)), opacity=opacity)


def render(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Draw a scene.

    Returns:
        The image, uint8 (64, 64, 3), and its artifact map, uint8 (64, 64), 255 where the image is wrong and 0 elsewhere.
    """
    pose = np.random.default_rng(scene.seed)
    parts = _PARTS[scene.category](pose)
    place = _placement(pose, scene.category)
    light = _light(pose)
    right_canvas = _draw(parts, place, scene)
    right = _finish(right_canvas, scene, light)
    if not scene.artifacts:
        return right, np.zeros(right.shape[:2], np.uint8)
    rng = np.random.default_rng(scene.artifact_seed)
    for _ in range(50):
        spoiled = parts
        for kind in scene.artifacts:
            if kind not in ("warped", "watermark"):
                spoiled = _spoil(spoiled, kind, rng)
        canvas = _draw(spoiled, place, scene)
        if "warped" in scene.artifacts:
            canvas = _warp(canvas, parts, place, rng)
        if "watermark" in scene.artifacts:
            canvas = _watermark(canvas, rng)
        wrong = _finish(Image.blend(right_canvas, canvas, scene.opacity), scene, light)
        difference = np.abs(wrong.astype(np.int16) - right).max(-1) > DIFFERENCE
        if difference.sum() >= MIN_WRONG_PIXELS:
            mask = Image.fromarray((difference * 255).astype(np.uint8)).filter(ImageFilter.MaxFilter(3))
            return wrong, np.asarray(mask)
    raise RuntimeError(f"No visible artifact could be drawn for {scene}.")


# ---------------------------------------------------------------------------------------------------------------------
# Things and their parts
# ---------------------------------------------------------------------------------------------------------------------


def _ellipse(cx: float, cy: float, rx: float, ry: float, degrees: float = 0.0, n: int = 36) -> np.ndarray:
    angle = np.linspace(0, 2 * math.pi, n, endpoint=False)
    points = np.stack([rx * np.cos(angle), ry * np.sin(angle)], -1)
    return points @ _rotation(degrees).T + (cx, cy)


def _rotation(degrees: float) -> np.ndarray:
    a = math.radians(degrees)
    return np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])


def _line(*points: tuple[float, float]) -> np.ndarray:
    return np.array(points, float)


def _towards(root: tuple[float, float], degrees: float, length: float) -> tuple[float, float]:
    """The point at `length` from `root`; 0 degrees points up, 90 to the right."""
    a = math.radians(degrees)
    return root[0] + length * math.sin(a), root[1] - length * math.cos(a)


def _hand(rng: np.random.Generator) -> list[Part]:
    spread = rng.uniform(15, 18)
    parts = []
    roots = [(-0.285, -0.02), (-0.1, -0.1), (0.1, -0.1), (0.285, -0.02)]
    lengths = np.array([0.48, 0.6, 0.6, 0.48]) * rng.uniform(0.92, 1.08)
    for i, (root, length) in enumerate(zip(roots, lengths)):
        angle = (i - 1.5) * spread + rng.uniform(-2, 2)
        finger = Shape(_line(root, _towards(root, angle, length)), radius=0.092)
        beyond = (-0.16, 0.2, -22.0) if i == 0 else (0.09, 0.0, spread / 2)
        parts.append(
            Part(
                f"finger{i}",
                (finger,),
                pivot=root,
                extra=(beyond,),
                misplaced=(
                    (-root[0], 0.62, 180.0 - angle),
                    (0.5 if i > 1 else -0.5, 0.5, 90.0 - angle if i > 1 else -90.0 - angle),
                ),
                neighbour=f"finger{i + 1}" if i < 3 else None,
            )
        )
    root = (0.3, 0.3)
    thumb = Shape(_line(root, _towards(root, rng.uniform(52, 64), 0.48)), radius=0.1)
    parts.append(
        Part(
            "thumb",
            (thumb,),
            pivot=root,
            extra=((-0.6, 0.0, -118.0), (0.02, 0.22, 32.0)),
            misplaced=((-0.3, 0.42, 120.0),),
        )
    )
    palm = _ellipse(0, 0.25, 0.38, 0.42)
    wrist = Shape(_line((0, 0.5), (0, 1.0)), radius=0.2)
    parts.append(Part("palm", (wrist, Shape(palm, outlined=False)), removable=False))
    return parts


def _face(rng: np.random.Generator) -> list[Part]:
    gap = rng.uniform(0.26, 0.3)
    eye_y = rng.uniform(-0.2, -0.12)
    mouth_y, mouth_w = rng.uniform(0.38, 0.44), rng.uniform(0.2, 0.27)
    smile = rng.uniform(0.0, 0.1)
    parts = []
    for side, name in ((-1, "left"), (1, "right")):
        centre = (side * 0.66, -0.02)
        parts.append(
            Part(
                f"{name} ear",
                (Shape(_ellipse(*centre, 0.16, 0.22)),),
                pivot=centre,
                extra=((-side * 0.12, -0.56, side * 40.0), (-side * 0.1, 0.5, side * 40.0)),
                misplaced=((-side * 0.12, -0.58, side * 40.0), (-side * 0.1, 0.52, -side * 40.0)),
            )
        )
    parts.append(Part("head", (Shape(_ellipse(0, 0, 0.64, 0.8)),), removable=False))
    for side, name in ((-1, "left"), (1, "right")):
        centre = (side * gap, eye_y)
        eye = (
            Shape(_ellipse(*centre, 0.165, 0.145), color=EYE_WHITE, outlined=False),
            Shape(_ellipse(*centre, 0.085, 0.095), color=INK, outlined=False),
        )
        parts.append(
            Part(
                f"{name} eye",
                eye,
                pivot=centre,
                extra=((-side * gap, -0.3, 0.0), (-side * 0.0, -0.33, 0.0), (side * 0.06, 0.36, 0.0)),
                misplaced=((-side * 0.02, -0.34, 0.0), (side * 0.08, 0.36, 0.0)),
                neighbour="right eye" if side < 0 else None,
            )
        )
    nose = Shape(_line((0, eye_y + 0.16), (0, 0.16)), radius=0.06, color="dark", outlined=False)
    parts.append(
        Part(
            "nose",
            (nose,),
            pivot=(0, 0.08),
            extra=((-0.26, 0.1, 0.0), (0.26, 0.1, 0.0), (0.0, -0.5, 0.0)),
            misplaced=((-0.3, 0.14, 0.0), (0.3, 0.14, 0.0), (0.0, -0.52, 0.0)),
        )
    )
    mouth = Shape(
        _line((-mouth_w, mouth_y - smile), (0, mouth_y + smile * 0.6), (mouth_w, mouth_y - smile)),
        radius=0.07,
        color=MOUTH,
        outlined=False,
    )
    parts.append(
        Part(
            "mouth",
            (mouth,),
            pivot=(0, mouth_y),
            extra=((0.0, 0.21, 0.0), (0.0, -0.92, 0.0)),
            misplaced=((0.0, -0.92, 0.0), (0.14, 0.02, 80.0), (-0.14, 0.02, 80.0)),
        )
    )
    return parts


def _person(rng: np.random.Generator) -> list[Part]:
    parts = []
    stance = rng.uniform(9, 20)
    for side, name in ((-1, "left"), (1, "right")):
        root = (side * 0.13, 0.3)
        leg = Shape(_line(root, _towards(root, 180 - side * stance, 0.62)), radius=0.1, color="dark")
        parts.append(
            Part(
                f"{name} leg",
                (leg,),
                pivot=root,
                extra=((-side * 0.13, 0.0, side * stance), (side * 0.02, -0.05, -side * 34.0)),
                misplaced=((-side * 0.0, -0.22, -side * 62.0), (side * 0.1, -0.5, -side * 100.0)),
                neighbour="right leg" if side < 0 else None,
            )
        )
    for side, name in ((-1, "left"), (1, "right")):
        root = (side * 0.2, -0.24)
        angle = side * rng.uniform(58, 128)
        elbow = _towards(root, angle, 0.28)
        hand = _towards(elbow, angle - side * rng.uniform(-10, 45), 0.26)
        arm = Shape(_line(root, elbow, hand), radius=0.085)
        parts.append(
            Part(
                f"{name} arm",
                (arm,),
                pivot=root,
                extra=((0.0, 0.2, side * 20.0), (0.0, 0.3, side * 34.0)),
                misplaced=((0.0, 0.5, side * 14.0), (-side * 0.15, -0.36, -side * 26.0)),
            )
        )
    parts.append(Part("torso", (Shape(_line((0, -0.2), (0, 0.26)), radius=0.22),), removable=False))
    parts.append(
        Part(
            "head",
            (Shape(_ellipse(0, -0.62, 0.2, 0.22), color="light"),),
            pivot=(0, -0.62),
            extra=((-0.3, 0.08, 0.0), (0.3, 0.08, 0.0)),
            misplaced=((-0.36, 0.14, 0.0), (0.36, 0.14, 0.0)),
        )
    )
    return parts


def _dog(rng: np.random.Generator) -> list[Part]:
    parts = []
    root = (-0.46, -0.06)
    tail = Shape(_line(root, _towards(root, rng.uniform(-50, -15), 0.42)), radius=0.065)
    parts.append(
        Part(
            "tail",
            (tail,),
            pivot=root,
            extra=((0.38, -0.16, 18.0), (-0.02, 0.14, -52.0)),
            misplaced=((0.48, -0.16, 26.0), (0.45, 0.28, 200.0)),
        )
    )
    for i, x in enumerate((-0.42, -0.2, 0.14, 0.36)):
        root = (x, 0.22)
        leg = Shape(
            _line(root, _towards(root, 180 + rng.uniform(-7, 7), 0.46)),
            radius=0.075,
            color="dark" if i in (1, 2) else "main",
        )
        parts.append(
            Part(
                f"leg{i}",
                (leg,),
                pivot=root,
                extra=((0.17, 0.0, 0.0),)
                if i == 1
                else ((-0.2 if i == 0 else 0.0, -0.3, 180.0 - (40.0 if i == 0 else 0.0)),),
                misplaced=((0.0, -0.32, 180.0),) if i < 3 else ((0.16, -0.02, -70.0),),
                neighbour={0: "leg1", 2: "leg3"}.get(i),
            )
        )
    parts.append(Part("body", (Shape(_line((-0.34, 0.08), (0.28, 0.08)), radius=0.21),), removable=False))
    lift = rng.uniform(-0.06, 0.04)
    hx, hy = 0.52, -0.3 + lift
    head = (
        Shape(_line((hx, hy), (hx + 0.24, hy + 0.08)), radius=0.11, color="main"),
        Shape(_ellipse(hx, hy, 0.22, 0.21), color="main", outlined=False),
    )
    parts.append(
        Part(
            "head",
            head,
            pivot=(hx, hy),
            extra=((-0.36, -0.2, -14.0),),
            misplaced=((-0.5, -0.1, -10.0), (-0.06, 0.5, 10.0)),
        )
    )
    ear = Shape(_line((hx - 0.1, hy - 0.12), (hx - 0.2, hy + 0.16)), radius=0.08, color="dark")
    parts.append(
        Part(
            "ear",
            (ear,),
            pivot=(hx - 0.1, hy - 0.12),
            extra=((0.32, 0.12, -50.0),),
            misplaced=((0.24, 0.32, 20.0), (-0.36, 0.22, 20.0)),
        )
    )
    eye = Shape(_ellipse(hx + 0.08, hy - 0.04, 0.062, 0.07), color=INK, outlined=False)
    parts.append(
        Part(
            "eye",
            (eye,),
            pivot=(hx + 0.08, hy - 0.04),
            extra=((-0.4, 0.34, 0.0), (-0.72, 0.4, 0.0)),
            misplaced=((-0.5, 0.36, 0.0), (-0.7, 0.4, 0.0)),
        )
    )
    return parts


def _house(rng: np.random.Generator) -> list[Part]:
    w, top = rng.uniform(0.48, 0.6), rng.uniform(-0.16, -0.04)
    door = -0.42 * w
    return [
        Part("wall", (Shape(_line((-w, top), (w, top), (w, 0.72), (-w, 0.72))),)),
        Part(
            "roof", (Shape(_line((-w - 0.14, top), (0, top - rng.uniform(0.5, 0.64)), (w + 0.14, top)), color="dark"),)
        ),
        Part(
            "door",
            (
                Shape(
                    _line((door - 0.12, 0.24), (door + 0.12, 0.24), (door + 0.12, 0.72), (door - 0.12, 0.72)),
                    color=INK,
                    outlined=False,
                ),
            ),
        ),
        Part(
            "window",
            (
                Shape(
                    _line((-door - 0.14, 0.1), (-door + 0.14, 0.1), (-door + 0.14, 0.38), (-door - 0.14, 0.38)),
                    color=EYE_WHITE,
                ),
            ),
        ),
    ]


def _cup(rng: np.random.Generator) -> list[Part]:
    w, h = rng.uniform(0.36, 0.46), rng.uniform(0.42, 0.54)
    arc = np.linspace(-math.pi / 2, math.pi / 2, 12)
    handle = np.stack([w * 0.9 + 0.27 * np.cos(arc), 0.05 + h * 0.55 * np.sin(arc)], -1)
    return [
        Part("handle", (Shape(handle, radius=0.075),)),
        Part("body", (Shape(_line((-w, -h), (w, -h), (w * 0.82, h), (-w * 0.82, h))),)),
        Part("rim", (Shape(_ellipse(0, -h, w, 0.13), color="light"),)),
    ]


_PARTS = {"hand": _hand, "face": _face, "person": _person, "dog": _dog, "house": _house, "cup": _cup}


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------


def _moved(part: Part, placement: tuple[float, float, float]) -> Part:
    dx, dy, degrees = placement
    turn = _rotation(degrees)
    shapes = tuple(replace(s, points=(s.points - part.pivot) @ turn.T + part.pivot + (dx, dy)) for s in part.shapes)
    return replace(part, shapes=shapes)


def _stunted(part: Part, factor: float) -> Part:
    """The part `factor` times as long from its pivot on; limbs keep their thickness."""
    return replace(
        part, shapes=tuple(replace(s, points=(s.points - part.pivot) * factor + part.pivot) for s in part.shapes)
    )


def _spoil(parts: list[Part], kind: str, rng: np.random.Generator) -> list[Part]:
    """The same thing with one more mistake of `kind`, if a part is left to spoil: every kind but "warped" and "watermark"."""
    parts = list(parts)
    sound = {p.name: p for p in parts if not p.wrong}
    able = {
        "missing": lambda p: p.removable,
        "stunted": lambda p: p.removable,
        "extra": lambda p: p.extra,
        "misplaced": lambda p: p.misplaced,
        "fused": lambda p: p.neighbour in sound,
    }[kind]
    candidates = [i for i, p in enumerate(parts) if not p.wrong and able(p)]
    if not candidates:
        return parts
    i = candidates[rng.integers(len(candidates))]
    if kind == "missing":
        del parts[i]
    elif kind == "stunted":
        parts[i] = replace(_stunted(parts[i], rng.uniform(0.2, 0.6)), wrong=True)
    elif kind in ("extra", "misplaced"):
        options = getattr(parts[i], kind)
        dx, dy, degrees = options[rng.integers(len(options))]
        jitter = rng.uniform(-1, 1, 3)
        moved = _moved(parts[i], (dx + 0.02 * jitter[0], dy + 0.02 * jitter[1], degrees + 4 * jitter[2]))
        wrong = replace(moved, wrong=True)
        if kind == "misplaced":
            parts[i] = wrong
        else:  # a second limb lies behind the first, a second eye before it
            parts.insert(i + 1 if "eye" in wrong.name else i, wrong)
    elif kind == "fused":
        j = next(k for k, p in enumerate(parts) if p is sound[parts[i].neighbour])
        a, b = parts[i].shapes[0], parts[j].shapes[0]
        parts[i], parts[j] = (replace(parts[k], wrong=True) for k in (i, j))
        if a.radius is None:  # two eyes become one band
            centre_a, centre_b = a.points.mean(0), b.points.mean(0)
            web = Shape(np.stack([centre_a, centre_b]), radius=0.14, color=a.color, outlined=False)
            pupil = Shape(
                np.stack([centre_a * 0.8 + centre_b * 0.2, centre_a * 0.2 + centre_b * 0.8]),
                radius=0.08,
                color=INK,
                outlined=False,
            )
            parts.insert(j + 1, Part("fused", (web, pupil), wrong=True))
        else:  # the gap between two limbs is filled
            r = a.radius
            quad = np.concatenate([a.points[[0, -1]], b.points[[-1, 0]]])
            web = Shape(quad, color=a.color, outlined=True)
            limbs = tuple(replace(s, outlined=False) for s in (a, b))
            ends = Shape(np.stack([a.points[-1], b.points[-1]]), radius=r, color=a.color)
            parts.insert(
                j + 1,
                Part(
                    "fused",
                    (ends, web, *limbs, replace(ends, outlined=False), replace(web, outlined=False)),
                    wrong=True,
                ),
            )
    return parts


def _warp(canvas: Image.Image, parts: list[Part], place, rng: np.random.Generator) -> Image.Image:
    """Swirl a disc of the picture around one of the parts."""
    part = parts[rng.integers(len(parts))]
    points = np.concatenate([s.points for s in part.shapes])
    cx, cy = place(points[rng.integers(len(points))][None])[0]
    size = canvas.size[0]
    cx, cy = np.clip((cx, cy), 0.25 * size, 0.75 * size)
    radius, strength = rng.uniform(0.2, 0.28) * size, rng.choice([-1, 1]) * rng.uniform(2.4, 3.4)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    dx, dy = x - cx, y - cy
    distance = np.sqrt(dx**2 + dy**2)
    angle = strength * np.clip(1 - distance / radius, 0, 1)
    sx = np.clip(cx + dx * np.cos(angle) - dy * np.sin(angle), 0, size - 1).astype(np.int32)
    sy = np.clip(cy + dx * np.sin(angle) + dy * np.cos(angle), 0, size - 1).astype(np.int32)
    return Image.fromarray(np.asarray(canvas)[sy, sx])


def _watermark(canvas: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Lay a translucent band of strokes, like the letters of a stock agency, over the picture."""
    size = canvas.size[0]
    layer = Image.new("L", canvas.size, 0)
    draw = ImageDraw.Draw(layer)
    y, h = rng.uniform(0.2, 0.8) * size, 0.075 * size
    x = rng.uniform(0.06, 0.14) * size
    width = int(0.032 * size)
    while x < 0.86 * size:
        glyph = rng.integers(4)
        w = 0.085 * size
        if glyph == 0:
            draw.line([(x, y - h), (x, y + h)], fill=255, width=width)
        elif glyph == 1:
            draw.line([(x, y + h), (x + w / 2, y - h), (x + w, y + h)], fill=255, width=width)
        elif glyph == 2:
            draw.ellipse([x, y - h, x + w, y + h], outline=255, width=width)
        else:
            draw.line([(x, y - h), (x + w, y - h), (x, y + h), (x + w, y + h)], fill=255, width=width)
        x += 0.15 * size
    layer = layer.rotate(rng.uniform(-25, 25), resample=Image.Resampling.BILINEAR)
    dark = np.asarray(canvas).mean() > 128
    ink = Image.new("RGB", canvas.size, (20, 20, 24) if dark else (250, 250, 250))
    return Image.composite(ink, canvas, layer.point(lambda v: int(v * 0.62)))


# ---------------------------------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------------------------------


def _placement(rng: np.random.Generator, category: str):
    """A random small similarity transform from thing coordinates to canvas pixels.

    Nothing is mirrored, here or in the things themselves: a caption does not say which way a dog looks or on which side a
    cup has its handle, and a small model would draw both at once.
    """
    size = IMAGE_SIZE * SUPERSAMPLING
    turn = _rotation(rng.uniform(-12, 12) if category in PRONE_CATEGORIES else rng.uniform(-4, 4))
    scale = rng.uniform(0.84, 1.0) * size / 2
    shift = size / 2 + rng.uniform(-0.07, 0.07, 2) * size / 2

    def place(points: np.ndarray) -> np.ndarray:
        return points @ turn.T * scale + shift

    place.scale = scale
    return place


def _palette(name: str, color: tuple[int, int, int]) -> tuple[int, int, int]:
    if name == "dark":
        return tuple(int(c * 0.68) for c in color)
    if name == "light":
        return tuple(int(c + (255 - c) * 0.42) for c in color)
    return color


def _draw(parts: list[Part], place, scene: Scene) -> Image.Image:
    size = IMAGE_SIZE * SUPERSAMPLING
    canvas = Image.new("RGB", (size, size), BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(canvas)
    ink = INK if scene.background != "black" else (0, 0, 0)
    if scene.style != "drawing":  # softer contours than a drawing's
        ink = tuple(int(c * 0.42) for c in COLORS[scene.color])
    border = 0.034 * place.scale
    for part in parts:
        for shape in part.shapes:
            fill = shape.color if isinstance(shape.color, tuple) else _palette(shape.color, COLORS[scene.color])
            points = place(shape.points)
            if shape.outlined:
                _fill(draw, points, shape.radius, place.scale, ink, border)
            _fill(draw, points, shape.radius, place.scale, fill, 0.0)
    return canvas


def _fill(
    draw: ImageDraw.ImageDraw, points: np.ndarray, radius: float | None, scale: float, color, border: float
) -> None:
    flat = [tuple(p) for p in points.tolist()]
    if radius is None:
        draw.polygon(flat, fill=color)
        width = 2 * border
    else:
        width = 2 * (radius * scale + border)
    if width > 0:
        line = flat if radius is not None else flat + flat[:1]
        draw.line(line, fill=color, width=max(1, round(width)))
        for x, y in flat:
            draw.ellipse([x - width / 2, y - width / 2, x + width / 2, y + width / 2], fill=color)


@dataclass(frozen=True)
class _Light:
    direction: np.ndarray
    strength: float
    noise: np.ndarray = field(repr=False)


def _light(rng: np.random.Generator) -> _Light:
    angle = rng.uniform(0, 2 * math.pi)
    noise = rng.normal(0, 3.0, (IMAGE_SIZE, IMAGE_SIZE, 1)).astype(np.float32)
    return _Light(np.array([math.cos(angle), math.sin(angle)], np.float32), float(rng.uniform(0.1, 0.16)), noise)


def _finish(canvas: Image.Image, scene: Scene, light: _Light) -> np.ndarray:
    """Shrink to the image size; renders and photos are lit from one side, photos are also a little soft and noisy."""
    small = canvas.reduce(SUPERSAMPLING)
    if scene.style == "drawing":
        return np.asarray(small)
    if scene.style == "photo":
        small = small.filter(ImageFilter.GaussianBlur(0.45))
    image = np.asarray(small).astype(np.float32)
    axis = np.linspace(-1, 1, IMAGE_SIZE, dtype=np.float32)
    slope = light.direction[0] * axis[None, :] + light.direction[1] * axis[:, None]
    image *= (1 + light.strength * slope)[..., None]
    if scene.style == "photo":
        image += light.noise
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)
