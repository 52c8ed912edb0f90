# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Pictures for people: heatmaps over images, labelled grids, before/after grids, training curves, shares with intervals."""

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .files import written_atomically


# Colour of a confidence: yellow is a suspicion, magenta a certainty. At 0 nothing is drawn.
HEAT = {0.0: (1.0, 0.95, 0.35), 0.35: (1.0, 0.62, 0.05), 0.7: (0.93, 0.1, 0.1), 1.0: (0.72, 0.0, 0.5)}

INK, FAINT_INK, PAPER, MISSING = (28, 32, 38), (104, 110, 120), (255, 255, 255), (240, 241, 243)
MARGIN, GAP, BLOCK_GAP = 12, 4, 24

Tile = torch.Tensor | Image.Image | None


def to_pil(image: torch.Tensor) -> Image.Image:
    """(3, H, W) or (1, H, W) float in [0, 1], values outside are clipped -> PIL image, RGB or gray."""
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"`image` must be of shape (3, H, W) or (1, H, W), found {tuple(image.shape)}.")
    array = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))


def heatmap_overlay(images: torch.Tensor, maps: torch.Tensor, alpha: float = 0.75) -> torch.Tensor:
    """Lay the diagnosis over the images. Not meant to be differentiated.

    Args:
        images: (B, 3, H, W) in [0, 1].
        maps: (B, 1, H, W) in [0, 1], 1 = artifact.
        alpha: opacity in [0, 1] of the colour where the confidence is 1; it falls linearly to none at 0.

    Returns:
        (B, 3, H, W) in [0, 1]: the image in paler colours, so that the heat stands out, under yellow, red and magenta.
    """
    if images.ndim != 4 or images.shape[1] != 3 or maps.shape != (images.shape[0], 1, *images.shape[2:]):
        raise ValueError(
            "`images` must be (B, 3, H, W) and `maps` (B, 1, H, W) of the same size, found "
            f"{tuple(images.shape)} and {tuple(maps.shape)}."
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"`alpha` must be in [0, 1], found {alpha}.")
    images, maps = images.detach().float().clamp(0, 1), maps.detach().to(images.device).float().clamp(0, 1)
    gray = (images * images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
    pale = 0.45 * images + 0.55 * gray
    weight = alpha * maps
    return (1 - weight) * pale + weight * _heat(maps)


def _heat(maps: torch.Tensor) -> torch.Tensor:
    """(B, 1, H, W) in [0, 1] -> (B, 3, H, W): linear interpolation between the stops of `HEAT`."""
    stops = list(HEAT)
    colors = maps.new_tensor(list(HEAT.values()))
    upper = torch.bucketize(maps[:, 0].contiguous(), maps.new_tensor(stops[1:-1]), right=True) + 1
    positions = maps.new_tensor(stops)
    low, high = positions[upper - 1], positions[upper]
    share = ((maps[:, 0] - low) / (high - low)).unsqueeze(-1)
    return ((1 - share) * colors[upper - 1] + share * colors[upper]).permute(0, 3, 1, 2)


def image_grid(
    rows: Sequence[Sequence[Tile]],
    column_labels: Sequence[str] | None = None,
    captions: Sequence[str] | None = None,
    tile_size: int = 192,
    margin: int = MARGIN,
) -> Image.Image:
    """Images in rows, with a label over each column and a caption over each row.

    Args:
        rows: equally many pictures per row: tensors (3, H, W) in [0, 1], PIL images, or None for an empty place.
        column_labels: one for each column.
        captions: one for each row, written over it and cut after two lines.
        tile_size: width of a column in pixels. Larger images are shrunk to fit; smaller ones are enlarged by a whole
            factor with their pixels kept square, so that a 64-pixel image can be judged.
        margin: white pixels around the whole.
    """
    rows = [[_tile(picture, tile_size) for picture in row] for row in rows]
    if not rows or not rows[0]:
        raise ValueError("`rows` has no picture in it.")
    columns = len(rows[0])
    if any(len(row) != columns for row in rows):
        raise ValueError(f"`rows` must be of one length, found lengths {[len(row) for row in rows]}.")
    if column_labels is not None and len(column_labels) != columns:
        raise ValueError(f"`column_labels` has {len(column_labels)} entries for {columns} columns.")
    if captions is not None and len(captions) != len(rows):
        raise ValueError(f"`captions` has {len(captions)} entries for {len(rows)} rows.")

    font, small = _font(15), _font(13)
    cell = max([tile_size] + [tile.width for row in rows for tile in row if tile])
    width = 2 * margin + columns * cell + (columns - 1) * GAP
    texts = [_wrap(caption, small, width - 2 * margin, lines=2) for caption in captions or [""] * len(rows)]
    heights = [max([tile.height for tile in row if tile], default=cell) for row in rows]
    spaces = [18 * len(lines) + 3 * bool(lines) for lines in texts]  # over each row, for its caption
    between = GAP if captions is None else MARGIN
    head = margin + 24 * (column_labels is not None)
    canvas = Image.new("RGB", (width, head + sum(spaces) + sum(heights) + between * (len(rows) - 1) + margin), PAPER)
    draw = ImageDraw.Draw(canvas)

    for column, label in enumerate(column_labels or ()):
        draw.text((margin + column * (cell + GAP), margin), _fit(label, font, cell), fill=INK, font=font)
    y = head
    for row, lines, space, height in zip(rows, texts, spaces, heights):
        for number, line in enumerate(lines):
            draw.text((margin, y + 18 * number), line, fill=FAINT_INK, font=small)
        y += space
        for column, tile in enumerate(row):
            x = margin + column * (cell + GAP)
            if tile is None:
                draw.rectangle((x, y, x + cell - 1, y + height - 1), fill=MISSING)
            else:
                canvas.paste(tile, (x + (cell - tile.width) // 2, y))
        y += height + between
    return canvas


def before_after_grid(
    before: torch.Tensor,
    after: torch.Tensor,
    before_maps: torch.Tensor,
    after_maps: torch.Tensor,
    captions: Sequence[str] | None = None,
    columns: int = 2,
    tile_size: int = 192,
) -> Image.Image:
    """The same prompts and seeds, before | heatmap | after | heatmap, in `columns` blocks beside each other.

    Args:
        before, after: (B, 3, H, W) in [0, 1].
        before_maps, after_maps: (B, 1, H, W) in [0, 1].
        captions: B texts, usually the prompts.
    """
    count = len(before)
    if not (len(after) == len(before_maps) == len(after_maps) == count) or count == 0:
        raise ValueError(
            "`before`, `after` and their maps must have equally many images, at least one, found "
            f"{count}, {len(after)}, {len(before_maps)} and {len(after_maps)}."
        )
    ill, treated = heatmap_overlay(before, before_maps), heatmap_overlay(after, after_maps)
    rows = [list(row) for row in zip(before, ill, after, treated)]
    per_block = math.ceil(count / max(1, min(columns, count)))
    blocks = []
    for start in range(0, count, per_block):
        part = slice(start, start + per_block)
        blocks.append(
            image_grid(
                rows[part],
                column_labels=["before", "diagnosis", "after", "diagnosis"],
                captions=None if captions is None else captions[part],
                tile_size=tile_size,
            )
        )
    width = sum(block.width for block in blocks) + BLOCK_GAP * (len(blocks) - 1)
    canvas = Image.new("RGB", (width, max(block.height for block in blocks)), PAPER)
    x = 0
    for block in blocks:
        canvas.paste(block, (x, 0))
        x += block.width + BLOCK_GAP
    return canvas


def plot_curves(
    history: Sequence[Mapping[str, object]], path: str | os.PathLike, keys: Sequence[str] | None = None
) -> Path | None:
    """Draw a training log as small multiples: one panel for each metric, over the steps.

    Args:
        history: rows like those of `trainer.state.log_history`: each has a "step" and some numbers. A key and the same
            key with the prefix "eval_" share a panel.
        path: PNG file to write.
        keys: the metrics to draw, without "eval_"; by default every number of the log that is not about time or speed.

    Returns:
        The path, or None if the log has nothing to draw (then no file is written).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: the user's backend stays as it is
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in history:
        for key, value in row.items():
            if key == "step" or isinstance(value, bool) or not isinstance(value, (int, float)) or "step" not in row:
                continue
            name = key.removeprefix("eval_")
            if name in keys if keys is not None else not _is_bookkeeping(key):
                curve = "evaluation" if key.startswith("eval_") else "training"
                panels.setdefault(name, {}).setdefault(curve, []).append((row["step"], value))
    if not panels:
        return None

    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.7 * lines), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, (name, curves) in zip(axes, panels.items()):
        for curve, color in (("training", "#3b6fb6"), ("evaluation", "#d1495b")):
            if curve in curves:
                steps, values = zip(*curves[curve])
                few = len(steps) <= 40
                if not few:  # the curve is the running mean, the measurements stand faintly behind it
                    axis.plot(steps, values, color=color, linewidth=0.7, alpha=0.3)
                    values = _running_mean(values, window=len(values) // 20)
                axis.plot(steps, values, color=color, marker="o" * few, markersize=3, linewidth=1.5, label=curve)
        axis.set_title(_title(name), fontsize=10, loc="left", color="#1c2026", parse_math=False)
        axis.grid(color="#e4e6ea", linewidth=0.7)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        if len(curves) > 1:
            axis.legend(fontsize=8, frameon=False)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[max(0, len(panels) - columns) : len(panels)]:
        axis.set_xlabel("step", fontsize=8)
    with written_atomically(path) as unfinished, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a metric's name; a box stands for it
        figure.savefig(unfinished, format="png")
    return Path(path)


def forest_plot(
    names: Sequence[str],
    values: Sequence[float],
    intervals: Sequence[tuple[float, float]],
    tones: Sequence[str],
    path: str | os.PathLike,
    axis: str = "",
) -> Path:
    """Draw shares of groups with their intervals, a line for each, the highest first.

    Args:
        names: of the groups.
        values: shares in [0, 1].
        intervals: lower and upper end.
        tones: "high" is drawn in red, "low" in blue, anything else in gray.
        path: PNG file to write.
        axis: what the shares are of.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: the user's backend stays as it is
    from matplotlib.figure import Figure

    if not names or not len(names) == len(values) == len(intervals) == len(tones):
        raise ValueError(
            "`names`, `values`, `intervals` and `tones` must be of one length and not empty, found lengths "
            f"{len(names)}, {len(values)}, {len(intervals)} and {len(tones)}."
        )
    colors = {"high": "#c0392b", "low": "#3b6fb6"}
    rows = sorted(zip(names, values, intervals, tones), key=lambda row: (row[1], row[0]))
    figure = Figure(figsize=(8, 1.1 + 0.24 * len(rows)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for height, (_, value, (low, high), tone) in enumerate(rows):
        color = colors.get(tone, "#8a919c")
        axes.plot([low, high], [height, height], color=color, linewidth=1.5)
        axes.plot([value], [height], color=color, marker="o", markersize=5)
    axes.set_yticks(range(len(rows)), [_title(name).replace("$", r"\$") for name, *_ in rows], fontsize=8)
    for label, (*_, tone) in zip(axes.get_yticklabels(), rows):
        label.set_color(colors.get(tone, "#1c2026"))
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlabel(axis, fontsize=9)
    axes.grid(axis="x", color="#e4e6ea", linewidth=0.7)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(labelsize=8, left=False)
    with written_atomically(path) as unfinished, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a name; a box stands for it
        figure.savefig(unfinished, format="png")
    return Path(path)


def histograms(
    panels: Sequence[tuple[str, Mapping[str, Sequence[float]], float]], path: str | os.PathLike, bins: int = 40
) -> Path:
    """Draw distributions of two kinds of images over each other, a panel for each number.

    Args:
        panels: what is counted, the values of each kind, and where to draw a line.
        path: PNG file to write.
        bins: of a panel.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: the user's backend stays as it is
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(panels), 2.9), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, kinds, line) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        together = [value for values in kinds.values() for value in values]
        edges = np.linspace(min(together), max(max(together), min(together) + 1e-9), bins + 1)
        for color, (kind, values) in zip(("#8a919c", "#c0392b"), kinds.items()):
            weights = np.full(len(values), 1 / len(values))
            axes.hist(values, edges, weights=weights, color=color, alpha=0.55, label=f"{kind} ({len(values)})")
        axes.axvline(line, color="#1c2026", linewidth=1, linestyle=":")
        axes.set_title(_title(title), fontsize=10, loc="left", color="#1c2026", parse_math=False)
        axes.set_ylabel("share of images", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=8, frameon=False)
    with written_atomically(path) as unfinished:
        figure.savefig(unfinished, format="png")
    return Path(path)


def _title(name: str, longest: int = 40) -> str:
    """A name that people may have chosen, of a metric or a category, on one line of a panel."""
    name = " ".join(name.replace("_", " ").replace("\0", " ").split())
    return name if len(name) <= longest else f"{name[: longest // 2]}…{name[-longest // 2 :]}"


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of the last `window` values, of fewer at the beginning."""
    return [float(np.mean(values[max(0, end - window) : end])) for end in range(1, len(values) + 1)]


def _is_bookkeeping(key: str) -> bool:
    return (
        key in ("epoch", "total_flos", "train_loss")
        or key.endswith(("_runtime", "_per_second", "_per_step", "_time"))
        or key.startswith(("alarm/", "rollback/"))  # of single steps
    )


def _tile(picture: Tile, size: int) -> Image.Image | None:
    if picture is None:
        return None
    image = (to_pil(picture) if isinstance(picture, torch.Tensor) else picture).convert("RGB")
    longest = max(image.size)
    if longest > size:
        scale = size / longest
        return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    factor = size // longest
    return image.resize([side * factor for side in image.size], Image.Resampling.NEAREST) if factor > 1 else image


def _font(size: int):
    # Pillow's own font: the same letters on every machine. Without FreeType it has Latin letters only.
    return ImageFont.load_default(size)


def _printable(text: str, font) -> str:
    return text if isinstance(font, ImageFont.FreeTypeFont) else text.encode("latin-1", "replace").decode("latin-1")


def _fit(text: str, font, width: int) -> str:
    """Cut the text, with an ellipsis, until it is at most `width` pixels wide."""
    text = _printable(" ".join(text.split()), font)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def _wrap(text: str, font, width: int, lines: int) -> list[str]:
    """At most `lines` lines of at most `width` pixels; the last one ends in an ellipsis if text is left."""
    words, result = text.split(), []
    while words and len(result) < lines - 1:
        taken = 1
        while taken < len(words) and font.getlength(_printable(" ".join(words[: taken + 1]), font)) <= width:
            taken += 1
        result.append(_fit(" ".join(words[:taken]), font, width))
        words = words[taken:]
    return result + ([_fit(" ".join(words), font, width)] if words else [])
