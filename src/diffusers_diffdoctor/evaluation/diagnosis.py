# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Diagnose files: judge them in batches, write a ranked report; resumable."""

import json
import os
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ..detector.tiling import tiled_confidence
from ..disk import describe, is_of_the_disk
from ..files import (
    LOCK,
    RUNNING,
    Found,
    digest,
    find_images,
    only_run,
    unfinished_at,
    write_atomically,
    written_atomically,
)
from ..images import read_image, to_image_tensor
from ..loading import weights_sha256
from ..names import harmless
from ..pictures import heatmap_overlay, to_pil
from ..tables import write_csv
from .metrics import area_ratio, max_confidence, wilson_interval
from .report import PICTURES, Card, Figure, Gallery, Section, Table, View, address, encode, fitted, html_report


SETTINGS, DIAGNOSIS, BEST = "settings.json", "diagnosis.jsonl", "best.jsonl"
QUARANTINE, SKIPPED = "quarantine.jsonl", "skipped.jsonl"
REPORT, OVERLAYS = "report.html", "overlays"
CSV = {name: name.replace(".jsonl", ".csv") for name in (DIAGNOSIS, BEST, QUARANTINE, SKIPPED)}
WRITTEN = (SETTINGS, *CSV, *CSV.values(), REPORT, OVERLAYS, PICTURES, LOCK, RUNNING)

# a row of the journal: what is written, and all that is believed when it is read again
ROW = {
    "path": str,
    "max_confidence": float,
    "area_ratio": float,
    "artifact": bool,
    "overlay": str,
    "width": int,
    "height": int,
    "bytes": int,
    "mtime_ns": int,
}
REASON = ("path", "reason")

