# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The small detector of the benchmarks, from random weights to figures, in minutes on one processor."""

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import ResNetConfig

from diffusers_diffdoctor.detector import (
    ArtifactDetectorConfig,
    ArtifactDetectorForSemanticSegmentation,
    ArtifactDetectorTrainer,
    ArtifactDetectorTrainingArguments,
)
from diffusers_diffdoctor.detector.modeling_artifact_detector import normalise_images
from diffusers_diffdoctor.evaluation import DetectorFigures
from diffusers_diffdoctor.files import write_atomically
from diffusers_diffdoctor.miniature.muon import Muon


BATCH = 24


def new_detector() -> ArtifactDetectorForSemanticSegmentation:
    """A small ResNet with SegFormer's decode head, from random weights: it learns these scenes several times faster than a
    SegFormer, which a rung's few steps would leave at "nothing anywhere". Scenes are seen at twice their size, so that the logits
    have half of it."""
    backbone = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 96, 128],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = ArtifactDetectorConfig(
        backbone_config=backbone, image_size=128, decoder_hidden_size=64, classifier_dropout_prob=0.0
    )
    return ArtifactDetectorForSemanticSegmentation(config).to(memory_format=torch.channels_last)  # a sixth faster


class Tensors(torch.utils.data.Dataset):
    """Images uint8 (N, H, W, 3) and maps uint8 (N, H, W) as the detector's input."""

    def __init__(self, images: np.ndarray, maps: np.ndarray, config: ArtifactDetectorConfig, flips: bool = False):
        self.images, self.maps, self.config, self.flips = images, maps, config, flips

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = torch.from_numpy(self.images[i]).permute(2, 0, 1)[None].float() / 255
        artifact_map = torch.from_numpy(self.maps[i])[None].float() / 255
        if self.flips and torch.rand(()) < 0.5:
            image, artifact_map = image.flip(-1), artifact_map.flip(-1)
        return {"pixel_values": normalise_images(image, self.config)[0], "labels": artifact_map}


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
    images: np.ndarray, maps: np.ndarray, steps: int, seed: int, flips: bool = False
) -> ArtifactDetectorForSemanticSegmentation:
    """The small detector, trained from random weights on images and maps of uint8."""
    torch.manual_seed(seed)
    model = new_detector()
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(folder, steps, seed, learning_rate=2e-3)
        optimizer = Muon(model, args.learning_rate)
        data = Tensors(images, maps, model.config, flips)
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
