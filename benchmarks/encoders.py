# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Which encoder learns most in the same processor time, from random weights and on a CPU?

    python benchmarks/encoders.py --seconds 120

Detectors see the same scenes of the renderer with their true maps, 4,000 of them, in batches of 24 and one thread, until their
processor time is over; the learning rate falls to nothing in the last third of it. Tested on 400 other scenes. Cross-entropy with
Dice, Muon. The miniature's SegFormer and the small ResNet of the paper's table, both with logits of half the scene's side.
"""

import argparse
import time

import numpy as np
import torch
import torch.nn.functional as F
from small_detector import new_detector as new_resnet

from diffusers_diffdoctor.detector.losses import LOSSES
from diffusers_diffdoctor.detector.modeling_artifact_detector import normalise_images
from diffusers_diffdoctor.evaluation import DetectorFigures
from diffusers_diffdoctor.miniature.build import new_detector as new_segformer
from diffusers_diffdoctor.miniature.muon import Muon
from diffusers_diffdoctor.miniature.renderer import render, sample_scene


ENCODERS = {"SegFormer": (new_segformer, 1e-3), "ResNet": (new_resnet, 2e-3)}  # with their learning rates
BATCH, WARMUP = 24, 50


def scenes(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    images, maps = zip(*(render(sample_scene(rng, 0.6, under_treatment=True)) for _ in range(count)))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.from_numpy(np.stack(maps))[:, None]


def learn(name: str, images: torch.Tensor, maps: torch.Tensor, seconds: float, seed: int):
    torch.manual_seed(seed)
    make, rate = ENCODERS[name]
    model, generator = make().train(), torch.Generator().manual_seed(seed)
    optimizer, start, step = Muon(model, rate), time.process_time(), 0
    while (share := (time.process_time() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / WARMUP, 3 * (1 - share))
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        pixels = normalise_images(images[rows].float() / 255, model.config)
        logits = F.interpolate(model(pixels).logits, size=maps.shape[-2:], mode="bilinear")
        loss = LOSSES["bce_dice"](logits, maps[rows].float() / 255).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
    return model.eval(), step


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120, help="of processor time for each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    training, test = scenes(4000, args.seed), scenes(400, args.seed + 1_000_000)
    for name in ENCODERS:
        with torch.inference_mode(False), torch.enable_grad():
            model, steps = learn(name, *training, args.seconds, args.seed)
        figures = DetectorFigures()
        for images, maps in zip(*(part.split(100) for part in test)):
            figures.update(model.confidence(images.float() / 255), maps.float() / 255)
        found = figures.compute()["all"]
        size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        print(
            f"{name}: {size:.2f} M parameters, {steps} steps, pixel AP {found['pixel_ap']:.3f}, MSE {found['mse']:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
