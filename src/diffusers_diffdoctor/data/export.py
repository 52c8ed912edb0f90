# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""A dataset as a folder that a team loads into Label Studio, corrects there, and imports again.

    FOLDER/tasks.json        the tasks: where an image is, what is known of it, and its masks as brushes
    FOLDER/config.xml        the labels that they have
    FOLDER/images/           the images
    FOLDER/quarantine.jsonl  the rows that became no task, each with its reason
    FOLDER/README.md         how to load them

The masks of people become annotations, all others predictions, which an annotator may take over.
"""

import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

import numpy as np
import pyarrow.parquet as pq
from datasets import Features, Value
from PIL import Image

from ..disk import disk_errors_named
from ..files import LOCK, RUNNING, digest, only_run, write_atomically, written_atomically
from ..images import IMAGE_FORMATS
from .brushes import encode_brush
from .schema import Row, decode_ignore_map, decode_image, decode_map, encode_png
from .shards import Quarantined, Shard
from .stage import DATA, MARKERS, PLAN, QUARANTINE, REMEDY, Result, Stage, row_name, run_stage


TASKS, CONFIG, IMAGES, REJECTED, HELP = "tasks.json", "config.xml", "images", "quarantine.jsonl", "README.md"
WORK = "tasks"  # in the folder of the markers: the tasks of each shard
ARTIFACT, UNSURE = "artifact", "unsure"  # labels
BRUSH, PICTURE = "artifacts", "image"  # what the configuration calls the brushes, and the image
SHOWN = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "BMP": "bmp"}  # formats that a browser shows, and their ends
OWN_NAME = re.compile(r"\d{8}-[0-9a-f]{16}\.\w+")
KINDS = ("annotations", "predictions")


@dataclass(frozen=True)
class LabelStudioTasks(Stage):
    """Rows become tasks of Label Studio, whose images are written into a folder.

    Args:
        image_prefix: what stands before the name of an image's file in a task.
        threshold: confidence in (0, 1] from which a pixel of a soft map is covered: brushes cover, or do not.
        folder: of the images.
    """

    image_prefix: str
    threshold: float = 0.5
    folder: str = field(default=".", compare=False)

    name: ClassVar[str] = "export label-studio"

    def __post_init__(self):
        if not 0 < self.threshold <= 1:
            raise ValueError(f"`threshold` must lie in (0, 1], found {self.threshold}.")
        if not self.image_prefix.endswith(("/", "=")):
            raise ValueError(
                "`image_prefix` stands before the name of a file and must end in a slash, such as "
                f"https://example.com/images/; found {self.image_prefix!r:.200}."
            )

    def features(self, shard: Shard) -> Features:
        return Features({name: Value("string") for name in ("file", "kind", "task")})

    def process(self, rows: Iterator[Row], shard: Shard) -> Iterator[Result]:
        Path(self.folder).mkdir(exist_ok=True)
        for number, row in enumerate(rows, shard.first):
            try:
                image = decode_image(row)
                regions = self.regions(row, image.size)
            except Exception as error:  # decoders raise many types; one bad file must not stop the rest
                yield Quarantined(row_name(row), str(error) or type(error).__name__)
                continue
            content, suffix = _shown(row, image)
            # the number keeps order; the digest keeps a mask from an image of another dataset
            file = f"{number:08d}-{digest(row['image']['bytes'])[:16]}.{suffix}"
            write_atomically(Path(self.folder, file), content)
            data = {PICTURE: self.image_prefix + file, "name": row_name(row) or "", "category": row["category"]}
            data |= {name: row[name] or "" for name in ("prompt", "generator", "source")}
            task: dict[str, Any] = {"data": data}
            kind = None if regions is None else "annotations" if row["source"] == "human" else "predictions"
            if kind == "annotations":
                task[kind] = [{"result": regions}]
            elif kind == "predictions":
                task[kind] = [{"result": regions, "model_version": row["source"] or "unknown"}]
            yield {**row, "file": file, "kind": kind, "task": json.dumps(task, ensure_ascii=False)}

    def regions(self, row: Row, size: tuple[int, int]) -> list[dict[str, Any]] | None:
        """What is painted on the image of a row, of `size` (width, height), as Label Studio has it; None where it has no label."""
        found, unsure = decode_map(row, size), decode_ignore_map(row, size)
        if found is None:
            return None
        confidence = np.asarray(found if found.size == size else found.resize(size, Image.Resampling.BILINEAR))
        covered, regions = confidence >= self.threshold * 255, []
        if unsure is not None:
            ignored = np.asarray(unsure if unsure.size == size else unsure.resize(size, Image.Resampling.NEAREST)) > 0
            covered, regions = covered & ~ignored, _region(ignored, UNSURE)
        return [*_region(covered, ARTIFACT), *regions]


def _region(mask: np.ndarray, label: str) -> list[dict[str, Any]]:
    """The brush of a mask; none where it covers nothing."""
    if not mask.any():
        return []
    height, width = mask.shape
    return [
        {
            "id": label,
            "type": "brushlabels",
            "from_name": BRUSH,
            "to_name": PICTURE,
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "value": {"format": "rle", "rle": encode_brush(mask), "brushlabels": [label]},
        }
    ]


def _shown(row: Row, image: Image.Image) -> tuple[bytes, str]:
    """(content, end of the name) of a file that browsers show: that of the row, where it is of such a format."""
    content = row["image"]["bytes"]
    with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as file:
        suffix = SHOWN.get(file.format)
    return (content, suffix) if suffix else (encode_png(np.asarray(image))["bytes"], "png")


def export_label_studio(
    shards: Sequence[Shard],
    output_dir: str | os.PathLike,
    *,
    threshold: float = 0.5,
    image_prefix: str | None = None,
    workers: int = 1,
    restart: bool = False,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Write a folder that Label Studio loads. Stopped, it goes on where it was when it is called again.

    Args:
        shards: of one dataset.
        output_dir: the folder.
        threshold: confidence in (0, 1] from which a pixel of a soft map is covered.
        image_prefix: what stands before the name of an image's file in the tasks, such as https://example.com/images/; without it
            the images are local files of Label Studio, whose document root is the folder that `output_dir` lies in.
        workers: processes.
        restart: replace an export of another dataset, or one with other settings.
        show_progress: rows, as a bar.

    Returns:
        The counts of [`run_stage`], and of the tasks: those with `annotations` (masks of people), with `predictions` (other masks),
        and `unlabelled` ones.

    Raises:
        ValueError: an argument out of range, the folder holds another export (it is named how they differ), or files that no export
            has written, or files of it were removed.
        FolderInUse: another process writes into the folder.
        OSError: the disk is full; what is done is kept.
    """
    output_dir = Path(output_dir)
    prefix = (
        f"/data/local-files/?d={quote(output_dir.resolve().name)}/{IMAGES}/" if image_prefix is None else image_prefix
    )
    stage = LabelStudioTasks(prefix, threshold, str(output_dir / IMAGES))
    work = output_dir / MARKERS / WORK
    with only_run(output_dir), disk_errors_named(output_dir, REMEDY):
        found = [path.name for path in output_dir.iterdir() if path.name not in (MARKERS, LOCK, RUNNING)]
        if found and not (work / PLAN).is_file():
            raise ValueError(
                f"{str(output_dir)!r} holds {found[0]!r}, which no export has written. Choose an empty folder."
            )
        if restart:
            (output_dir / TASKS).unlink(
                missing_ok=True
            )  # so that nobody loads them with the images of another dataset
        counts = run_stage(stage, shards, work, workers=workers, restart=restart, show_progress=show_progress)
        tasks = _write_tasks(output_dir, work)
        lines = [file.read_text(encoding="utf-8") for file in sorted((work / QUARANTINE).glob("*.jsonl"))]
        write_atomically(output_dir / REJECTED, "".join(lines))
        write_atomically(output_dir / CONFIG, CONFIGURATION)
        write_atomically(output_dir / HELP, _help(output_dir.resolve().name, image_prefix, tasks))
    return counts | tasks


