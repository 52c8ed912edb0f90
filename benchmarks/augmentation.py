# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What augmentation costs, beside decoding the image that it is done to: each part, each preset, and a row's whole way.

    python benchmarks/augmentation.py
    python benchmarks/augmentation.py --side 1024        # images larger than the detector sees them

Seconds of one thread on the processor, not of the clock. All variants take turns over the same JPEGs, image by image. A part is
measured where it happens (its probability is 1), a preset as it is drawn. "Decoding" is from the bytes of a JPEG to a tensor of floats;
"prepared" is a row's whole way through the collator: decoding, the map, the size, the augmentation and the normalisation.
"""

import argparse
import io
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from labelling import textured
from PIL import Image

from diffusers_diffdoctor import ArtifactDetectorConfig
from diffusers_diffdoctor.detector import ArtifactDetectorCollator
from diffusers_diffdoctor.detector.augmentation import PRESETS, Augmentation, from_picture
from diffusers_diffdoctor.detector.sampling import DRAW, Draw
from diffusers_diffdoctor.files import write_atomically
from diffusers_diffdoctor.images import read_image


RESULTS = Path(__file__).parent / "results/augmentation"
SIDE = 512  # at which the detector sees images
PARTS = {
    "mirror": {"flip_probability": 1.0},
    "scale, turn, shift": {"move_probability": 1.0},
    "reduce and pad": {"shrink_probability": 1.0},
    "colour": {"color_probability": 1.0},
    "blur": {"blur_probability": 1.0},
    "noise": {"noise_probability": 1.0},
    "resample": {"resample_probability": 1.0},
    "JPEG": {"jpeg_probability": 1.0},
    "WebP": {"webp_probability": 1.0},
}


def measure(side: int, images: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant, image by image."""
    torch.set_num_threads(1)
    contents = [textured(seed, side) for seed in range(images)]
    decoded = [from_picture(read_image(io.BytesIO(textured(seed, SIDE)))) for seed in range(images)]
    artifact_map = torch.zeros(1, SIDE, SIDE)
    quarter = Image.fromarray(np.zeros((-(-side // 4),) * 2, np.uint8))
    config = ArtifactDetectorConfig(image_size=SIDE)

    def augmented(augmentation: Augmentation):
        return lambda i, n: augmentation(decoded[i], artifact_map, torch.Generator().manual_seed(n))

    def prepared(augmentation: Augmentation):
        collate = ArtifactDetectorCollator(config, augmentation)
        return lambda i, n: collate([{"image": io.BytesIO(contents[i]), "artifact_map": quarter, DRAW: Draw(0, n, i)}])

    presets = {**PRESETS, "strong, dynamic": Augmentation.preset("strong", shrink_probability=0.5)}
    variants = {
        "decoding": lambda i, n: from_picture(read_image(io.BytesIO(contents[i]))),
        **{name: augmented(Augmentation(**fields)) for name, fields in PARTS.items()},
        **{f"preset {name}": augmented(preset) for name, preset in presets.items() if name != "none"},
        **{f"prepared, {name}": prepared(preset) for name, preset in presets.items()},
    }
    times = {name: [] for name in variants}
    for n in range(-images, images * rounds):  # the first ones warm up
        for name, run in variants.items():
            start = time.thread_time()
            run(n % images, n + images)
            if n >= 0:
                times[name].append(time.thread_time() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=SIDE, help="of the images, in pixels")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    times = measure(args.side, args.images, args.rounds)
    # not medians: a preset is cheap for most images and expensive for some
    means = {name: statistics.fmean(values) for name, values in times.items()}
    ratios = {name: mean / means["decoding"] for name, mean in means.items()}
    result = {
        "side": args.side,
        "draws": args.images * args.rounds,
        "ratio_to_decoding": {name: round(ratio, 2) for name, ratio in ratios.items()},
        "images_per_second_and_core": {name: round(1 / mean, 1) for name, mean in means.items()},
    }
    args.results.mkdir(parents=True, exist_ok=True)
    write_atomically(args.results / f"{args.side}.json", json.dumps(result, indent=1) + "\n")
    for name, ratio in ratios.items():
        print(f"{name:26} {ratio:6.2f} x decoding {1 / means[name]:10.1f} images/s and core")


if __name__ == "__main__":
    main()
