# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Labelling: is it whole after kills, and how fast is it?

    python benchmarks/labelling.py kills            # 20 kills of a run over 2,000 images, 100 of them broken
    python benchmarks/labelling.py speed            # against a plain loop, on the same machine and in one run
    python benchmarks/labelling.py speed --device cuda --images 4000

`kills` labels 2,000 images in 20 shards, and kills the process (SIGKILL) at random moments, half of them while a shard's files are
being written. After the last kill it may end. Compared with a run that nothing happened to: every file of the dataset, byte for byte.

`speed` gives images a second of a SegFormer-b5 with random weights at 512 pixels: `pipeline("artifact-detection")` an image at a
time, the stage in float32 and in bfloat16, decoding alone, and the network alone on a batch in memory, which is the limit.
The variants take turns over pieces of the same images; the median ratio to the plain loop counts.
"""

import argparse
import io
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from faults import forked
from PIL import Image


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # images, broken files and a detector at its smallest

from fixtures.broken_files import CONTENTS  # noqa: E402
from fixtures.rows import photo_bytes, write_rows  # noqa: E402
from fixtures.segformer import tiny_detector  # noqa: E402
from transformers import pipeline  # noqa: E402

from diffusers_diffdoctor import ArtifactDetectorConfig, ArtifactDetectorForSemanticSegmentation  # noqa: E402
from diffusers_diffdoctor.data import Label, find_shards, run_stage  # noqa: E402
from diffusers_diffdoctor.data.schema import decode_image  # noqa: E402
from diffusers_diffdoctor.files import write_atomically  # noqa: E402


IMAGES, SHARDS, BROKEN = 2000, 20, 100


# --- kills -------------------------------------------------------------------------------------------------------------------------


def make_pool(folder: Path) -> set[str]:
    """The dataset that is labelled; the names of its broken images. Among the others are CMYK, 16 bits, animations and EXIF."""
    broken, rows = set(), []
    contents = [make() for make in CONTENTS.values()]
    for i in range(IMAGES):
        name, content = f"{i:04d}", photo_bytes(i, (64, 48), ("PNG", "JPEG", "WEBP")[i % 3])
        if i % (IMAGES // BROKEN) == 7:
            content = contents[len(broken) % len(contents)]
            broken.add(name)
        elif i % 50 == 3:
            content = odd(i)
        rows.append({"image": {"bytes": content, "path": name}})
        if len(rows) == IMAGES // SHARDS:
            number = i // len(rows)
            write_rows(folder / f"train-{number:05d}-of-{SHARDS:05d}.parquet", rows)
            rows = []
    return broken


def odd(number: int) -> bytes:
    """A strange image that can be read all the same."""
    image, file = Image.open(io.BytesIO(photo_bytes(number, (64, 48)))), io.BytesIO()
    kind = number // 50 % 4
    if kind == 0:
        image.convert("CMYK").save(file, "JPEG")
    elif kind == 1:
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(file, "PNG")
    elif kind == 2:
        image.save(file, "WEBP", save_all=True, append_images=[image.rotate(90)], lossless=True)
    else:
        exif = Image.Exif()
        exif[274] = 6  # turned by a quarter
        image.save(file, "JPEG", exif=exif)
    return file.getvalue()


def label(pool: Path, detector: str, out: Path) -> None:
    torch.set_num_threads(1)
    run_stage(Label.by(detector, decoders=2), find_shards(pool), out, show_progress=False)


def wait_and_kill(child: int, out: Path, in_write: bool, draw: random.Random) -> str:
    """Kill a labelling process at a random moment: of its work, or while a shard's files are being written."""
    data, before = out / "data", len(list((out / ".diffdoctor").glob("0*.json")))
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return f"ended with {os.waitstatus_to_exitcode(status)}"
        writing = bool(list(data.glob(".*.unfinished"))) if in_write else True
        if writing and len(list((out / ".diffdoctor").glob("0*.json"))) >= before + draw.randrange(2):
            break
        time.sleep(0.0005)
    time.sleep(draw.random() * (0.02 if in_write else 0.6))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "killed while writing" if list(data.glob(".*.unfinished")) else "killed"


