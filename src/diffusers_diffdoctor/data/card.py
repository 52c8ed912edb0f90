# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The dataset card, and the way to the Hub."""

import json
import os
from pathlib import Path
from typing import Any

import yaml

from ..files import write_atomically
from ..names import markdown


SIZES = {
    10**3: "n<1K",
    10**4: "1K<n<10K",
    10**5: "10K<n<100K",
    10**6: "100K<n<1M",
    10**7: "1M<n<10M",
    10**8: "10M<n<100M",
}
NOT_UPLOADED = (".diffdoctor/**", ".diffdoctor*", "quarantine/**", "stage.json", "**/.*.unfinished/**")
MOST_LINES = 30  # of a table

CARD = """---
{metadata}---

# Artifact maps

Images and, for each pixel, how certain it is that it belongs to an artifact: a deformed hand, a sixth finger, a melted face.
Data for artifact detectors, made by the stage `{stage}` of `diffusers-diffdoctor`.

{tables}
## Columns

| column | |
|---|---|
| `image` | the image |
| `artifact_map` | 8-bit gray, 255 = certainly an artifact, 0 = sound; of the image's size, or of a quarter of its side. Missing where the image is not labelled |
| `ignore_map` | where there is one: 8-bit gray, 255 = the pixel does not count |
| `prompt` | what the generator was asked for |
| `category` | what is in the image, any number of names |
| `generator` | id of the model that made the image |
| `source` | human (masks that people painted), photo (photographs, zero everywhere), pseudo (a detector's own labels), injected (sound images that were corrupted on purpose) or rendered (drawn by something that knows its mistakes) |

```python
from datasets import load_dataset

rows = load_dataset({name}, split="{split}")
```

## Limits

Labels of the sources `pseudo` and `injected` are no person's judgement. A licence is not stated here: it follows from that of
the images and of the generators.

## How it was made

```json
{settings}
```
"""


def write_card(
    folder: str | os.PathLike, plan: dict[str, Any], counts: dict[str, Any], name: str | None = None
) -> Path:
    """Write README.md of a finished dataset.

    Args:
        folder: of the dataset.
        plan: the stage and its settings, without local paths.
        counts: of [`run_stage`].
        name: what to load it by; the name of its folder without it.
    """
    folder = Path(folder)
    rows, splits = sum(counts["rows_out"].values()), [split for split, n in counts["rows_out"].items() if n]
    size = next((label for most, label in SIZES.items() if rows < most), "100M<n<1B")
    # No `configs`: the files' names say the splits, and with one named here `datasets` would take its cached copy of any folder of
    # this name, whatever lies in it.
    metadata = {
        "task_categories": ["image-segmentation"],
        "tags": ["diffusers-diffdoctor", "artifact-detection"],
        "size_categories": [size],
    }
    tables = "".join(
        _table(title, _counted(counts["facts"], kind))
        for title, kind in (
            ("Rows", "split"),
            ("Sources", "source"),
            ("Generators", "generator"),
            ("Categories", "category"),
        )
    )
    tables += _table(
        "Left out", counts["quarantined"] | ({"by rule": counts["left_out"]} if counts["left_out"] else {})
    )
    card = CARD.format(
        metadata=yaml.safe_dump(metadata, sort_keys=False),
        stage=plan["stage"],
        tables=tables,
        name=json.dumps(name or folder.resolve().name),
        split=splits[0] if splits else "train",
        settings=json.dumps({"stage": plan["stage"], **plan["settings"]}, indent=2).replace("`", "'"),
    )
    return write_atomically(folder / "README.md", card)


def _counted(facts: dict[str, int], kind: str) -> dict[str, int]:
    return {key.split("/", 1)[1]: count for key, count in facts.items() if key.startswith(f"{kind}/")}


def _table(title: str, counts: dict[str, int]) -> str:
    """A Markdown table, the largest count first; nothing without counts."""
    if not counts:
        return ""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    lines = [f"| {markdown(name[:120])} | {count} |" for name, count in ordered[:MOST_LINES]]
    if len(ordered) > MOST_LINES:
        lines.append(f"| {len(ordered) - MOST_LINES} others | {sum(count for _, count in ordered[MOST_LINES:])} |")
    return f"| {title} | |\n|---|---|\n" + "\n".join(lines) + "\n\n"


def push_dataset(
    folder: str | os.PathLike, repo_id: str, *, private: bool | None = None, token: str | None = None
) -> str:
    """Upload the dataset that a stage has written: its shards and its card. Files that are there already are not sent again.

    Args:
        folder: of a finished stage.
        repo_id: of a dataset repository, which is created where it does not exist.
        private: whether a repository that is created is private.
        token: that may write to it; without one that of the machine.

    Returns:
        The address of the dataset.

    Raises:
        ValueError: the folder holds no finished stage.
    """
    from huggingface_hub import HfApi

    folder = Path(folder)
    try:
        plan = json.loads((folder / "stage.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        plan = None
    if not isinstance(plan, dict) or plan.get("counts") is None:
        raise ValueError(f"{str(folder)!r} holds no finished stage: run its command again, then push.")
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
    api.upload_folder(
        repo_id=repo_id,
        repo_type="dataset",
        folder_path=folder,
        commit_message=f"Upload {sum(plan['counts']['rows_out'].values())} rows of the stage {plan['stage']}",
        ignore_patterns=list(NOT_UPLOADED),
    )
    return f"{api.endpoint}/datasets/{repo_id}"
