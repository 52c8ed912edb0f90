# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Injection on drawings that nobody here made: hands, faces, persons and animals of Fluent Emoji (3D, MIT).

The emoji are fetched by `npm pack @lobehub/fluent-emoji-3d` into a cache that git ignores; without npm there is nothing to do. They are
chosen by the names of their code points, and split by emoji: all skin tones and genders of one are on the same side. On the training
side `data inject` makes rows of each kind, and sound rows of which some are retouched. A small detector is trained from random weights
on nothing else, and asked about untouched emoji that are held out, and about those spoiled by each kind. Then one is trained without
each kind, and asked about that kind.

Each training is a cell, a file of results; a stopped benchmark goes on where it was.

    python benchmarks/emoji.py                                      # the table of docs/source/data_inject.md
    python benchmarks/emoji.py --split development --without none
"""

import argparse
import functools
import hashlib
import json
import shutil
import subprocess
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from small_detector import cached, confidences, trained

from diffusers_diffdoctor.data import Inject, Photos, find_shards, group_files, run_stage
from diffusers_diffdoctor.data.injection import KINDS
from diffusers_diffdoctor.data.schema import decode_image, decode_map
from diffusers_diffdoctor.evaluation.metrics import wilson_interval
from diffusers_diffdoctor.images import read_image
from diffusers_diffdoctor.seeds import derive_seed


ROOT = Path(__file__).parents[1]
CACHE = ROOT / "benchmarks/.cache/emoji"
PACKAGE, VERSION = "@lobehub/fluent-emoji-3d", "1.1.0"
SIDE = 128  # pixels, of 256
TONES = range(0x1F3FB, 0x1F400)
NOT_PART_OF_A_NAME = {0xFE0F, 0x200D, 0x2640, 0x2642, *TONES}  # variation, joiner, genders, skin tones
PEOPLE = {0x1F468, 0x1F469, 0x1F9D1}  # man, woman, person: of one profession they are one emoji
SPLITS = {"report": range(5), "development": range(5, 8), "train0": range(8, 14), "train1": range(14, 20)}

ANIMALS = """ANT BADGER BAT BEAR BEAVER BEETLE BIRD BISON BLOWFISH BOAR BUG BUTTERFLY CAMEL CAT CHICK CHICKEN CHIPMUNK COCKROACH COW CRAB
CRICKET CROCODILE DEER DODO DOG DOLPHIN DOVE DRAGON DUCK EAGLE ELEPHANT FISH FLAMINGO FLY FOX FROG GIRAFFE GOAT GORILLA HAMSTER
HEDGEHOG HIPPOPOTAMUS HONEYBEE HORSE KANGAROO KOALA LEOPARD LION LIZARD LLAMA LOBSTER MAMMOTH MONKEY MOSQUITO MOUSE OCTOPUS
ORANGUTAN OTTER OWL OX PANDA PARROT PEACOCK PENGUIN PIG POODLE RABBIT RACCOON RAM RAT RHINOCEROS ROOSTER SAUROPOD SCORPION SEAL
SHARK SHEEP SKUNK SLOTH SNAIL SNAKE SPIDER SQUID SWAN T-REX TIGER TURKEY TURTLE UNICORN WHALE WOLF WORM ZEBRA""".split()
HANDS = "BACKHAND BICEPS FINGER FINGERS FIST FOOT HAND HANDS HANDSHAKE HORNS INDEX LEG PALM PALMS THUMBS".split()
PERSONS = """ADULT ANGEL BABY BICYCLIST BOY BRIDE CHILD COUPLE DANCER ELF FAIRY FAMILY FENCER GENIE GIRL GOLFER GUARDSMAN JUGGLING KISS MAGE
MAN MEN MERPERSON NINJA OFFICER PEDESTRIAN PEOPLE PERSON PRINCE PRINCESS RUNNER SHRUG SKIER SLEUTH SNOWBOARDER SUPERHERO SUPERVILLAIN
SURFER SWIMMER VAMPIRE WEIGHT WOMAN WOMEN WORKER WRESTLERS ZOMBIE""".split()
NOT_MEANT = """CARD CLOCK TREE TRAP BUTTON WEB TILE STREAMER CAKE POLE BALL NOSE MARK SIGN SYMBOL HOT BOTTLE HOLE MECHANICAL POULTRY
SILHOUETTE RACING""".split()


def fetch(cache: Path) -> Path:
    """The folder with the images, from npm's registry if they are not there."""
    folder = cache / VERSION / "package/assets"
    if not folder.is_dir():
        if shutil.which("npm") is None:
            raise SystemExit(f"Skipped: the emoji come by `npm pack {PACKAGE}`, and there is no npm here.")
        archives = cache / "archives"
        archives.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", f"{PACKAGE}@{VERSION}", "--silent", "--pack-destination", str(archives)]
        if subprocess.run(command).returncode:
            raise SystemExit(f"Skipped: `{' '.join(command)}` failed; npm's registry cannot be reached.")
        (archive,) = archives.glob("*.tgz")
        unpacked = cache / f"{VERSION}.unpacked"
        shutil.rmtree(unpacked, ignore_errors=True)
        with tarfile.open(archive) as tar:
            tar.extractall(unpacked, filter="data")
        unpacked.rename(cache / VERSION)
    return folder


