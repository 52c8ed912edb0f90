# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""See the whole and the details: a detector of 512 pixels over an image of thousands."""

from typing import Any

import torch


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles of `tile` pixels begin so that they cover `length` and share at least `overlap`; the last ends with it."""
    if length <= tile:
        return [0]
    return [*range(0, length - tile, tile - overlap), length - tile]


def tiled_confidence(
    detector: Any, images: torch.Tensor, tile: int, overlap: int | None = None, batch_size: int = 8
) -> torch.Tensor:
    """Confidence of the detector on the whole image and on its tiles, whichever is higher.

    Small faces and hands vanish when a large image is shrunk to the size of the detector; tiles show them, and the whole
    image shows what is larger than a tile. Where tiles overlap, their maps are blended with weights that grow linearly from
    the border of a tile inwards over `overlap` pixels, for at its border a tile lacks context. More artifacts are found and
    more false alarms raised. The rule is ours, not the paper's.

    Args:
        detector: anything with `confidence(images)`.
        images: float (B, 3, H, W) in [0, 1].
        tile: side of the square tiles in pixels. An image that fits into one tile is seen once, as a whole.
        overlap: pixels that neighbouring tiles share at least, below `tile`; a quarter of `tile` by default.
        batch_size: most tiles per call of the detector.

    Returns:
        float (B, 1, H, W) in [0, 1].
    """
    overlap = tile // 4 if overlap is None else overlap
    if tile < 1 or not 0 <= overlap < tile:
        raise ValueError(f"tile must be positive and overlap lie in [0, tile); got tile={tile}, overlap={overlap}.")
    whole = detector.confidence(images)
    height, width = images.shape[-2:]
    if max(height, width) <= tile:
        return whole
    windows = [
        (..., slice(top, min(top + tile, height)), slice(left, min(left + tile, width)))
        for top in tile_starts(height, tile, overlap)
        for left in tile_starts(width, tile, overlap)
    ]
    total, weights = torch.zeros_like(whole), torch.zeros_like(whole)
    weight = _ramp(min(tile, height), overlap, whole)[:, None] * _ramp(min(tile, width), overlap, whole)
    per_call = max(1, batch_size // len(images))
    for first in range(0, len(windows), per_call):
        some = windows[first : first + per_call]
        maps = detector.confidence(torch.cat([images[window] for window in some]))
        for window, part in zip(some, maps.split(len(images))):
            total[window] += weight * part
            weights[window] += weight
    return torch.maximum(whole, total / weights)


def _ramp(length: int, overlap: int, like: torch.Tensor) -> torch.Tensor:
    """1, 2, ... `overlap` + 1 from both ends, and `overlap` + 1 between."""
    inwards = torch.arange(1, length + 1, device=like.device, dtype=like.dtype)
    return torch.minimum(inwards, inwards.flip(0)).clamp(max=overlap + 1)
