# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor data loop` in miniature: two rounds, killed on the way, against labels that are wrong on purpose.

    python benchmarks/loop.py                   # writes runs/loop, prints the table
    python benchmarks/loop.py --kills 5         # kill -9, five times, at moments of chance

In the annotations every picture of two categories, which the renderer always draws well, is called an artifact from end to end: as if
an annotator had misunderstood. The loop has to find out that something is the matter with these categories, get more images of them,
and learn from masks of their hard cases. People are played by what is known: of rendered images the renderer's truth, of
those that the miniature's pipeline draws the judge's map. A language model is played by the grammar of captions.

Measured on fresh images of the pool's generator, rendered, whose truth is exact, and on fresh photographs.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import yaml
from diagnose_table import rows_of, write_rows
from grammar_server import grammar_server

from diffusers_diffdoctor.cli.data_loop import WAITS
from diffusers_diffdoctor.data import Photos, find_shards, load_rows, run_stage
from diffusers_diffdoctor.data.schema import encode_png
from diffusers_diffdoctor.files import digest
from diffusers_diffdoctor.images import to_image_tensor
from diffusers_diffdoctor.miniature import load
from diffusers_diffdoctor.miniature.judge import MiniatureJudge
from diffusers_diffdoctor.miniature.renderer import CATEGORIES, render, sample_scene
from diffusers_diffdoctor.ui import Queue


MISUNDERSTOOD = ("cup", "house")
SIZES = {"annotated": 900, "photos": 600, "pool": 1800, "test": 900}
STEPS = 200  # updates of a training
HARD = 120  # cases of a round
ARTIFACTS = {
    "annotated": 0.6,
    "pool": 0.4,
    "test": 0.4,
    "photos": 0.0,
}  # share of images with one, in the other categories
ALL_STEPS = 20  # at least so many steps are run in two rounds
LONGEST_LIFE = 8.0  # seconds that a step lives that is to be killed
JUDGED = 0.5  # confidence from which the judge's pixel is painted


def scenes(kind: str, count: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray, dict]]:
    """(image, map, columns) of one kind of source."""
    rng = np.random.default_rng([seed, *kind.encode()])
    for number in range(count):
        category = CATEGORIES[number % len(CATEGORIES)]
        style = {"style": "photo"} if kind == "photos" else {}
        scene = sample_scene(rng, ARTIFACTS[kind], category=category, **style)
        generator = None if kind == "photos" else "renderer"
        yield *render(scene), {"prompt": scene.caption, "category": [category], "generator": generator}


def write_world(folder: Path, sizes: dict[str, int], seed: int) -> None:
    """annotated, photos, pool, test and test-photos; nothing where they are there."""
    for name, size in sizes.items():
        write(folder / name, name, size, seed)
    write(folder / "test-photos", "photos", sizes["test"], seed + 1)
    for name in ("photos", "test-photos"):
        run_stage(Photos(), find_shards(folder / name), folder / f"{name}-checked", show_progress=False)


def write(folder: Path, kind: str, count: int, seed: int) -> None:
    if (folder / "done").exists():
        return
    found = list(scenes(kind, count, seed))
    rows = rows_of(kind, found)
    for row, (_, truth, _) in zip(rows, found):
        if kind == "annotated":
            wrong = row["category"][0] in MISUNDERSTOOD
            row |= {"artifact_map": encode_png(np.full_like(truth, 255) if wrong else truth), "source": "human"}
        elif kind == "test":
            row |= {"artifact_map": encode_png(truth), "source": "rendered"}
    write_rows(folder, rows)


