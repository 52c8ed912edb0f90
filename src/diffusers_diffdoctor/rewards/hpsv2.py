# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Human Preference Score v2 and v2.1: an open_clip ViT-H/14 that learned what people prefer."""

import os
from collections.abc import Callable, Mapping

import torch
from transformers import CLIPConfig, CLIPModel
from transformers.initialization import no_init_weights

from ..loading import load_state_dict
from .clip import CLIPScorer
from .preprocessing import PadToSquare
from .published import (
    count_of,
    load_tokenizer,
    published_file,
    shape_of,
    square_side,
    take_from_published,
    third,
    transposed,
    whole,
)


WEIGHTS, FILE = "xswu/HPSv2", "HPS_v2.1_compressed.pt"
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
HEADS = 16  # of ViT-H/14, in both towers; no tensor tells

# ours -> open_clip's, in this order
NAMES = (
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight"),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),
    ("vision_model.post_layernorm.", "visual.ln_post."),
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
    ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.encoder.layers.", "transformer.resblocks."),
    ("text_model.final_layer_norm.", "ln_final."),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
    (".self_attn.out_proj.", ".attn.out_proj."),
)
PROJECTIONS = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}


class HPSv2Reward(CLIPScorer):
    """What people prefer, by the Human Preference Score v2 (arXiv 2306.09341): `cos(image, text)` of a tuned open_clip ViT-H/14.

    As the authors' own function, it is the plain cosine, without the logit scale: about 0.2 to 0.35, where leaderboards show a hundred
    times as much. The image is resized so that its long side is 224 and padded with black. Their resizing used the antialiasing
    that their torchvision had by default; here it is on, the default today.

    The published weights (986 M parameters) are under the Apache 2.0 licence.

    Calling it with images, float (B, 3, H, W) in [0, 1], and B prompts returns scores (B,) in [-1, 1], differentiable with respect to
    the images. As a reward ([`as_reward`]) the loss is the negative score.
    """

    __name__ = "hpsv2"
    published = (WEIGHTS, FILE)

    def __init__(self, model: CLIPModel, tokenizer: Callable):
        super().__init__(model, tokenizer)
        self.preprocess = PadToSquare(model.config.vision_config.image_size)

    @classmethod
    def from_pretrained(
        cls,
        weights: str | os.PathLike = WEIGHTS,
        filename: str = FILE,
        tokenizer: str | os.PathLike | None = None,
    ) -> "HPSv2Reward":
        """From the published checkpoint.

        Args:
            weights: the file, a folder with it, or an id of the Hub.
            filename: `HPS_v2.1_compressed.pt` for v2.1, `HPS_v2_compressed.pt` for v2; not read where `weights` is a file.
            tokenizer: id or folder; the one beside the weights where there is one, else
                `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`, whose tokens are open_clip's.

        Raises:
            ValueError: the file holds something else; it and the tensors that are missing, left over or of another shape are named.
            OSError: there is no such file.
        """
        path = published_file(weights, filename)
        tensors = load_state_dict(path, "state_dict")
        tokenizer = load_tokenizer(tokenizer, weights, TOKENIZER)
        with no_init_weights():  # half a minute, for weights that are all replaced
            model = CLIPModel(_config(tensors, path, tokenizer.eos_token_id))
        # a constant that open_clip's older versions wrote down
        take_from_published(tensors, path, {"clip": (model, _source)}, unused=["attn_mask"])
        return cls(model, tokenizer)

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return self.cosine(images, prompts)


def _source(key: str) -> tuple[str, Callable[[torch.Tensor], torch.Tensor]]:
    if key in PROJECTIONS:
        return PROJECTIONS[key], transposed
    for ours, theirs in NAMES:
        key = key.replace(ours, theirs)
    for index, letter in enumerate("qkv"):
        if f".self_attn.{letter}_proj." in key:
            return key.replace(f".self_attn.{letter}_proj.", ".attn.in_proj_"), third(index)
    return key, whole


def _config(tensors: Mapping[str, torch.Tensor], path: str | os.PathLike, eos_token_id: int) -> CLIPConfig:
    """The sizes of the tensors."""
    positions, vision_width = shape_of(tensors, "visual.positional_embedding", path, 2)
    patch = shape_of(tensors, "visual.conv1.weight", path, 4)[-1]
    vocabulary, text_width = shape_of(tensors, "token_embedding.weight", path, 2)
    for width in (vision_width, text_width):
        if width % HEADS:
            raise ValueError(f"{path} has a width of {width}, which {HEADS} heads cannot share: it is no ViT-H/14.")
    common = {"num_attention_heads": HEADS, "hidden_act": "gelu"}
    return CLIPConfig(
        projection_dim=shape_of(tensors, "text_projection", path, 2)[1],
        vision_config=common
        | {
            "hidden_size": vision_width,
            "intermediate_size": shape_of(tensors, "visual.transformer.resblocks.0.mlp.c_fc.weight", path, 2)[0],
            "num_hidden_layers": count_of(tensors, r"visual\.transformer\.resblocks\.(\d+)\."),
            "patch_size": patch,
            "image_size": patch * square_side(positions - 1, path),
        },
        text_config=common
        | {
            "hidden_size": text_width,
            "intermediate_size": shape_of(tensors, "transformer.resblocks.0.mlp.c_fc.weight", path, 2)[0],
            "num_hidden_layers": count_of(tensors, r"transformer\.resblocks\.(\d+)\."),
            "max_position_embeddings": shape_of(tensors, "positional_embedding", path, 2)[0],
            "vocab_size": vocabulary,
            "eos_token_id": eos_token_id,
        },
    )