# Memory stays bounded whatever the images are: a batch holds at most so many pixels (16 images of 1024 x 1024), and so
# do decoded images that wait for others of their size.
BATCH_PIXELS = 16 * 2**20
WAITING_PIXELS = 64 * 2**20
BAND_PIXELS = 2**20
THUMBNAIL = 320  # pixels of the longer side


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
    report_images: int = 10_000,
    show_progress: bool = True,
) -> dict:
    """Diagnose image files and write a report. An interrupted run goes on where it stopped when it is started again.

    Every file that is found is diagnosed, quarantined (it cannot be read, or the detector refuses it) or skipped by a rule
    of [`find_images`], and is a row of one of three tables.

    Args:
        paths: image files, and folders that are searched for PNG, JPEG, WEBP, BMP and TIFF files at any depth.
        output_dir: folder for
            diagnosis.jsonl (one row per image: `path`, `max_confidence` and `area_ratio` in [0, 1], `artifact`
            (maximum confidence of at least `threshold`), `overlay`, `width`, `height`, `bytes`, `mtime_ns`),
            quarantine.jsonl and skipped.jsonl (one row per file: `path`, `reason`),
            best.jsonl (the `top_k` cleanest), each of these tables as .csv too, overlays/ (heatmaps over the images),
            report.html with the thumbnails it shows in report_files/, and settings.json.
        detector: a model with `confidence(images)`, on the device it is to run on, in evaluation mode.
        detector_name: what to call the detector in the report.
        threshold: confidence in (0, 1] from which a pixel counts as an artifact.
        tile: also look at large images piece by piece, see [`tiled_confidence`].
        batch_size: most images per call of the detector; images of one size go together. Halved for a batch that does not
            fit into the accelerator's memory.
        top_k: how many of the cleanest images to list.
        restart: begin anew in a folder that holds another diagnosis.
        workers: threads that read files.
        report_images: most images to show in report.html, the worst; a browser takes its time for more than ten thousand.

    Returns:
        `found` = `diagnosed` + `quarantined` + `skipped`; `skipped_reasons` (rule -> count); `unread` (how many are or may
        hide an image and were not read: the quarantined, and the skipped but for those whose name is no image's);
        `resumed` (diagnosed by earlier runs), `dropped` (of earlier runs, but not among the files now), `damaged_lines`
        (of the journal of earlier runs, whose images were diagnosed again), `artifacts`, `interval` (95 %, of the
        artifact frequency; None without images), `best` (rows) and `report` (path).

    Raises:
        ValueError: no image found, or the folder holds a diagnosis with other settings.
        OSError: a path does not exist, or the output folder cannot be written, or its disk is full: what is done is kept.
        FolderInUse: another process, which is named, diagnoses into the folder.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"`threshold` must be in (0, 1], found {threshold}.")
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("top_k", top_k, 0),
        ("workers", workers, 1),
        ("report_images", report_images, 0),
    ):
        if value < least:
            raise ValueError(f"`{name}` must be at least {least}, found {value}.")
    output_dir = Path(output_dir)
    found = find_images(paths, excluded=written_to(output_dir))
    _prepare_folder(output_dir)
    with only_run(output_dir):
        settings = {
            "detector": detector_name,
            "weights_sha256": weights_sha256(detector),
            "threshold": threshold,
            "tile": tile,
        }
        options = {"batch_size": batch_size, "top_k": top_k, "restart": restart, "workers": workers}
        options |= {"report_images": report_images, "show_progress": show_progress}
        try:
            return _diagnose(found, output_dir, detector, settings, **options)
        except OSError as error:  # of writing: those of reading are in the quarantine
            if not is_of_the_disk(error):
                raise
            remedy = "What is done is kept: make room and run the same command again."
            raise OSError(error.errno, f"{describe(output_dir, error)}. {remedy}") from error


def _diagnose(
    found: Found,
    output_dir: Path,
    detector: torch.nn.Module,
    settings: Mapping,
    *,
    batch_size: int,
    top_k: int,
    restart: bool,
    workers: int,
    report_images: int,
    show_progress: bool,
) -> dict:
    """[`diagnose_images`], with the folder ours."""
    files, threshold, tile = found.images, settings["threshold"], settings["tile"]
    earlier, damaged_lines = _resume(output_dir, settings, restart)
    wanted = {str(file) for file in files}
    done = {path: row for path, row in earlier.items() if path in wanted and _is_current(row, output_dir)}
    dropped = [path for path in earlier if path not in wanted]
    for path in dropped:
        _remove_pictures(path, output_dir)
    write_atomically(output_dir / DIAGNOSIS, _lines(done.values()))
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
        warnings.filterwarnings("ignore", module=r"PIL\.")  # what it finds odd in a file that it can read
        warnings.simplefilter("error", Image.DecompressionBombWarning)

        def set_aside(file: Path, error: Exception) -> None:
            quarantined[str(file)] = {"path": str(file), "reason": f"{type(error).__name__}: {error}"}
            progress.update()
            progress.set_postfix(quarantined=len(quarantined))

        def diagnose(batch: list[tuple[Path, np.ndarray, os.stat_result]]) -> None:
            rows = None
            try:
                rows = _write_pictures(batch, _confidence(detector, batch, tile), output_dir, threshold, pool)
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                if len(batch) == 1:
                    set_aside(batch[0][0], error)
                    return
            except ValueError as error:  # images of one size, which this detector refuses (a strip, say)
                for file, _, _ in batch:
                    set_aside(file, error)
                return
            if rows is None:  # with the failed attempt's tensors gone
                diagnose(batch[: len(batch) // 2])
                diagnose(batch[len(batch) // 2 :])
                return
            done.update((row["path"], row) for row in rows)
            journal.write(_lines(rows))
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
    skipped = [{"path": str(path), "reason": reason} for path, reason in found.skipped]
    _write_table(output_dir / DIAGNOSIS, ROW, rows)
    _write_table(output_dir / QUARANTINE, REASON, bad)
    _write_table(output_dir / SKIPPED, REASON, skipped)
    if top_k:
        _write_table(output_dir / BEST, ("rank", *ROW), best)
    else:
        for name in (BEST, CSV[BEST]):
            (output_dir / name).unlink(missing_ok=True)
    artifacts = sum(row["artifact"] for row in rows)
    summary = {
        "found": len(found),
        "diagnosed": len(rows),
        "quarantined": len(bad),
        "skipped": len(found.skipped),
        "skipped_reasons": found.reasons(),
        "unread": len(bad) + sum(skipped.may_hide_images for skipped in found.skipped),
        "resumed": resumed,
        "dropped": len(dropped),
        "damaged_lines": damaged_lines,
        "artifacts": artifacts,
        "interval": wilson_interval(artifacts, len(rows)) if rows else None,
        "best": best,
        "report": str(output_dir / REPORT),
    }
    _write_html(output_dir, settings, summary, ranking, report_images, bad)
    return summary


def written_to(output_dir: str | os.PathLike) -> list[Path]:
    """What a diagnosis must not take for its input: the folder, and in case that is searched, what is written there."""
    output_dir = Path(output_dir)
    return [
        output_dir,
        *(output_dir / name for name in WRITTEN),
        *map(unfinished_at, (output_dir / n for n in WRITTEN)),
    ]


def _decoded(files: Sequence[Path], pool: ThreadPoolExecutor, ahead: int) -> Iterator[tuple[Path, object]]:
    """(file, (array (H, W, 3) uint8, stat) or the exception), in order, read at most `ahead` files ahead."""

    def read(file: Path):
        try:
            before = file.stat()
            array = np.asarray(read_image(file))
            if _version(file.stat()) != _version(before):
                raise OSError("it changed while it was read: run again when it is whole")
            return array, before
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


def _version(stat: os.stat_result) -> tuple:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


@torch.no_grad()
def _confidence(detector: torch.nn.Module, batch: Sequence, tile: bool) -> torch.Tensor:
    images = torch.from_numpy(np.stack([array for _, array, _ in batch])).permute(0, 3, 1, 2).float().div_(255)
    weight = next(detector.parameters(), None)
    if weight is not None:
        images = images.to(weight.device)
    maps = tiled_confidence(detector, images, detector.config.image_size) if tile else detector.confidence(images)
    if not maps.isfinite().all():
        raise ValueError("the detector gave confidences that are not numbers")
    return maps.float().cpu()


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def _write_pictures(batch: Sequence, maps: torch.Tensor, output_dir: Path, threshold: float, pool) -> list[dict]:
    """The overlay and the thumbnails of each image of the batch, in threads, and its row."""
    worst, area = max_confidence(maps).tolist(), area_ratio(maps, threshold).tolist()

    def write(index: int) -> dict:
        file, array, stat = batch[index]
        overlay, *thumbnails = _pictures(str(file), output_dir)
        heatmap = _heatmap(array, maps[index])
        with written_atomically(overlay) as unfinished:
            heatmap.save(unfinished, "JPEG", quality=92, subsampling=0)
        for thumbnail, picture in zip(thumbnails, (Image.fromarray(array), heatmap)):
            write_atomically(thumbnail, encode(picture, THUMBNAIL))
        return {
            "path": str(file),
            "max_confidence": round(worst[index], 6),
            "area_ratio": round(area[index], 6),
            "artifact": worst[index] >= threshold,
            "overlay": f"{OVERLAYS}/{overlay.name}",
            "width": array.shape[1],
            "height": array.shape[0],
            "bytes": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
        }

    return list(pool.map(write, range(len(batch))))


def _heatmap(array: np.ndarray, confidence: torch.Tensor) -> Image.Image:
    """The overlay, in bands: a hundred bytes for each pixel at once would be gigabytes for a large photo."""
    picture = Image.new("RGB", (array.shape[1], array.shape[0]))
    height = max(1, BAND_PIXELS // array.shape[1])
    for top in range(0, array.shape[0], height):
        band = slice(top, top + height)
        overlay = heatmap_overlay(to_image_tensor(array[band])[None], confidence[None, :, band])
        picture.paste(to_pil(overlay[0]), (0, top))
    return picture


def _pictures(path: str, output_dir: Path) -> tuple[Path, Path, Path]:
    """Where the overlay of an image lies, its thumbnail, and the overlay's: harmless whatever the image's name is, and others for
    each path."""
    name = f"{harmless(Path(path).stem)[:60]}-{digest(path)[:16]}"
    pictures = output_dir / PICTURES
    return output_dir / OVERLAYS / f"{name}.jpg", pictures / f"{name}.image.webp", pictures / f"{name}.overlay.webp"


def _remove_pictures(path: str, output_dir: Path) -> None:
    for picture in _pictures(path, output_dir):
        picture.unlink(missing_ok=True)


def _prepare_folder(output_dir: Path) -> None:
    try:
        for name in (OVERLAYS, PICTURES):
            (output_dir / name).mkdir(parents=True, exist_ok=True)
        probe = output_dir / ".probe.unfinished"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"The output folder {output_dir} cannot be written ({error.strerror}): choose another."
        ) from error


def _resume(output_dir: Path, settings: Mapping, restart: bool) -> tuple[dict[str, dict], int]:
    """path -> row of earlier runs with the same settings, and how many lines of their journal hold no row.

    An error if the folder holds a diagnosis with other settings.
    """
    earlier, damaged_lines = _read_rows(output_dir / DIAGNOSIS)
    known = output_dir / SETTINGS
    if restart:
        for path in earlier:
            _remove_pictures(path, output_dir)
        for name in (*CSV, *CSV.values(), REPORT):
            (output_dir / name).unlink(missing_ok=True)
        earlier, damaged_lines = {}, 0
    elif earlier:
        try:
            before = json.loads(known.read_bytes())
        except (OSError, ValueError):
            before = None
        before = before if isinstance(before, dict) else {}
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
    return earlier, damaged_lines


def _is_current(row: Mapping, output_dir: Path) -> bool:
    """The file is the one that was diagnosed, and its pictures are there."""
    try:
        stat = os.stat(row["path"])
    except (OSError, ValueError):  # a path with a NUL in it
        return False
    pictures = _pictures(row["path"], output_dir)
    same = (stat.st_size, stat.st_mtime_ns) == (row["bytes"], row["mtime_ns"])
    return same and row["overlay"] == f"{OVERLAYS}/{pictures[0].name}" and all(map(Path.is_file, pictures))


def _read_rows(path: Path) -> tuple[dict[str, dict], int]:
    """path -> row of a journal, and how many lines hold none: a killed run, or a damaged disk, leaves half lines and zeros.

    The images of such lines are simply diagnosed again.
    """
    rows, damaged = {}, 0
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n") if path.exists() else []
    for line in lines if lines != [b""] else []:
        try:
            row = json.loads(line.decode())
            os.fsencode(row["path"])  # some texts are no file's name on any disk
        except (ValueError, TypeError, KeyError, RecursionError):
            row = None
        if _is_row(row):
            rows[row["path"]] = row
        else:
            damaged += 1
    return rows, damaged


def _is_row(row: object) -> bool:
    return (
        isinstance(row, dict)
        and set(row) == set(ROW)
        and all(isinstance(row[name], kind) for name, kind in ROW.items())
        and 0 <= row["max_confidence"] <= 1
        and 0 <= row["area_ratio"] <= 1
    )


def _lines(rows: Iterable[Mapping]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _write_table(path: Path, columns: Iterable[str], rows: Sequence[Mapping]) -> None:
    """As JSON Lines, and for people as CSV."""
    write_atomically(path, _lines(rows))
    write_csv(path.with_name(CSV[path.name]), list(columns), rows)


def _write_html(
    output_dir: Path,
    settings: Mapping,
    summary: Mapping,
    ranking: Sequence[Mapping],
    most: int,
    bad: Sequence[Mapping],
):
    interval, diagnosed = summary["interval"], summary["diagnosed"]
    figures = [
        Figure(
            "Images diagnosed",
            f"{diagnosed}",
            f"{summary['found']} files found = {diagnosed} diagnosed + {summary['quarantined']} quarantined + "
            f"{summary['skipped']} skipped",
        )
    ]
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
    figures.append(Figure("Skipped", f"{summary['skipped']}", "left out by rule"))
    sections = []
    worst, top = ranking[:most], _common_folder(ranking)
    if worst:
        shown = (
            f"All {diagnosed} images" if len(worst) == diagnosed else f"The worst {len(worst)} of {diagnosed} images"
        )
        sections.append(
            Section(
                "Images",
                f"{shown}, those with the highest confidence first: the image, and the diagnosis over it. Yellow is a "
                "suspicion, magenta a certainty.",
                files=(CSV[DIAGNOSIS], DIAGNOSIS),
                gallery=_gallery(worst, "worst first", top, output_dir),
            )
        )
    if summary["best"]:
        sections.append(
            Section(
                "Cleanest",
                f"The {len(summary['best'])} images with the lowest confidence, cleanest first; at most 24 are shown.",
                files=(CSV[BEST], BEST),
                gallery=_gallery(summary["best"][:24], "cleanest first", top, output_dir),
            )
        )
    if bad:
        sections.append(
            Section(
                "Quarantined",
                f"The first {min(100, len(bad))} of {len(bad)} files that could not be diagnosed.",
                files=(CSV[QUARANTINE], QUARANTINE),
                table=Table(("file", ""), [(row["path"], row["reason"]) for row in bad[:100]]),
            )
        )
    if summary["skipped"]:
        reasons = [(reason, str(count)) for reason, count in summary["skipped_reasons"].items()]
        sections.append(
            Section(
                "Skipped",
                "What was left out by rule, and how often.",
                files=(CSV[SKIPPED], SKIPPED),
                table=Table(("rule", "files"), reasons),
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


def _common_folder(rows: Iterable[Mapping]) -> str | None:
    """The folder that all images lie in, somewhere; None where there is none, as on two drives of Windows."""
    try:
        return os.path.commonpath({os.path.dirname(row["path"]) for row in rows})
    except ValueError:
        return None


def _gallery(rows: Sequence[Mapping], order: str, top: str | None, output_dir: Path) -> Gallery:
    cards = (_card(row, top, output_dir) for row in rows)
    return Gallery(cards, ("confidence", "area"), order, "folder")


def _card(row: Mapping, top: str | None, output_dir: Path) -> Card:
    """The thumbnails of an image and its overlay, with links to both: no file is opened, there may be thousands."""
    path, size = Path(row["path"]), fitted((row["width"], row["height"]), THUMBNAIL)
    overlay, *thumbnails = (address(picture, output_dir) for picture in _pictures(row["path"], output_dir))
    fulls = (address(path, output_dir), overlay)
    return Card(
        title=path.name,
        views=[
            View(label, thumbnail, size, full)
            for label, thumbnail, full in zip(("image", "diagnosis"), thumbnails, fulls)
        ],
        numbers=(row["max_confidence"], row["area_ratio"]),
        verdict="artifact" if row["artifact"] else "clean",
        tone="bad" if row["artifact"] else "good",
        category=str(path.parent) if top is None else os.path.relpath(path.parent, top),
        note=f"maximum {row['max_confidence']:.3f}, area {100 * row['area_ratio']:.2f} %",
    )