def kills(count: int, results: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        broken = make_pool(folder / "pool")
        tiny_detector().save_pretrained(folder / "detector")
        pool, detector = folder / "pool", str(folder / "detector")
        label(pool, detector, folder / "whole")
        draw, fates, runs = random.Random(0), [], 0
        differing = []
        while len([fate for fate in fates if fate.startswith("killed")]) < count:
            out = folder / f"run{runs}"
            runs += 1
            for number in range(5):
                child, pipe = forked(lambda tell, out=out: label(pool, detector, out))
                pipe.close()
                fates.append(wait_and_kill(child, out, number % 2 == 0, draw))
            label(pool, detector, out)
            differing += difference(folder / "whole", out)
            check_counts(out, broken)
            shutil.rmtree(out)
        result = {
            "images": IMAGES,
            "shards": SHARDS,
            "broken": len(broken),
            "runs": runs,
            "fates": {fate: fates.count(fate) for fate in sorted(set(fates))},
            "differing_files": differing,
        }
    write_atomically(results / "kills.json", json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def difference(one: Path, two: Path) -> list[str]:
    def files(top: Path) -> dict[str, bytes]:
        found = [
            path
            for pattern in ("data/*", "quarantine/*", ".diffdoctor/*.json", "stage.json")
            for path in top.glob(pattern)
        ]
        return {path.relative_to(top).as_posix(): path.read_bytes() for path in found}

    first, second = files(one), files(two)
    return [name for name in sorted({*first, *second}) if first.get(name) != second.get(name)]


def check_counts(out: Path, broken: set[str]) -> None:
    """Each image once: labelled, or in the quarantine if it is broken."""
    labelled = [row["image"]["path"] for shard in find_shards(out) for row in shard.read()]
    quarantined = [json.loads(line)["path"] for path in (out / "quarantine").iterdir() for line in path.open()]
    assert sorted(labelled + quarantined) == [f"{i:04d}" for i in range(IMAGES)], "an image is missing, or came twice"
    assert set(quarantined) == broken, set(quarantined) ^ broken


# --- speed -------------------------------------------------------------------------------------------------------------------------


def speed(images: int, device: str, side: int, results: Path, pieces: int = 3) -> None:
    with tempfile.TemporaryDirectory() as folder:
        folder, per = Path(folder), max(1, images // pieces)
        torch.manual_seed(0)
        config = ArtifactDetectorConfig()
        ArtifactDetectorForSemanticSegmentation(config).save_pretrained(folder / "detector")
        detector = str(folder / "detector")
        for piece in range(pieces):
            rows = [
                {"image": {"bytes": textured(piece * per + i, side), "path": f"{piece}-{i}.jpg"}} for i in range(per)
            ]
            write_rows(folder / f"pool{piece}.parquet", rows)
        detect = pipeline("artifact-detection", model=detector, device=device)
        variants = {
            "plain loop": lambda rows, shard, out: [detect(decode_image(row)) for row in rows],
            "stage, float32": stage_of(detector, "float32", device),
            "stage, bfloat16": stage_of(detector, "bfloat16", device),
            "decoding alone, one thread": lambda rows, shard, out: [decode_image(row) for row in rows],
        }
        rates = {name: [] for name in variants}
        for piece in range(pieces):
            (shard,) = find_shards(folder / f"pool{piece}.parquet")
            rows = list(shard.read())
            for name, run in variants.items():
                start = time.perf_counter()
                run(rows, shard, folder / f"out-{name}-{piece}")
                rates[name].append(per / (time.perf_counter() - start))
        limit = network_alone(detector, device)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    loops = rates["plain loop"]
    ratios = {name: statistics.median([a / b for a, b in zip(values, loops)]) for name, values in rates.items()}
    result = {"device": device_name(device), "side": side, "images": per * pieces, "threads": torch.get_num_threads()}
    result |= {"images_per_second": medians, "ratio_to_plain_loop": ratios, "network_alone": limit}
    result["share_of_network_alone"] = {
        precision: medians[f"stage, {precision}"] / limit[precision] for precision in ("float32", "bfloat16")
    }
    write_atomically(
        results / f"speed-{device_name(device).replace(' ', '-')}-{side}.json", json.dumps(result, indent=1) + "\n"
    )
    for name in variants:
        print(f"{name:30} {medians[name]:10.2f} images/s {ratios[name]:8.2f} x the plain loop")
    for precision, share in result["share_of_network_alone"].items():
        print(
            f"the stage in {precision} reaches {100 * share:.0f} % of the network alone ({limit[precision]:.2f} images/s)"
        )


def stage_of(detector: str, precision: str, device: str):
    stage = Label.by(detector, precision=precision, device=device, batch_size=8 if device == "cpu" else 64)
    return lambda rows, shard, out: run_stage(stage, [shard], out, show_progress=False)


@torch.inference_mode()
def network_alone(detector: str, device: str) -> dict[str, float]:
    """Images a second of the network on batches that lie in its memory."""
    rates, batch = {}, 8 if device == "cpu" else 64
    for precision in ("float32", "bfloat16"):
        model = ArtifactDetectorForSemanticSegmentation.from_pretrained(detector, dtype=getattr(torch, precision))
        model, pixels = (
            model.to(device).eval(),
            torch.randn(batch, 3, 512, 512, device=device, dtype=getattr(torch, precision)),
        )
        times = []
        for _ in range(4 if device == "cpu" else 20):
            start = time.perf_counter()
            model(pixels).logits.sum().item()
            times.append(time.perf_counter() - start)
        rates[precision] = batch / statistics.median(times[1:])
    return rates


def textured(seed: int, side: int) -> bytes:
    """A JPEG with as much detail as a photograph has: noise of all scales."""
    draw, picture = np.random.default_rng(seed), np.zeros((side, side, 3), np.float32)
    for octave in range(3, side.bit_length()):
        noise = Image.fromarray(draw.integers(0, 256, (2**octave, 2**octave, 3), dtype=np.uint8))
        picture += np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC), np.float32) / 2 ** (octave - 2)
    file = io.BytesIO()
    Image.fromarray((picture / picture.max() * 255).astype(np.uint8)).save(file, "JPEG", quality=92)
    return file.getvalue()


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "speed"))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--side", type=int, default=512, help="of the images, in pixels")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/labelling")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    if args.what == "kills":
        kills(args.kills, args.results)
    else:
        speed(args.images, args.device, args.side, args.results)


if __name__ == "__main__":
    main()
