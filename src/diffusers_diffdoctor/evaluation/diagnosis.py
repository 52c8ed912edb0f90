# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Diagnose files: judge them in batches, write a ranked report; resumable."""

import json
import os
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ..detector.tiling import tiled_confidence
from ..files import digest, find_images, write_atomically, written_atomically
from ..images import read_image, to_image_tensor
from .metrics import area_ratio, max_confidence, wilson_interval
from .pictures import heatmap_overlay, image_grid, to_pil
from .report import Figure, Picture, Section, Table, html_report


SETTINGS, DIAGNOSIS, QUARANTINE, BEST = "settings.json", "diagnosis.jsonl", "quarantine.jsonl", "best.jsonl"
REPORT, OVERLAYS = "report.html", "overlays"

# Memory stays bounded whatever the images are: a batch holds at most so many pixels (16 images of 1024 x 1024), and so
# do decoded images that wait for others of their size.
BATCH_PIXELS = 16 * 2**20
WAITING_PIXELS = 64 * 2**20


def diagnose_images(
    paths: Sequence[str | os.PathLike],
    output_dir: str | os.PathLike,
    detector: torch.nn.Module,
    *,
    detector_name: str = "",
    threshold: float = 0.5,
    tile: bool = False,
    batch_size: int = 8,
    top_k: int = 0,
    restart: bool = False,
    workers: int = 4,
    report_images: int = 100,
    show_progress: bool = True,
) -> dict:
    """Diagnose image files and write a report. An interrupted run goes on where it stopped when it is started again.

    Args:
        paths: image files, and folders that are searched for PNG, JPEG, WEBP, BMP and TIFF files at any depth.
        output_dir: folder for
            diagnosis.jsonl (one row per image: `path`, `max_confidence` and `area_ratio` in [0, 1], `artifact`
            (maximum confidence of at least `threshold`), `overlay`, `width`, `height`, `bytes`, `mtime_ns`),
            quarantine.jsonl (one row per file that cannot be read or that the detector refuses: `path`, `reason`),
            best.jsonl (the `top_k` cleanest), overlays/ (heatmaps over the images), report.html and settings.json.
        detector: a model with `confidence(images)`, on the device it is to run on, in evaluation mode.
        detector_name: what to call the detector in the report.
        threshold: confidence in (0, 1] from which a pixel counts as an artifact.
        tile: also look at large images piece by piece, see [`tiled_confidence`].
        batch_size: most images per call of the detector; images of one size go together. Halved for a batch that does not
            fit into the accelerator's memory.
        top_k: how many of the cleanest images to list.
        restart: begin anew in a folder that holds another diagnosis.
        workers: threads that read files.
        report_images: most images to show in report.html.

    Returns:
        `images` = `diagnosed` + `quarantined`, `resumed` (diagnosed by earlier runs), `dropped` (of earlier runs, but
        not among the files now), `artifacts`, `interval` (95 %, of the artifact frequency; None without images),
        `best` (rows) and `report` (path).

    Raises:
        ValueError: no image found, or the folder holds a diagnosis with other settings.
        OSError: a path does not exist, or the output folder cannot be written.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"`threshold` must be in (0, 1], found {threshold}.")
    for name, value, least in (("batch_size", batch_size, 1), ("top_k", top_k, 0), ("workers", workers, 1)):
        if value < least:
            raise ValueError(f"`{name}` must be at least {least}, found {value}.")
    output_dir = Path(output_dir)
    files = find_images(paths, excluded=(output_dir, output_dir / OVERLAYS))
    _prepare_folder(output_dir)
    settings = {
        "detector": detector_name,
        "weights_sha256": fingerprint(detector),
        "threshold": threshold,
        "tile": tile,
    }
    earlier = _resume(output_dir, settings, restart)
    wanted = {str(file) for file in files}
    done = {path: row for path, row in earlier.items() if path in wanted and _is_current(row, output_dir)}
    dropped = [path for path in earlier if path not in wanted]
    for path in dropped:
        _overlay(earlier[path], output_dir).unlink(missing_ok=True)
    _write_rows(output_dir / DIAGNOSIS, done.values())
    resumed, quarantined = len(done), {}

    todo = [file for file in files if str(file) not in done]
    with (
        open(output_dir / DIAGNOSIS, "a", encoding="utf-8") as journal,
        ThreadPoolExecutor(workers) as pool,
        tqdm(
            total=len(files), initial=resumed, desc="diagnosing", unit="image", disable=None if show_progress else True
        ) as progress,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error", Image.DecompressionBombWarning)

        def set_aside(file: Path, error: Exception) -> None:
            quarantined[str(file)] = {"path": str(file), "reason": f"{type(error).__name__}: {error}"}
            progress.update()
            progress.set_postfix(quarantined=len(quarantined))

        def diagnose(batch: list[tuple[Path, np.ndarray, os.stat_result]]) -> None:
            maps = None
            try:
                maps = _confidence(detector, batch, tile)
            except torch.OutOfMemoryError as error:
                if len(batch) == 1:
                    set_aside(batch[0][0], error)
                    return
            except ValueError as error:  # images of one size, which this detector refuses (a strip, say)
                for file, _, _ in batch:
                    set_aside(file, error)
                return
            if maps is None:  # with the failed attempt's tensors gone
                diagnose(batch[: len(batch) // 2])
                diagnose(batch[len(batch) // 2 :])
                return
            rows = _write_overlays(batch, maps, output_dir, threshold, pool)
            for row in rows:
                done[row["path"]] = row
                journal.write(json.dumps(row) + "\n")
            journal.flush()
            progress.update(len(rows))

        waiting: dict[tuple[int, int], list] = {}
        for file, result in _decoded(todo, pool, ahead=2 * workers):
            if isinstance(result, Exception):
                set_aside(file, result)
                continue
            array, stat = result
            size = array.shape[:2]
            waiting.setdefault(size, []).append((file, array, stat))
            if len(waiting[size]) >= min(batch_size, max(1, BATCH_PIXELS // (size[0] * size[1]))):
                diagnose(waiting.pop(size))
            while sum(h * w * len(batch) for (h, w), batch in waiting.items()) > WAITING_PIXELS:
                diagnose(waiting.pop(max(waiting, key=lambda s: s[0] * s[1] * len(waiting[s]))))
        for batch in waiting.values():
            diagnose(batch)

    # From here on the order is that of the files, whatever came first.
    rows = [done[str(file)] for file in files if str(file) in done]
    bad = [quarantined[str(file)] for file in files if str(file) in quarantined]
    if len(files) != len(rows) + len(bad):
        raise RuntimeError(f"{len(files)} files went in, but {len(rows)} rows and {len(bad)} quarantined came out.")
    ranking = sorted(rows, key=lambda row: (-row["max_confidence"], -row["area_ratio"], row["path"]))
    best = [{"rank": rank, **row} for rank, row in enumerate(reversed(ranking[max(0, len(rows) - top_k) :]), start=1)]
    _write_rows(output_dir / DIAGNOSIS, rows)
    _write_rows(output_dir / QUARANTINE, bad)
    if top_k:
        _write_rows(output_dir / BEST, best)
    else:
        (output_dir / BEST).unlink(missing_ok=True)
    artifacts = sum(row["artifact"] for row in rows)
    summary = {
        "images": len(files),
        "diagnosed": len(rows),
        "quarantined": len(bad),
        "resumed": resumed,
        "dropped": len(dropped),
        "artifacts": artifacts,
        "interval": wilson_interval(artifacts, len(rows)) if rows else None,
        "best": best,
        "report": str(output_dir / REPORT),
    }
    _write_html(output_dir, settings, summary, ranking[:report_images], bad)
    return summary


@torch.no_grad()
def fingerprint(model: torch.nn.Module) -> str:
    """sha256 of a model's weights by name: another detector at the same address has another fingerprint."""

    def parts():
        for name, tensor in sorted(model.state_dict().items()):
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)}"
            yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

    return digest(parts())


