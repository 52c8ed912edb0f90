# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Repair image files: resumable, counted, with a picture of what was done."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from ..files import LOCK, RUNNING, digest, find_images, only_run, write_atomically, written_atomically
from ..images import read_image
from ..names import harmless
from .inpainting import Repaired


REPAIRED, TABLE, QUARANTINE = "repaired", "repair.jsonl", "quarantine.jsonl"


def repair_images(
    paths: Sequence[str | os.PathLike],
    output_dir: str | os.PathLike,
    repair_one: Callable[[Image.Image], Repaired],
    settings: Mapping[str, Any],
    show_progress: bool = True,
) -> dict[str, int]:
    """Repair image files. An interrupted run goes on where it stopped.

    `output_dir` gets `repaired/NAME.png` for each image that became better, `repair.jsonl` with a row for each image (`path`,
    `before`, `after`, `tries`, `seed`, `repaired`: the file, or None where the image is to stay as it is), and `quarantine.jsonl` with what
    could not be read and why. Originals are never changed.

    Args:
        paths: image files, or folders that are searched.
        output_dir: for the results, made if it does not exist.
        repair_one: an image -> what [`repair`] makes of it.
        settings: of `repair_one`, JSON; what was made by others is made again.
        show_progress: a bar.

    Returns:
        Counts: `found` = `better` + `no_better` + `sound` + `quarantined` + `skipped`.

    Raises:
        FolderInUse: another run writes there.
    """
    output_dir = Path(output_dir)
    own = [output_dir, *(output_dir / name for name in (REPAIRED, TABLE, QUARANTINE, LOCK, RUNNING))]
    found = find_images(paths, excluded=own)
    (output_dir / REPAIRED).mkdir(parents=True, exist_ok=True)
    made_by, rows, bad = digest(json.dumps(settings, sort_keys=True)), [], []
    with only_run(output_dir):
        for path in tqdm(found.images, desc="repairing", unit="image", disable=None if show_progress else True):
            name = f"{harmless(path.stem)[:60]}-{digest(str(path))[:16]}"
            target, record = output_dir / REPAIRED / f"{name}.png", output_dir / REPAIRED / f".{name}.json"
            try:
                stat = path.stat()
                made_from = [made_by, stat.st_size, stat.st_mtime_ns]
                row = _known(record, made_from, output_dir)
                if row is None:
                    row = {"path": str(path), **_repaired(read_image(path), repair_one, target)}
                    write_atomically(record, json.dumps({"made_from": made_from, "row": row}))
                rows.append(row)
            except (OSError, ValueError) as error:
                bad.append({"path": str(path), "reason": f"{type(error).__name__}: {error}"})
        for file, lines in ((TABLE, rows), (QUARANTINE, bad)):
            write_atomically(output_dir / file, "".join(json.dumps(line) + "\n" for line in lines))
    better, sound = (
        sum(map(of, rows)) for of in (lambda row: row["repaired"] is not None, lambda row: not row["tries"])
    )
    return {
        "found": len(found),
        "better": better,
        "no_better": len(rows) - better - sound,
        "sound": sound,
        "quarantined": len(bad),
        "skipped": len(found.skipped),
    }


def _repaired(image: Image.Image, repair_one: Callable[[Image.Image], Repaired], target: Path) -> dict[str, Any]:
    done = repair_one(image)
    if done.seed is None:
        target.unlink(missing_ok=True)
    else:
        with written_atomically(target) as unfinished:
            done.image.save(unfinished, format="PNG")
    tries = [None if score == float("inf") else score for score in done.tries]
    kept = None if done.seed is None else f"{REPAIRED}/{target.name}"
    return {"before": done.before, "after": done.after, "tries": tries, "seed": done.seed, "repaired": kept}


def _known(record: Path, made_from: list, output_dir: Path) -> dict[str, Any] | None:
    """What an earlier run made of the same file with the same settings, if it is all there."""
    try:
        known = json.loads(record.read_bytes())
        row = known["row"]
        whole = known["made_from"] == made_from and (
            row["repaired"] is None or (output_dir / row["repaired"]).is_file()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return row if whole else None