def settings(world: Path, output: Path, url: str, share: float) -> dict:
    """What loop.yaml says."""
    steps = max(20, round(STEPS * share))
    return {
        "output_dir": str(output),
        "rounds": 2,
        "pool": str(world / "pool"),
        "train_dataset": [f"annotated={world}/annotated", f"photos={world}/photos-checked"],
        "eval_dataset": [f"generated={world}/test", f"photographs={world}/test-photos-checked"],
        "label": {"full_size": True, "batch_size": 100},
        "balance": {"min_images": 20},
        "prompts": {"model": "grammar", "base_url": url, "count": 20, "similarity": 1.0},
        "synthesize": {
            "pipeline": str(load("pipeline")),
            "steps": [4],
            "batch_size": 20,
            "width": 64,
            "height": 64,
            "pipeline_kwargs": {"max_sequence_length": 12},  # what it was trained with
        },
        "mine": {"count": max(12, round(HARD * share)), "batch_size": 100},
        "train": {
            "config": "small",
            "model": str(load("detector")),
            "image_size": 64,
            "max_steps": steps,
            "warmup_steps": steps // 10,
            "per_device_train_batch_size": 24,
            "augmentation": "light",
            "source_weights": {
                "annotated": 1,
                "photos": 4,
                "masks": 2,
                "pseudo": 1,
            },  # photographs are half of the draws
            "hold_out": 0.02,
            "eval_strategy": "no",
            "load_best_model_at_end": False,
            "save_steps": max(1, steps // 4),
            "dataloader_num_workers": 0,
            "use_cpu": True,
        },
    }


def paint(world: Path, folder: Path, sizes: dict[str, int], seed: int) -> None:
    """Finish every image of every queue that waits, as people would by the page."""
    truth = {f"pool-{i}": mask for i, (_, mask, _) in enumerate(scenes("pool", sizes["pool"], seed))}
    judge = MiniatureJudge.from_pretrained(load("judge")).eval()
    for mined in sorted(folder.glob("round-*/mined")):
        queue = Queue(find_shards(mined, "hard"), mined.parent / "masks", restart=True)
        try:
            while (item := queue.claim("renderer", "page-of-benchmark")) is not None:
                mask = truth.get(item["name"])
                if mask is None:
                    confidence = judge.confidence(to_image_tensor(queue.image(item["key"]))[None])[0, 0]
                    mask = (confidence >= JUDGED).numpy().astype(np.uint8) * 255
                queue.save(item["key"], item["loan"], np.where(mask >= 128, 255, 0).astype(np.uint8), "done")
        finally:
            queue.close()


def run(config: Path, output: Path, world: Path, sizes: dict[str, int], seed: int, kills: int, say=print) -> int:
    """The loop until it is done, with people; returns how often it was killed: each time within another step, after some seconds."""
    chance, killed = random.Random(seed), 0
    doomed = sorted(chance.sample(range(ALL_STEPS), kills))
    command = [sys.executable, "-m", "diffdoctor", "data", "loop", "--config", str(config)]
    begun: set[str] = set()
    while True:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        killer = None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("[round") and not line.endswith("done before\n"):
                begun.add(line.partition(": ")[0])
                if killer is None and killed < kills and len(begun) > doomed[killed]:
                    killer = threading.Timer(chance.uniform(0, LONGEST_LIFE), process.kill)
                    killer.start()
        status = process.wait()
        if killer is not None:
            killer.cancel()
        if status == -signal.SIGKILL:
            killed += 1
            say(f"kill {killed} of {kills}", flush=True)
        elif status == WAITS:
            paint(world, output, sizes, seed)
        elif status:
            raise SystemExit(f"the loop ended with status {status}")
        else:
            return killed


def content(dataset: str, split: str = "train") -> str:
    """Digest of all rows of a dataset."""
    rows = load_rows(dataset, split)
    return digest(
        json.dumps([row["prompt"], row["category"], row["generator"], row["source"]])
        + "".join(digest(row[name].tobytes()) if row.get(name) else "-" for name in ("image", "artifact_map"))
        for row in rows
    )


def datasets_of(output: Path, rounds: int = 2) -> dict[str, str]:
    """Digests of what the rounds made."""
    found = {}
    for number in range(1, rounds + 1):
        folder = output / f"round-{number}"
        found |= {f"{number}/{name}": content(str(folder / name)) for name in ("labelled", "annotated")}
        found |= {f"{number}/{split}": content(str(folder / "mined"), split) for split in ("hard", "simple")}
    return found


def main(argv: Sequence[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/loop"), help="(default: %(default)s)")
    parser.add_argument(
        "--kills", type=int, default=0, help="how often it is killed on the way (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the world and the kills (default: %(default)s)")
    parser.add_argument(
        "--share", type=float, default=1.0, help="of the images, updates and hard cases (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    sizes = {name: max(60, round(size * args.share)) for name, size in SIZES.items()}
    world, output = args.output / "world", args.output / "loop"
    start = time.perf_counter()
    write_world(world, sizes, args.seed)
    with grammar_server() as url:
        config = args.output / "loop.yaml"
        text = settings(world, output, url, args.share)
        config.write_text(yaml.safe_dump(text, sort_keys=False))
        killed = run(config, output, world, sizes, args.seed, args.kills)
    rounds = [json.loads((output / f"round-{number}/round.json").read_text()) for number in range(3)]
    result = {
        "killed": killed,
        "flagged": [one["flagged"] for one in rounds[1:]],
        "false_alarms": [one["figures"]["generated"]["all"]["false_alarms"] for one in rounds],
        "false_alarms_misunderstood": {
            name: [one["figures"]["generated"]["categories"][name]["false_alarms"] for one in rounds]
            for name in MISUNDERSTOOD
        },
        "misses": [one["figures"]["generated"]["all"]["misses"] for one in rounds],
        "datasets": datasets_of(output),
    }
    (args.output / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes")
    return result


if __name__ == "__main__":
    main()