def _decoded(files: Sequence[Path], pool: ThreadPoolExecutor, ahead: int) -> Iterator[tuple[Path, object]]:
    """(file, (array (H, W, 3) uint8, stat) or the exception), in order, read at most `ahead` files ahead."""

    def read(file: Path):
        try:
            stat = file.stat()
            return np.asarray(read_image(file)), stat
        except Exception as error:  # decoders raise many types; one bad file must not stop the rest
            return error

    reading: deque = deque()
    for file in files:
        reading.append((file, pool.submit(read, file)))
        if len(reading) > ahead:
            first, future = reading.popleft()
            yield first, future.result()
    for file, future in reading:
        yield file, future.result()


@torch.no_grad()
def _confidence(detector: torch.nn.Module, batch: Sequence, tile: bool) -> torch.Tensor:
    images = torch.from_numpy(np.stack([array for _, array, _ in batch])).permute(0, 3, 1, 2).float() / 255
    weight = next(detector.parameters(), None)
    if weight is not None:
        images = images.to(weight.device)
    maps = tiled_confidence(detector, images, detector.config.image_size) if tile else detector.confidence(images)
    if not maps.isfinite().all():
        raise ValueError("the detector gave confidences that are not numbers")
    return maps.float().cpu()


def _write_overlays(batch: Sequence, maps: torch.Tensor, output_dir: Path, threshold: float, pool) -> list[dict]:
    """The overlay of each image of the batch, in threads, and its row."""
    worst, area = max_confidence(maps).tolist(), area_ratio(maps, threshold).tolist()

    def write(index: int) -> dict:
        file, array, stat = batch[index]
        overlay = f"{OVERLAYS}/{_harmless(file.stem)}-{digest(str(file))[:10]}.jpg"
        picture = to_pil(heatmap_overlay(to_image_tensor(array)[None], maps[index : index + 1])[0])
        with written_atomically(output_dir / overlay) as unfinished:
            picture.save(unfinished, "JPEG", quality=92, subsampling=0)
        return {
            "path": str(file),
            "max_confidence": round(worst[index], 6),
            "area_ratio": round(area[index], 6),
            "artifact": worst[index] >= threshold,
            "overlay": overlay,
            "width": array.shape[1],
            "height": array.shape[0],
            "bytes": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
        }

    return list(pool.map(write, range(len(batch))))


