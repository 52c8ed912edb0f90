# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Stages in which detectors look at images: in batches of one size, with threads that decode ahead of them and encode behind.

Memory is bounded whatever the images are, and what comes out does not depend on how many threads there are.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..detector import ArtifactDetectorForSemanticSegmentation
from ..detector.modeling_artifact_detector import normalise_images
from ..loading import errors_named, weights_sha256
from .schema import Row, decode_image, reduced_size
from .shards import Quarantined, Shard
from .stage import Result, Stage, row_name


PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Images of one size are looked for among so many rows, or fewer whose images have so many pixels. At most three such chunks are
# in memory: one is decoded, one seen by the detector, of one the results are encoded.
CHUNK = 256
CHUNK_PIXELS = 64 * 2**20


@dataclass(frozen=True)
class DetectorStage(Stage):
    """A stage that needs the opinion of detectors. Make one with `by`, which notes the detectors' weights.

    Subclasses say in `skips` which rows are not looked at and in `skipped` what becomes of those, in `look` what is asked about a
    batch, and in `answer` what becomes of a row.

    Args:
        detectors: their Hub ids or folders.
        weights_sha256: of each; a process that loads others refuses to go on.
        precision: of the networks: "float32", "bfloat16" or "float16".
        batch_size: most images per call of a detector. Halved for a batch that does not fit into the accelerator's memory.
        device: of the detectors.
        decoders: threads that decode images.
    """

    # the same weights from elsewhere are the same detector, and a path is nobody's business
    detectors: tuple[str, ...] = field(compare=False)
    weights_sha256: tuple[str, ...]
    precision: str = "float32"
    batch_size: int = field(default=32, compare=False)
    device: str = field(default="cpu", compare=False)
    decoders: int = field(default=4, compare=False)

    def __post_init__(self):
        if not self.detectors:
            raise ValueError("`detectors` is empty: name at least one.")
        if self.precision not in PRECISIONS:
            raise ValueError(f"`precision` must be one of {', '.join(PRECISIONS)}, found {self.precision!r}.")
        for name in ("batch_size", "decoders"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, found {getattr(self, name)}.")

    @classmethod
    def by(cls, *detectors: str, precision: str = "float32", device: str = "cpu", **options: Any):
        """The stage with these detectors, whose weights are loaded to note their digests.

        Raises:
            OSError, ValueError: there is no such detector, or its files are damaged.
        """
        weights = tuple(_loaded(detector, precision, device)[1] for detector in detectors)
        return cls(detectors, weights, precision, device=device, **options)

    def skips(self, row: Row) -> bool:
        """Whether a row is not looked at."""
        return False

    def skipped(self, row: Row) -> Result:
        """What becomes of a row that is skipped."""
        return row

    def look(self, models: list[torch.nn.Module], images: torch.Tensor) -> np.ndarray:
        """Images (B, 3, H, W) in [0, 1] -> an array (B, ...), one entry for each image."""
        raise NotImplementedError

    def answer(self, row: Row, seen: np.ndarray, position: int) -> Result:
        """What becomes of a row whose entry of `look` is `seen`; called in a thread. `position` counts the rows of a shard."""
        raise NotImplementedError

    def process(self, rows: Iterator[Row], shard: Shard) -> Iterator[Result]:
        models = self.models()
        with ThreadPoolExecutor(self.decoders) as pool, ThreadPoolExecutor(1) as reader:
            chunks = _chunks(enumerate(rows), self._decode, pool, ahead=2 * self.decoders)
            upcoming, results = reader.submit(next, chunks, None), []
            while (chunk := upcoming.result()) is not None:
                upcoming = reader.submit(next, chunks, None)
                earlier, results = results, self._results(models, chunk, pool)
                yield from _awaited(earlier)
            yield from _awaited(results)

    def models(self) -> list[torch.nn.Module]:
        """The detectors, on their device and in their precision; each is loaded once in a process."""
        return [self._model(*pair) for pair in zip(self.detectors, self.weights_sha256)]

    def _model(self, detector: str, expected: str) -> torch.nn.Module:
        model, found = _loaded(detector, self.precision, self.device)
        if found != expected:
            raise ValueError(
                f"The detector {detector!r} has other weights (sha256 {found[:12]}...) than the one that this was begun with "
                f"({expected[:12]}...). Use that one, or another output folder."
            )
        return model

    def _decode(self, numbered: tuple[int, Row]) -> np.ndarray | Quarantined | None:
        """The image (H, W, 3) uint8; None for a row that is skipped."""
        _, row = numbered
        if self.skips(row):
            return None
        try:
            return np.asarray(decode_image(row))
        except Exception as error:  # decoders raise many types; one bad file must not stop the rest
            return Quarantined(row_name(row), str(error) or type(error).__name__)

    def _results(self, models: list[torch.nn.Module], chunk: list, pool: ThreadPoolExecutor) -> list:
        """What becomes of each row of a chunk: a result, or a future of one."""
        results: list = [self.skipped(row) if decoded is None else decoded for (_, row), decoded in chunk]
        sizes: dict[tuple[int, int], list[int]] = {}
        for index, (_, decoded) in enumerate(chunk):
            if isinstance(decoded, np.ndarray):
                sizes.setdefault(decoded.shape[:2], []).append(index)
        for indices in sizes.values():
            for start in range(0, len(indices), self.batch_size):
                batch = indices[start : start + self.batch_size]
                try:
                    seen = self._seen(models, np.stack([chunk[index][1] for index in batch]))
                except ValueError as error:  # images of one size, which this detector refuses (a strip, say)
                    for index in batch:
                        results[index] = Quarantined(row_name(chunk[index][0][1]), str(error))
                    continue
                for index, entry in zip(batch, seen):
                    position, row = chunk[index][0]
                    results[index] = pool.submit(self.answer, row, entry, position)
        return results

    @torch.inference_mode()
    def _seen(self, models: list[torch.nn.Module], images: np.ndarray) -> np.ndarray:
        """`look` at images (B, H, W, 3) of uint8, fewer at a time where memory ends."""
        try:
            batch = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float().div_(255)
            return self.look(models, batch)
        except torch.OutOfMemoryError:
            if len(images) == 1:
                raise
        half = len(images) // 2  # with the failed attempt's tensors gone
        return np.concatenate([self._seen(models, images[:half]), self._seen(models, images[half:])])


def confidence_maps(
    model: torch.nn.Module, images: torch.Tensor, size: tuple[int, int] | None = None, image_size: int | None = None
) -> torch.Tensor:
    """Images (B, 3, H, W) in [0, 1] -> confidences (B, *size): the detector's logits, brought to that size.

    Args:
        model: the detector.
        images: on its device.
        size: (height, width); a quarter of each side without it, see [`reduced_size`].
        image_size: short side in pixels at which it looks at them, a multiple of 32; the detector's own without it.

    Raises:
        ValueError: the detector gave what is no number.
    """
    if size is None:
        size = reduced_size((images.shape[-1], images.shape[-2]))[::-1]
    pixels = normalise_images(images, model.config, image_size)
    logits = model(pixels.to(next(model.parameters()).dtype)).logits.float()
    if logits.shape[-2:] != size:
        logits = F.interpolate(logits, size, mode="bilinear", antialias=True)
    confidence = logits.sigmoid()[:, 0]
    if not confidence.isfinite().all():
        raise ValueError("the detector gave confidences that are not numbers")
    return confidence


def _awaited(results: list) -> Iterator[Result]:
    for result in results:
        yield result.result() if hasattr(result, "result") else result


def _chunks(rows: Iterator, decode: Callable, pool: ThreadPoolExecutor, ahead: int) -> Iterator[list[tuple[Any, Any]]]:
    """Chunks of (row, decoded), in order; rows are decoded up to `ahead` of the one that is asked for."""
    waiting = deque((row, pool.submit(decode, row)) for row in islice(rows, ahead))
    chunk, pixels = [], 0
    while waiting:
        row, future = waiting.popleft()
        decoded = future.result()
        following = next(rows, None)
        if following is not None:
            waiting.append((following, pool.submit(decode, following)))
        chunk.append((row, decoded))
        pixels += decoded[..., 0].size if isinstance(decoded, np.ndarray) else 0
        if len(chunk) == CHUNK or pixels >= CHUNK_PIXELS:
            yield chunk
            chunk, pixels = [], 0
    if chunk:
        yield chunk


@cache
def _loaded(detector: str, precision: str, device: str) -> tuple[torch.nn.Module, str]:
    """The detector, and the sha256 of its weights as they are in its files."""
    with errors_named(detector, f"`detector` {detector!r}"):
        model = ArtifactDetectorForSemanticSegmentation.from_pretrained(detector, dtype=torch.float32)
    model = model.eval().requires_grad_(False)
    weights = weights_sha256(model)
    return model.to(device=device, dtype=PRECISIONS[precision]), weights


def release_detectors() -> None:
    """Forget the detectors that this process keeps loaded."""
    _loaded.cache_clear()
