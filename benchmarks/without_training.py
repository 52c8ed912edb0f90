# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What a detector does for images without training: the best of four, guidance, repair; beside images as they come, and a treated LoRA.

On the miniature, with its prompts and seeds, all by the same detector. What became of the images is said by the judge, which none of the
ways has asked. Time is processor time for each image that is kept, in multiples of a plain one.

    python benchmarks/without_training.py                                       # three seeds of the final split
    python benchmarks/without_training.py --split development --seeds 0         # to compare settings
    python benchmarks/without_training.py --lora runs/miniature                 # also with the LoRA that `make treat` left there

Each way and seed is a cell, a file of results; a stopped benchmark goes on where it was.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import FluxInpaintPipeline, FluxPipeline
from small_detector import cached

from diffusers_diffdoctor import ArtifactDetectorForSemanticSegmentation, DifferentiableRollout
from diffusers_diffdoctor.images import to_image_tensor
from diffusers_diffdoctor.miniature import load, prompts
from diffusers_diffdoctor.miniature.judge import MiniatureJudge
from diffusers_diffdoctor.miniature.renderer import PRONE_CATEGORIES
from diffusers_diffdoctor.pictures import to_pil
from diffusers_diffdoctor.repair import DiagnosticGuidance, rank, repair
from diffusers_diffdoctor.rewards import CLIPReward
from diffusers_diffdoctor.seeds import derive_seed


ROOT = Path(__file__).parents[1]
BEST_OF = 4
STEPS = 8
PROMPTS = {"max_sequence_length": 12}  # what the miniature was trained with
Draw = Callable[[list[str], list[int]], torch.Tensor]


class Ways:
    """Each way, from prompts and seeds to images (N, 3, 64, 64) in [0, 1]."""

    def __init__(self, strength: float, repairing: dict, lora: Path | None):
        self.pipeline = FluxPipeline.from_pretrained(load("pipeline"), torch_dtype=torch.float32)
        self.inpainting = FluxInpaintPipeline.from_pipe(self.pipeline, torch_dtype=torch.float32)
        for pipeline in (self.pipeline, self.inpainting):
            pipeline.set_progress_bar_config(disable=True)
        self.detector = ArtifactDetectorForSemanticSegmentation.from_pretrained(load("detector")).eval()
        self.strength, self.repairing, self.lora = strength, repairing, lora

    def _rollout(self) -> DifferentiableRollout:
        return DifferentiableRollout(self.pipeline, num_inference_steps=STEPS, height=64, width=64, **PROMPTS)

    def plain(self, texts: list[str], seeds: list[int]) -> torch.Tensor:
        return self._rollout().generate(texts, seeds, batch_size=48)

    def treated(self, texts: list[str], seeds: list[int]) -> torch.Tensor:
        self.pipeline.load_lora_weights(self.lora)
        try:
            return self.plain(texts, seeds)
        finally:
            self.pipeline.unload_lora_weights()

    def best_of(self, texts: list[str], seeds: list[int]) -> torch.Tensor:
        """The cleanest of four by the detector, the first of which is the plain one."""
        drawn = [
            self.plain(texts, [derive_seed("best of", seed, n) if n else seed for seed in seeds])
            for n in range(BEST_OF)
        ]
        together = torch.stack(drawn, 1)
        return torch.stack([some[rank(some, self.detector)[0].index] for some in together])

    def guidance(self, texts: list[str], seeds: list[int]) -> torch.Tensor:
        return DiagnosticGuidance(self._rollout(), self.detector, self.strength).generate(texts, seeds, batch_size=48)

    def repair(self, texts: list[str], seeds: list[int]) -> torch.Tensor:
        """Of plain images; the detector judges its own work, as without a second one."""
        repaired = []
        for image, text, seed in zip(self.plain(texts, seeds), texts, seeds):
            options = {"prompt": text, "seed": seed, "steps": STEPS, "size": 64, **self.repairing}
            done = repair(to_pil(image), self.inpainting, self.detector, pipeline_kwargs=PROMPTS, **options)
            repaired.append(to_image_tensor(done.image))
        return torch.stack(repaired)