def _harmless(stem: str) -> str:
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_") else "_" for letter in stem)[
        :60
    ]


def _prepare_folder(output_dir: Path) -> None:
    try:
        (output_dir / OVERLAYS).mkdir(parents=True, exist_ok=True)
        probe = output_dir / ".probe.unfinished"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"The output folder {output_dir} cannot be written ({error.strerror}): choose another."
        ) from error


def _resume(output_dir: Path, settings: Mapping, restart: bool) -> dict[str, dict]:
    """path -> row of earlier runs with the same settings; an error if the folder holds other ones."""
    earlier = _read_rows(output_dir / DIAGNOSIS)
    known = output_dir / SETTINGS
    if restart:
        for row in earlier:
            _overlay(row, output_dir).unlink(missing_ok=True)
        for name in (DIAGNOSIS, QUARANTINE, BEST, REPORT):
            (output_dir / name).unlink(missing_ok=True)
        earlier = []
    elif earlier:
        try:
            before = json.loads(known.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            before = {}
        changed = [
            f"{name} was {before.get(name, 'unknown')}, now {value}"
            for name, value in settings.items()
            if before.get(name) != value
        ]
        if changed:
            raise ValueError(
                f"{output_dir} holds a diagnosis with other settings ({'; '.join(changed)}), and the two must not be "
                "mixed. Use the same settings, another output folder, or restart (--restart) to replace the old one."
            )
    write_atomically(known, json.dumps(settings, indent=2))
    return {row["path"]: row for row in earlier}


def _is_current(row: Mapping, output_dir: Path) -> bool:
    """The file is the one that was diagnosed, and its overlay is there."""
    try:
        stat = os.stat(row["path"])
    except OSError:
        return False
    same = (stat.st_size, stat.st_mtime_ns) == (row["bytes"], row["mtime_ns"])
    return same and _overlay(row, output_dir).is_file()


def _overlay(row: Mapping, output_dir: Path) -> Path:
    return output_dir / OVERLAYS / Path(row["overlay"]).name  # by name: never a path outside of the folder


def _read_rows(path: Path) -> list[dict]:
    """The rows of a journal. A run that was killed can leave half a line; its image is simply diagnosed again."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict) and {"path", "overlay", "bytes", "mtime_ns"} <= set(row):
                rows.append(row)
    return rows


def _write_rows(path: Path, rows) -> None:
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def _write_html(
    output_dir: Path, settings: Mapping, summary: Mapping, worst: Sequence[Mapping], bad: Sequence[Mapping]
):
    interval, diagnosed = summary["interval"], summary["diagnosed"]
    figures = [Figure("Images diagnosed", f"{diagnosed}")]
    if diagnosed:
        figures.append(
            Figure(
                "With an artifact",
                f"{summary['artifacts']} ({100 * summary['artifacts'] / diagnosed:.1f} %)",
                f"95 %: {100 * interval[0]:.1f} to {100 * interval[1]:.1f} %",
                "bad" if summary["artifacts"] else "good",
            )
        )
    figures.append(Figure("Quarantined", f"{summary['quarantined']}", "files that could not be diagnosed"))
    sections = []
    if worst:
        sections.append(
            Section(
                "Worst first",
                f"The {len(worst)} images with the highest confidence of {diagnosed}: the image, and the diagnosis "
                "over it. Yellow is a suspicion, magenta a certainty.",
                pictures=[_card(row, output_dir) for row in worst],
            )
        )
    if summary["best"]:
        sections.append(
            Section(
                "Cleanest",
                f"The {len(summary['best'])} images with the lowest confidence, cleanest first; at most 24 are shown.",
                pictures=[_card(row, output_dir) for row in summary["best"][:24]],
            )
        )
    if bad:
        sections.append(
            Section(
                "Quarantined",
                f"The first {min(100, len(bad))} of {len(bad)} files that could not be diagnosed ({QUARANTINE}).",
                table=Table(("file", ""), [(row["path"], row["reason"]) for row in bad[:100]]),
            )
        )
    sections.append(Section("Settings", table=Table(("", ""), [(key, str(value)) for key, value in settings.items()])))
    html_report(
        output_dir / REPORT,
        "Diagnosis",
        figures,
        sections,
        f"An image has an artifact if its maximum confidence is at least {settings['threshold']:g}. "
        "Confidences are a model's opinion: look at the pictures.",
    )


def _card(row: Mapping, output_dir: Path) -> Picture:
    """Image and overlay beside each other; the overlay alone if the image has gone meanwhile."""
    overlay = read_image(_overlay(row, output_dir))
    try:
        pair = [read_image(row["path"]), overlay]
    except Exception:
        pair = [None, overlay]
    note = f"maximum {row['max_confidence']:.3f}, area {100 * row['area_ratio']:.2f} %"
    return Picture(image_grid([pair], margin=0), Path(row["path"]).name, note)
