# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The small SegFormer of the benchmarks, from random weights to figures, in minutes on one processor."""

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from diffusers_diffdoctor.detector import (
    ArtifactDetectorConfig,
    ArtifactDetectorForSemanticSegmentation,
    ArtifactDetectorTrainer,
    ArtifactDetectorTrainingArguments,
)
from diffusers_diffdoctor.evaluation import DetectorFigures
from diffusers_diffdoctor.files import write_atomically
from diffusers_diffdoctor.miniature.muon import Muon


BATCH = 24


class Tensors(torch.utils.data.Dataset):
    """Images uint8 (N, H, W, 3) and maps uint8 (N, H, W) as the detector's input."""

    def __init__(self, images: np.ndarray, maps: np.ndarray, config: ArtifactDetectorConfig, flips: bool = False):
        self.images, self.maps, self.flips = images, maps, flips
        self.mean, self.std = (np.array(x, np.float32) for x in (config.image_mean, config.image_std))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image, artifact_map = (self.images[i].astype(np.float32) / 255 - self.mean) / self.std, self.maps[i] / 255.0
        if self.flips and torch.rand(()) < 0.5:
            image, artifact_map = image[:, ::-1], artifact_map[:, ::-1]
        return {
            "pixel_values": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
            "labels": torch.from_numpy(np.ascontiguousarray(artifact_map, dtype=np.float32))[None],
        }


def arguments(folder: str, steps: int, seed: int, **changes) -> ArtifactDetectorTrainingArguments:
    """Of a short training from random weights: the learning rate falls to nothing in the last third."""
    settings = {
        "per_device_train_batch_size": BATCH,
        "loss": "bce_dice",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": steps // 3, "warmup_type": "linear", "decay_type": "linear"},
        "warmup_steps": min(100, steps // 5),
        "logging_steps": 100,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return ArtifactDetectorTrainingArguments(output_dir=folder, max_steps=steps, seed=seed, **settings | changes)


def trained(
    images: np.ndarray, maps: np.ndarray, steps: int, seed: int, first_stride: int = 2, flips: bool = False
) -> ArtifactDetectorForSemanticSegmentation:
    """A small SegFormer with logits of a `first_stride`-th of the side, trained from random weights on images and maps of uint8."""
    torch.manual_seed(seed)
    config = ArtifactDetectorConfig(
        image_size=images.shape[1],
        strides=[first_stride, 2, 2, 2],
        patch_sizes=[7, 3, 3, 3],
        depths=[1, 1, 2, 2],
        hidden_sizes=[16, 32, 64, 128],
        num_attention_heads=[1, 2, 4, 4],
        mlp_ratios=[4, 4, 4, 4],
        decoder_hidden_size=32,
        drop_path_rate=0.0,
        classifier_dropout_prob=0.0,
    )
    model = ArtifactDetectorForSemanticSegmentation(config)
    model.apply(lambda m: m.reset_parameters() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)) else None)
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(folder, steps, seed)
        optimizer = Muon(model, args.learning_rate)
        data = Tensors(images, maps, config, flips)
        ArtifactDetectorTrainer(model, args, train_dataset=data, optimizers=(optimizer, None)).train()
    return model.eval()


@torch.no_grad()
def confidences(model: ArtifactDetectorForSemanticSegmentation, images: np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W, 3) -> (N, 1, H, W) in [0, 1]."""
    return torch.cat(
        [
            model.confidence(torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 255)
            for batch in np.array_split(images, -(-len(images) // 50))
        ]
    )


def figures(confidence: torch.Tensor, maps: np.ndarray) -> dict:
    """Those of [`DetectorFigures`] over all images."""
    counted = DetectorFigures()
    counted.update(confidence, torch.from_numpy(maps)[:, None] / 255)
    return counted.compute()["all"]


def cached(folder: Path, settings: dict, work: Callable[..., dict], *args) -> dict:
    """The cell of these settings from its file, or from `work(*args)`, which is then written."""
    name = "-".join(f"{key}{value}" if key not in ("kind", "data") else str(value) for key, value in settings.items())
    path = folder / f"{name}.json"
    if not path.exists():
        start = time.perf_counter()
        cell = {"settings": settings, "figures": work(*args), "seconds": round(time.perf_counter() - start, 1)}
        cell |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "cores": os.cpu_count()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(cell, indent=2) + "\n")
    return json.loads(path.read_text(encoding="utf-8"))
