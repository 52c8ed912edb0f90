# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""How good the miniature's parts are: what stands beside every figure that is measured with them.

diffdoctor miniature check [--folder DIR]
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline
from tqdm.auto import tqdm

from ..detector import ArtifactDetectorForSemanticSegmentation
from ..evaluation.metrics import error_rates, max_confidence, pairwise_diversity
from ..rewards import CLIPReward
from ..rollout import DifferentiableRollout
from . import WEIGHTS, prompts
from .judge import MiniatureJudge
from .renderer import CATEGORIES, PRONE_CATEGORIES, WRONG_SHARE, Scene, all_prompts, render, sample_scene


SEED = 6  # of the scenes nobody trained on
EYE_LABELS = "eye_labels.json"


@torch.no_grad()
def reproduce(vae: AutoencoderKL, images: torch.Tensor, noise: float = 0.0, batch_size: int = 25) -> torch.Tensor:
    """Images as the VAE reproduces them: how a generated image looks.

    Args:
        vae: the miniature's.
        images: uint8 (N, 3, 64, 64).
        noise: latents get noise of up to this share of their standard deviation.
        batch_size: images at once.

    Returns:
        uint8 (N, 3, 64, 64).
    """
    generator = torch.Generator().manual_seed(0)
    result = []
    for batch in tqdm(images.split(batch_size), desc="reproduce", mininterval=10):
        latents = vae.encode(batch.float() / 127.5 - 1).latent_dist.mode()
        scale = noise * torch.rand(len(batch), 1, 1, 1, generator=generator) * latents.std()
        latents = latents + scale * torch.randn(latents.shape, generator=generator)
        result.append(((vae.decode(latents).sample + 1) * 127.5).clamp(0, 255).round().to(torch.uint8))
    return torch.cat(result)


def fresh_scenes(vae: AutoencoderKL, count: int = 2000) -> tuple[list[Scene], torch.Tensor, torch.Tensor]:
    """Scenes of the prone categories that nobody trained on, half of them wrong.

    Args:
        vae: the miniature's.
        count: number of scenes.

    Returns:
        The scenes, and uint8 (N, 3, 64, 64) as rendered and as `vae` reproduces them.
    """
    rng = np.random.default_rng(SEED)
    scenes = [sample_scene(rng, 0.5, category=PRONE_CATEGORIES[i % 4]) for i in range(count)]
    images = torch.from_numpy(np.stack([render(scene)[0] for scene in scenes])).permute(0, 3, 1, 2).contiguous()
    return scenes, images, reproduce(vae, images)


@torch.no_grad()
def rates_on_scenes(confidence: Callable, scenes: list[Scene], images: torch.Tensor) -> dict:
    """Error rates on scenes whose truth is known.

    Args:
        confidence: from images (B, 3, 64, 64) in [0, 1] to artifact maps (B, 1, 64, 64): a detector's or a judge's.
        scenes: the N scenes.
        images: uint8 (N, 3, 64, 64), the scenes as generated images look, see [`fresh_scenes`].

    Returns:
        `true_positive_rate`, `false_positive_rate`, `scenes`, and `misses_by_kind` of artifact. An image counts as wrong
        from a highest confidence of 0.5.
    """
    scores = torch.cat([max_confidence(confidence(batch.float() / 255)) for batch in images.split(100)])
    rates = error_rates(scores, torch.tensor([bool(scene.artifacts) for scene in scenes]))
    misses = {}
    for kind in sorted({kind for scene in scenes for kind in scene.artifacts}):
        rows = torch.tensor([kind in scene.artifacts for scene in scenes])
        misses[kind] = (scores[rows] < 0.5).float().mean().item()
    return {
        "true_positive_rate": 1 - rates["misses"],
        "false_positive_rate": rates["false_alarms"],
        "scenes": len(scenes),
        "misses_by_kind": misses,
    }


def psnr(images: torch.Tensor, reproduced: torch.Tensor) -> float:
    """Mean peak signal-to-noise ratio, in dB, of uint8 images (N, 3, H, W) and what became of them."""
    error = (reproduced.float() - images.float()) / 255
    return (-10 * error.square().mean((1, 2, 3)).log10()).mean().item()


@torch.no_grad()
def recognise(clip: CLIPReward, images: torch.Tensor, rows: list[dict[str, str]]) -> dict[str, float]:
    """Share of `images` (B, 3, 64, 64) in [0, 1] whose category and colour are those of the nearest of all captions."""
    captions = all_prompts()
    tokens = clip.tokenizer([row["prompt"] for row in captions], padding=True, return_tensors="pt")
    texts = clip.model.get_text_features(**tokens).pooler_output
    nearest = (clip_features(clip, images) @ torch.nn.functional.normalize(texts, dim=-1).T).argmax(-1).tolist()
    return {
        key: sum(captions[i][key] == row[key] for i, row in zip(nearest, rows)) / len(rows)
        for key in ("category", "color")
    }