def codes_of(file: Path) -> list[int]:
    return [int(code, 16) for code in file.stem.replace("_", "-").split("-")]


def category_of(codes: list[int]) -> str | None:
    """hand, face, person or animal, by the name of the first code point."""
    words = unicodedata.name(chr(codes[0]), "").replace("HAND SIGN", "HAND").replace("HANDS SIGN", "HANDS").split()
    if not words or (set(words) & set(NOT_MEANT) and not set(words) & {"THUMBS", "HORNS", "FACE"}):
        return None
    for category, names in (("animal", ANIMALS), ("face", ["FACE"]), ("person", PERSONS), ("hand", HANDS)):
        if set(words) & set(names):
            return None if "CLOCK" in words else category
    return None


def key_of(codes: list[int]) -> str:
    """What all skin tones and genders of an emoji have in common."""
    rest = [0x1F9D1 if code in PEOPLE else code for code in codes if code not in NOT_PART_OF_A_NAME]
    return "-".join(f"{code:x}" for code in rest)


def split_of(key: str) -> str:
    number = derive_seed("emoji", key) % 20
    return next(split for split, numbers in SPLITS.items() if number in numbers)


def prepare(cache: Path) -> dict[str, Path]:
    """Split -> dataset of its emoji, 128 x 128 on white, by `data photos`."""
    assets, made = fetch(cache), {split: cache / f"{SIDE}/{split}" for split in SPLITS}
    chosen: dict[str, list[tuple[Path, str]]] = {split: [] for split in SPLITS}
    pictures = cache / f"{SIDE}/pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    for file in sorted(assets.glob("*.webp")):
        codes = codes_of(file)
        category = category_of(codes)
        if category is not None:
            picture = pictures / f"{category}-{file.stem}.png"
            if not picture.exists():
                read_image(file).resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(picture)
            chosen[split_of(key_of(codes))].append((picture, f"{category}/{key_of(codes)}/{file.stem}"))
    for split, folder in made.items():
        run_stage(Photos(), group_files(chosen[split], 1.0), folder, show_progress=False)
    return made