@torch.no_grad()
def cell(draw: Draw, split: str, seed: int, count: int) -> dict:
    rows = prompts(split, PRONE_CATEGORIES)
    texts = [rows[i % len(rows)]["prompt"] for i in range(count)]
    seeds = [derive_seed("without training", seed, i) for i in range(count)]
    start = time.process_time()
    images = draw(texts, seeds)
    seconds = (time.process_time() - start) / count
    judge = MiniatureJudge.from_pretrained(load("judge")).float().eval()
    detector = ArtifactDetectorForSemanticSegmentation.from_pretrained(load("detector")).eval()
    clip = CLIPReward.from_pretrained(load("clip"))
    wrong = {
        name: torch.cat([one.confidence(part).amax((1, 2, 3)) >= 0.5 for part in images.split(48)])
        .float()
        .mean()
        .item()
        for name, one in (("judge", judge), ("detector", detector))
    }
    fidelity = torch.cat([clip(part, texts[i : i + 48]) for i, part in _parts(images)]).mean().item()
    return {"images": count, "fidelity": fidelity, "seconds_per_image": seconds, **wrong}


def _parts(images: torch.Tensor):
    return ((i, images[i : i + 48]) for i in range(0, len(images), 48))


def table(cells: dict[str, list[dict]]) -> str:
    plain = cells["plain"]
    lines = ["| | judged wrong | detector says wrong | fidelity | time for an image |", "|---|---|---|---|---|"]
    for way, some in cells.items():
        judge, detector = ([100 * one["figures"][name] for one in some] for name in ("judge", "detector"))
        fidelity = statistics.mean(
            100 * (one["figures"]["fidelity"] / base["figures"]["fidelity"] - 1) for one, base in zip(some, plain)
        )
        cost = statistics.mean(
            one["figures"]["seconds_per_image"] / base["figures"]["seconds_per_image"]
            for one, base in zip(some, plain)
        )
        spread = f" ({min(judge):.1f} to {max(judge):.1f})" if len(judge) > 1 else ""
        lines.append(
            f"| {way} | {statistics.mean(judge):.1f} %{spread} | {statistics.mean(detector):.1f} % | {fidelity:+.1f} % | {cost:.1f} x |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, list[dict]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=("final", "development"), default="final", help="of the prompts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the noise (default: %(default)s)")
    parser.add_argument("--count", type=int, default=144, help="images for each way and seed (default: %(default)s)")
    parser.add_argument("--strength", type=float, default=0.1, help="of guidance (default: %(default)s)")
    parser.add_argument("--tries", type=int, default=4, help="of repair (default: %(default)s)")
    parser.add_argument("--noise", type=float, default=0.6, help="strength of repair (default: %(default)s)")
    parser.add_argument("--growth", type=float, default=0.06, help="of what repair draws anew (default: %(default)s)")
    parser.add_argument(
        "--context", type=float, default=math.inf, help="of repair, inf for all (default: %(default)s)"
    )
    parser.add_argument("--lora", type=Path, help="folder of a treated LoRA, to be compared too")
    parser.add_argument("--ways", nargs="+", default=["best_of", "guidance", "repair"], help="(default: all)")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks/results/without_training", help="for the cells"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    repairing = {"tries": args.tries, "strength": args.noise, "growth": args.growth, "context": args.context}
    ways = Ways(args.strength, repairing, args.lora)
    settings = {"guidance": {"strength": args.strength}, "repair": repairing}
    cells: dict[str, list[dict]] = {}
    for way in ["plain", *args.ways, *(["treated"] if args.lora else [])]:
        for seed in args.seeds:
            named = {"kind": way, "split": args.split, "seed": seed, "count": args.count, **settings.get(way, {})}
            cells.setdefault(way, []).append(
                cached(args.results, named, cell, getattr(ways, way), args.split, seed, args.count)
            )
            print(way, seed, cells[way][-1]["figures"], flush=True)
    print(table(cells))
    return cells


if __name__ == "__main__":
    main()
