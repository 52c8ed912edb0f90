# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""LAION's improved aesthetic predictor: a few linear layers on a CLIP's image embedding."""

import os
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoImageProcessor, CLIPModel

from ..loading import errors_named, load_state_dict
from .preprocessing import CropToSquare
from .published import load_pretrained, published_file, shape_of, take_from_published, whole
from .scorer import Scorer


WEIGHTS, FILE = "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"
CLIP = "openai/clip-vit-large-patch14"


def regression_head(width: int) -> nn.Sequential:
    """Embedding (B, width) -> (B, 1): five linear layers. Dropout, which is off, keeps the published numbers of the layers."""
    sizes = (width, 1024, 128, 64, 16, 1)
    layers = [nn.Linear(*pair) for pair in pairwise(sizes)]
    return nn.Sequential(*(module for layer in layers[:3] for module in (layer, nn.Dropout())), *layers[3:])


class AestheticReward(Scorer):
    """How much people like an image on average, from about 1 to 10: the LAION aesthetic predictor, `MLP(e / |e|)` of the embedding e
    of OpenAI's CLIP ViT-L/14. Prompts are not read.

    The predictor is under the Apache 2.0 licence, CLIP (304 M parameters here) under the MIT licence.

    Args:
        model: a [`~transformers.CLIPModel`], of which the vision half is kept. It is set to `eval()` and frozen.
        head: from embeddings (B, F) to (B, 1).
        image_processor: a [`~transformers.CLIPImageProcessor`].

    Calling it with images, float (B, 3, H, W) in [0, 1], and B prompts returns scores (B,), differentiable with respect to the
    images. As a reward ([`as_reward`]) the loss is the negative score.
    """

    __name__ = "aesthetic"
    published = (WEIGHTS, FILE)
    reads_prompts = False

    def __init__(self, model: CLIPModel, head: nn.Module, image_processor):
        super().__init__()
        self.vision, self.projection, self.head = model.vision_model, model.visual_projection, head
        self.preprocess = CropToSquare.of_processor(image_processor)
        self.freeze()

    @classmethod
    def from_pretrained(
        cls, weights: str | os.PathLike = WEIGHTS, filename: str = FILE, clip: str | os.PathLike = CLIP
    ) -> "AestheticReward":
        """From the published predictor.

        Args:
            weights: the file, such as LAION's `sac+logos+ava1-l14-linearMSE.pth`, a folder with it, or an id of the Hub.
            filename: of the file in there.
            clip: id or folder of the CLIP that it was trained on.

        Raises:
            ValueError: a file holds something else; it and the tensors that are missing, left over or of another shape are named.
            OSError: there is no such file.
        """
        path = published_file(weights, filename)
        tensors = load_state_dict(path)
        head = regression_head(shape_of(tensors, "layers.0.weight", path, 2)[1])
        take_from_published(tensors, path, {"head": (head, lambda key: (f"layers.{key}", whole))})
        model = load_pretrained(CLIPModel, clip)
        if model.config.projection_dim != head[0].in_features:
            raise ValueError(
                f"{path} reads embeddings of {head[0].in_features} numbers, but `clip` ({clip}) makes {model.config.projection_dim}."
            )
        with errors_named(clip, f"The image processor {str(clip)!r}"):
            return cls(model, head, AutoImageProcessor.from_pretrained(clip))

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        pixel_values = self.preprocess(images).to(self.projection.weight.dtype)
        embeddings = self.projection(self.vision(pixel_values=pixel_values).pooler_output)
        return self.head(F.normalize(embeddings.to(self.head[0].weight.dtype), dim=-1))[:, 0]