@functools.cache
def injected(dataset: Path, part: str, settings: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images, maps and names of `dataset` after `Inject(**settings)`; kept as a dataset in the cache."""
    stage = Inject(**json.loads(settings))
    # of other code there are other images
    code = b"".join(
        path.read_bytes() for path in sorted((ROOT / "src/diffusers_diffdoctor/data/injection").glob("*.py"))
    )
    digest = hashlib.sha256(code + settings.encode()).hexdigest()[:12]
    folder = dataset.parent / "injected" / f"{dataset.name}-{part}-{digest}"
    run_stage(stage, find_shards(dataset), folder, workers=1)
    rows = [row for shard in find_shards(folder, "train") for row in shard.read()]
    if stage.share == 1:
        rows = [row for row in rows if row["injected"]]
    images = np.stack([np.asarray(decode_image(row)) for row in rows])
    maps = np.stack([np.asarray(decode_map(row, (SIDE, SIDE)).resize((SIDE, SIDE))) for row in rows])
    return images, maps, [row["image"]["path"] for row in rows]


def of_kind(dataset: Path, kind: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    settings = {"share": 1.0, "kinds": {kind: 1.0}, "counts": {"1": 1.0}, "decoys": 0.3, "seed": 1}
    return injected(dataset, kind, json.dumps(settings))


def training_data(datasets: dict[str, Path], kinds: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The emoji of one half for each kind, of the other for the next; and all of them sound twice, as they are and retouched."""
    parts = [of_kind(datasets[f"train{number % 2}"], kind)[:2] for number, kind in enumerate(KINDS) if kind in kinds]
    for half in ("train0", "train1"):
        for decoys in (0.0, 1.0):
            settings = json.dumps({"share": 0.0, "decoys": decoys, "seed": 2})
            parts.append(injected(datasets[half], f"sound-{decoys:g}", settings)[:2])
    images, maps = zip(*parts)
    return np.concatenate(images), np.concatenate(maps)


def cell(datasets: dict[str, Path], split: str, without: str, seed: int, steps: int) -> dict:
    kinds = [kind for kind in KINDS if kind != without]
    images, maps = training_data(datasets, kinds)
    model = trained(images, maps, steps, seed, flips=True)
    untouched, _, names = injected(datasets[split], "untouched", json.dumps({"share": 0.0, "decoys": 0.0}))
    found = confidences(model, untouched).amax((1, 2, 3)).numpy() >= 0.5
    result = {
        "training_images": len(images),
        "untouched": {
            "images": len(found),
            "blamed": int(found.sum()),
            "emoji": len({n.split("/")[1] for n in names}),
        },
        "untouched_by_category": {
            category: [
                int(found[[n.startswith(category) for n in names]].sum()),
                sum(n.startswith(category) for n in names),
            ]
            for category in ("hand", "face", "person", "animal")
        },
        "injected": {},
    }
    for kind in KINDS if without == "none" else [without]:
        images, maps, _ = of_kind(datasets[split], kind)
        confidence = confidences(model, images)[:, 0].numpy()
        called = confidence.max((1, 2)) >= 0.5
        highest = confidence.reshape(len(images), -1).argmax(1)
        pointed = maps.reshape(len(images), -1)[np.arange(len(images)), highest] > 0
        result["injected"][kind] = {
            "images": len(images),
            "found": int(called.sum()),
            "highest_in_mask": int((called & pointed).sum()),
        }
    return result


def show(cells: dict[str, dict]) -> str:
    whole = cells["none"]["figures"]
    blamed, total = whole["untouched"]["blamed"], whole["untouched"]["images"]
    low, high = wilson_interval(blamed, total)
    lines = [
        f"Untouched: {blamed} of {total} blamed, {100 * blamed / total:.1f} % ({100 * low:.1f} to {100 * high:.1f}).",
        "",
        "| kind | found | highest in the mask | found, never taught |",
        "|---|---|---|---|",
    ]
    sums = np.zeros(3)
    for kind, of in whole["injected"].items():
        alone = cells.get(kind, {}).get("figures", {}).get("injected", {}).get(kind)
        rate = f"{100 * alone['found'] / alone['images']:.0f} %" if alone else "-"
        shares = [
            f"{100 * part / whole_:.0f} %"
            for part, whole_ in ((of["found"], of["images"]), (of["highest_in_mask"], max(1, of["found"])))
        ]
        lines.append(f"| {kind} | {shares[0]} | {shares[1]} | {rate} |")
        sums += of["images"], of["found"], of["highest_in_mask"]
    lines.append(f"| all | {100 * sums[1] / sums[0]:.0f} % | {100 * sums[2] / sums[1]:.0f} % | |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=["report", "development"], default="report", help="the emoji asked about")
    parser.add_argument(
        "--without",
        nargs="+",
        choices=["none", *KINDS],
        default=["none", *KINDS],
        help="kinds left out, one at a time",
    )
    parser.add_argument("--seed", type=int, default=0, help="of training (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="of 24 images (default: %(default)s)")
    parser.add_argument("--cache", type=Path, default=CACHE, help="for emoji and datasets")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/emoji", help="for the cells")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    datasets, cells = prepare(args.cache), {}
    for without in args.without:
        settings = {"split": args.split, "without": without, "seed": args.seed, "steps": args.steps}
        cells[without] = cached(args.results, settings, cell, datasets, args.split, without, args.seed, args.steps)
        print(cells[without]["figures"], flush=True)
    if "none" in cells:
        print(show(cells))
    return cells


if __name__ == "__main__":
    main()
