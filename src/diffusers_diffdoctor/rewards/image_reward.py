# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""ImageReward: a BLIP whose text encoder looks at the image, and a head that learned from ranked images."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BlipVisionModel
from transformers.initialization import no_init_weights
from transformers.models.blip.configuration_blip import BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip_text import BlipTextModel

from ..loading import load_state_dict
from .aesthetic import regression_head
from .preprocessing import CropToSquare
from .published import (
    count_of,
    load_tokenizer,
    published_file,
    shape_of,
    square_side,
    take_from_published,
    whole,
)
from .scorer import Scorer


WEIGHTS, FILE, TEXT_CONFIG = "zai-org/ImageReward", "ImageReward.pt", "med_config.json"
TOKENIZER = "google-bert/bert-base-uncased"
VISION_HEADS = 16  # of ViT-L/16; no tensor tells
MOST_TOKENS = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's output, over the authors' data

# ours -> BLIP's own
NAMES = (
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding", "pos_embed"),
    ("embeddings.patch_embedding.", "patch_embed.proj."),
    ("encoder.layers.", "blocks."),
    ("post_layernorm.", "norm."),
    (".layer_norm1.", ".norm1."),
    (".layer_norm2.", ".norm2."),
    (".self_attn.qkv.", ".attn.qkv."),
    (".self_attn.projection.", ".attn.proj."),
)
# of BLIP's contrastive loss, and a constant: the original loads them too, and does not use them
UNUSED = (
    r"blip\.(vision|text)_proj\.(weight|bias)",
    r"blip\.text_encoder\.embeddings\.position_ids",
)
TEXT_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)


class ImageRewardReward(Scorer):
    """Alignment, fidelity and harmlessness in one number, by ImageReward (arXiv 2304.05977): `(MLP(h) - mean) / std`, h the first
    output of a BERT that reads the prompt (35 tokens at most) and attends to a ViT-L's view of the image.

    Scores have about mean 0 and standard deviation 1 over the authors' data. The published weights (447 M parameters) are under
    the Apache 2.0 licence.

    Args:
        vision: a [`~transformers.BlipVisionModel`].
        text: a `BlipTextModel` that cross-attends to it.
        head: from (B, F) to (B, 1).
        tokenizer: of BERT.

    Calling it with images, float (B, 3, H, W) in [0, 1], and B prompts returns scores (B,), differentiable with respect to the
    images. As a reward ([`as_reward`]) the loss is the negative score.
    """

    __name__ = "image_reward"
    published = (WEIGHTS, FILE)

    def __init__(self, vision: BlipVisionModel, text: BlipTextModel, head: nn.Module, tokenizer: Callable):
        super().__init__()
        self.vision, self.text, self.head, self.tokenizer = vision, text, head, tokenizer
        side = vision.config.image_size
        self.preprocess = CropToSquare(side, (side, side), torchvision=True)
        self.freeze()

    @classmethod
    def from_pretrained(
        cls,
        weights: str | os.PathLike = WEIGHTS,
        filename: str = FILE,
        text_config: str | os.PathLike | None = None,
        tokenizer: str | os.PathLike | None = None,
    ) -> "ImageRewardReward":
        """From the published checkpoint.

        Args:
            weights: the file, a folder with it, or an id of the Hub.
            filename: of the file in there.
            text_config: path of `med_config.json`, the sizes of the text encoder; by default the one beside the weights.
            tokenizer: id or folder; the one beside the weights where there is one, else `google-bert/bert-base-uncased`.

        Raises:
            ValueError: a file holds something else; it and the tensors that are missing, left over or of another shape are named.
            OSError: there is no such file.
        """
        path = published_file(weights, filename)
        tensors = load_state_dict(path)
        if text_config is None:
            text_config = published_file(path.parent if Path(weights).exists() else weights, TEXT_CONFIG)
        vision_config = _vision_config(tensors, path)
        with no_init_weights():  # they are all replaced
            vision = BlipVisionModel(vision_config)
            text = BlipTextModel(_text_config(Path(text_config), vision_config.hidden_size), add_pooling_layer=False)
        head = regression_head(text.config.hidden_size)
        parts: dict[str, Any] = {
            "vision": (vision, _vision_source),
            "text": (text, lambda key: (f"blip.text_encoder.{key}", whole)),
            "head": (head, lambda key: (f"mlp.layers.{key}", whole)),
        }
        take_from_published(tensors, path, parts, UNUSED)
        return cls(vision, text, head, load_tokenizer(tokenizer, weights, TOKENIZER))

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        seen = self.vision(pixel_values=self.preprocess(images).to(self.vision.dtype)).last_hidden_state
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=MOST_TOKENS, return_tensors="pt"
        ).to(images.device)
        read = self.text(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=seen,
            is_decoder=False,
        ).last_hidden_state
        return (self.head(read[:, 0].float())[:, 0] - MEAN) / STD


def _vision_source(key: str) -> tuple[str, Callable[[torch.Tensor], torch.Tensor]]:
    for ours, theirs in NAMES:
        key = key.replace(ours, theirs)
    return f"blip.visual_encoder.{key}", whole


def _vision_config(tensors: Mapping[str, torch.Tensor], path: Path) -> BlipVisionConfig:
    prefix = "blip.visual_encoder."
    _, positions, width = shape_of(tensors, f"{prefix}pos_embed", path, 3)
    patch = shape_of(tensors, f"{prefix}patch_embed.proj.weight", path, 4)[-1]
    if width % VISION_HEADS:
        raise ValueError(f"{path} has a width of {width}, which {VISION_HEADS} heads cannot share: it is no ViT-L/16.")
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=shape_of(tensors, f"{prefix}blocks.0.mlp.fc1.weight", path, 2)[0],
        num_hidden_layers=count_of(tensors, r"blip\.visual_encoder\.blocks\.(\d+)\."),
        num_attention_heads=VISION_HEADS,
        patch_size=patch,
        image_size=patch * square_side(positions - 1, path),
        layer_norm_eps=1e-6,
    )


def _text_config(path: Path, vision_width: int) -> BlipTextConfig:
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        sizes = {name: int(given[name]) for name in TEXT_SIZES}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{path} is no description of a BERT: it must be JSON with {', '.join(TEXT_SIZES)} ({type(error).__name__}: {error})."
        ) from error
    return BlipTextConfig(**sizes, encoder_hidden_size=vision_width, layer_norm_eps=1e-12, hidden_act="gelu")