def _write_tasks(output_dir: Path, work: Path) -> dict[str, int]:
    """tasks.json, of all shards; and nothing but their images stays. Returns how many there are of each kind."""
    there = {path.name for path in (output_dir / IMAGES).iterdir() if OWN_NAME.fullmatch(path.name)}
    tally: Counter = Counter(dict.fromkeys((*KINDS, "unlabelled"), 0))
    missing, count = [], 0
    with written_atomically(output_dir / TASKS) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        file.write("[")
        for shard in sorted((work / DATA).glob("*.parquet")):
            with pq.ParquetFile(shard) as parquet:
                for row in (row for batch in parquet.iter_batches(100) for row in batch.to_pylist()):
                    file.write(f"{',' * (count > 0)}\n{row['task']}")
                    tally[row["kind"] or "unlabelled"] += 1
                    count += 1
                    if row["file"] in there:
                        there.remove(row["file"])
                    else:
                        missing.append(row["file"])
        file.write("\n]\n")
        if missing:
            raise ValueError(
                f"{len(missing)} images were removed from {str(output_dir / IMAGES)!r}, {missing[0]} among them: write all anew "
                "by restart (--restart)."
            )
    for name in there:  # of what was there before a restart
        (output_dir / IMAGES / name).unlink()
    return dict(tally)


CONFIGURATION = f"""<View>
  <Header value="$prompt"/>
  <Image name="{PICTURE}" value="${PICTURE}" zoom="true" zoomControl="true"/>
  <BrushLabels name="{BRUSH}" toName="{PICTURE}">
    <Label value="{ARTIFACT}" background="#e6007a"/>
    <Label value="{UNSURE}" background="#ffb000"/>
  </BrushLabels>
</View>
"""


def _help(name: str, image_prefix: str | None, tasks: dict[str, int]) -> str:
    if image_prefix is None:
        images = f"""Let Label Studio serve this folder's images. Start it with

       LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true
       LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT=/the/folder/that/{name}/lies/in

   and add a source storage "Local files" with the path of the folder `{IMAGES}` in the project's settings. Do not synchronise it:
   the tasks name the files. If this folder gets another name, export anew."""
    else:
        images = f"Put the files of `{IMAGES}` where the tasks look for them: `{image_prefix}`."
    return f"""# {tasks["annotations"]} annotated, {tasks["predictions"]} predicted, {tasks["unlabelled"]} unlabelled tasks

1. Create a project in Label Studio and paste `{CONFIG}` as the code of its labeling interface.
2. {images}
3. Import `{TASKS}`.

Masks of people are annotations, all others predictions: an annotator takes one over and corrects it. `{ARTIFACT}` is what is wrong,
`{UNSURE}` does not count. What became no task is in `{REJECTED}`, with the reason.

When it is done, export the project as JSON, not as JSON-MIN, and make a dataset of it:

    diffdoctor data import label-studio export.json --images {IMAGES} --labels {ARTIFACT} --ignore-labels {UNSURE} -o corrected

Tasks that nobody has annotated are quarantined then; with `--predictions` their predictions are taken, as rows of the source
"pseudo".
"""
