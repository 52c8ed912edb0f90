# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""One number per image instead of a map: the same encoder, the same labels, so that the two kinds of feedback can be compared."""

import hashlib
import json
from collections.abc import Sequence

import torch
from huggingface_hub.dataclasses import strict
from torch import nn

from .configuration_artifact_detector import ArtifactDetectorConfig
from .modeling_artifact_detector import ArtifactDetectorForSemanticSegmentation


MODEL_CARD = """---
library_name: transformers
tags:
- diffusers-diffdoctor
- artifact-detection
{metadata}---

# Artifact scorer

Gives a generated image one number, the share of its pixels that belong to artifacts, without saying which. Made with
`diffusers-diffdoctor` for the comparison of pixel-level and image-level feedback, with the encoder and the labels of an artifact
detector. {parameters:.1f} M parameters; it looks at images with their short side resized to {image_size} pixels.

```python
from diffusers_diffdoctor.detector import ArtifactScorer

share = ArtifactScorer.from_pretrained({name}).eval().share(images)  # images (batch, 3, height, width) in [0, 1]
```

{sections}## Limits

A figure of this scorer is no proof for a generator that was trained against it: judge with another one. Scorers that started from
`nvidia/mit-b*` inherit its licence, which allows non-commercial use only.
"""


@strict
class ArtifactScorerConfig(ArtifactDetectorConfig):
    r"""
    Configuration of [`ArtifactScorer`], that of [`ArtifactDetectorConfig`]; what concerns the decode head means nothing here.
    """

    model_type = "artifact_scorer"


class _PooledHead(nn.Module):
    """The means of all stages' maps -> one logit, as a map of one pixel."""

    def __init__(self, channels: Sequence[int]):
        super().__init__()
        self.classifier = nn.Linear(sum(channels), 1)

    def forward(self, maps: Sequence[torch.Tensor], **kwargs) -> torch.Tensor:
        pooled = torch.cat([one.flatten(2).mean(dim=2) for one in maps], dim=1)
        return self.classifier(pooled)[:, :, None, None]


class ArtifactScorer(ArtifactDetectorForSemanticSegmentation):
    """Share of an image's pixels that belong to artifacts, on the encoder of an artifact detector.

    Its map is one pixel, stretched over the image. For a constant c the detector's loss is `mean (c - t)^2 = (c - mean t)^2 + var t`,
    so the [`ArtifactDetectorTrainer`] trains it as it is, on the same labels t: what is learned is their mean.
    """

    config_class = ArtifactScorerConfig
    config: ArtifactScorerConfig

    def __init__(self, config: ArtifactScorerConfig):
        super().__init__(config)
        own = config.backbone_config is None
        self.decode_head = _PooledHead(config.hidden_sizes if own else self.backbone.channels)
        self.post_init()

    @classmethod
    def from_detector(cls, detector: ArtifactDetectorForSemanticSegmentation) -> "ArtifactScorer":
        """A scorer with the detector's encoder and a new head, which is yet to be trained."""
        settings = {
            key: value
            for key, value in detector.config.to_dict().items()
            if key not in ("model_type", "architectures", "transformers_version", "dtype", "auto_map")
        }
        scorer = cls(ArtifactScorerConfig(**settings)).to(detector.dtype)
        encoder = {key: value for key, value in detector.state_dict().items() if not key.startswith("decode_head.")}
        head = {key: value for key, value in scorer.state_dict().items() if key.startswith("decode_head.")}
        scorer.load_state_dict(encoder | head)
        return scorer.to(detector.device)

    def share(self, images: torch.Tensor) -> torch.Tensor:
        """Predicted share of wrong pixels, (B,) in [0, 1]; `images` as for [`confidence`]. Differentiable."""
        return self.confidence(images)[:, 0, 0, 0]

    def model_card(self, name: str, metadata: str = "", sections: str = "") -> str:
        text = MODEL_CARD.format(
            name=json.dumps(name, ensure_ascii=not name.isprintable()),
            parameters=self.num_parameters() / 1e6,
            image_size=self.config.image_size,
            metadata=metadata,
            sections=sections,
        )
        return f"{text}\n<!-- as written: {hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()} -->\n"


__all__ = ["ArtifactScorer", "ArtifactScorerConfig"]