def pixel_features(images: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) as rows whose distance is the root mean square of the difference."""
    return images.flatten(1) / images[0].numel() ** 0.5


@torch.no_grad()
def clip_features(clip: CLIPReward, images: torch.Tensor) -> torch.Tensor:
    """Normalized image embeddings (B, F)."""
    return torch.nn.functional.normalize(clip.image_features(images), dim=-1)


def scene_diversity(clip: CLIPReward, seeds: int = 8) -> dict:
    """Diversity of rendered scenes: all of them `right`, or `wrong` as often as those the pipeline learned from.

    The prompts are the prone ones of the development split. Mistakes make scenes differ, so a treatment that did nothing but remove them would lower the diversity by as much.
    """
    result = {}
    for name, wrong_share in (("wrong", WRONG_SHARE), ("right", 0.0)):
        rng = np.random.default_rng(SEED)
        rows = [row for row in prompts("development", categories=PRONE_CATEGORIES) for _ in range(seeds)]
        drawn = [
            render(
                sample_scene(
                    rng, wrong_share, **{key: row[key] for key in ("category", "color", "background", "style")}
                )
            )
            for row in rows
        ]
        images = torch.from_numpy(np.stack([image for image, _ in drawn])).permute(0, 3, 1, 2).float() / 255
        groups = [row["prompt"] for row in rows]
        for feature, values in (("pixels", pixel_features(images)), ("CLIP", clip_features(clip, images))):
            result.setdefault(feature, {})[name] = pairwise_diversity(values, groups, distance="euclidean")
    return result


def samples(pipeline: FluxPipeline, rows: list[dict[str, str]], seed: int) -> torch.Tensor:
    """Images (B, 3, 64, 64) in [0, 1] of the rows' prompts with the seeds `seed`, `seed` + 1 and so on."""
    rollout = DifferentiableRollout(pipeline, height=64, width=64, num_inference_steps=8, max_sequence_length=12)
    return rollout.generate([row["prompt"] for row in rows], [seed + i for i in range(len(rows))], batch_size=48)


def check(folder: str | Path = WEIGHTS, seeds: int = 2, scenes: int = 2000) -> dict:
    """Measure the parts in `folder`: VAE, recognisability of the pipeline's samples, their artifacts, judge and detector.

    Args:
        folder: holds the parts, as `build` leaves them.
        seeds: samples for each prompt of the development split.
        scenes: fresh scenes for the VAE and the error rates.
    """
    folder = Path(folder)
    pipeline = FluxPipeline.from_pretrained(folder / "pipeline", torch_dtype=torch.float32)
    judge = MiniatureJudge.from_pretrained(folder / "judge").float().eval()
    detector = ArtifactDetectorForSemanticSegmentation.from_pretrained(folder / "detector").float().eval()
    clip = CLIPReward.from_pretrained(folder / "clip")
    rows = prompts("development") * seeds
    images = samples(pipeline, rows, seed=5000)
    drawn, rendered, reproduced = fresh_scenes(pipeline.vae, scenes)
    result = {
        "vae_psnr": psnr(rendered, reproduced),
        "samples": len(rows),
        "recognised": recognise(clip, images, rows),
        "fidelity": clip(images, [row["prompt"] for row in rows]).mean().item(),
        "diversity_of_scenes": scene_diversity(clip),
    }
    with torch.no_grad():
        for name, confidence in (("judge", judge.confidence), ("detector", detector.confidence)):
            found = torch.cat([max_confidence(confidence(batch)) >= 0.5 for batch in images.split(100)]).float()
            result[name] = {
                "on_scenes": rates_on_scenes(confidence, drawn, reproduced),
                "artifact_frequency": {
                    category: found[[row["category"] == category for row in rows]].mean().item()
                    for category in CATEGORIES
                },
            }
            if (folder / EYE_LABELS).exists():
                result[name]["on_samples"] = rates_on_samples(confidence, pipeline, folder)
    return result


@torch.no_grad()
def rates_on_samples(confidence: Callable, pipeline: FluxPipeline, folder: Path) -> dict:
    """Error rates on samples of the untreated pipeline that a person labelled; see `eye_labels.json` beside the parts."""
    labels = json.loads((folder / EYE_LABELS).read_text())
    rows = prompts("development", categories=PRONE_CATEGORIES)[: len(labels["wrong"])]
    scores = max_confidence(confidence(samples(pipeline, rows, labels["seed"])))
    rates = error_rates(scores, torch.tensor(labels["wrong"], dtype=torch.bool))
    return {
        "true_positive_rate": 1 - rates["misses"],
        "false_positive_rate": rates["false_alarms"],
        "samples": len(rows),
        "wrong": sum(labels["wrong"]),
    }
