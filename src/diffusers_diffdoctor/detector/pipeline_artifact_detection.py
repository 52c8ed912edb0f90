# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The task `pipeline("artifact-detection")`: image in, artifact map and two figures out."""

import http.client
import io
import urllib.request
from typing import Any

import torch
from PIL import Image
from transformers import Pipeline

from ..images import ImageSource, read_image, to_image_tensor
from .tiling import tiled_confidence


TASK = "artifact-detection"
MAX_DOWNLOAD_BYTES = 256 * 2**20


def load_image(source: ImageSource, timeout: float | None = 30.0) -> Image.Image:
    """As [`read_image`], which says what it takes and raises; also http(s) URLs.

    Args:
        source: a URL, or anything that [`read_image`] reads.
        timeout: seconds to wait for a server.
    """
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        source = _download(source, timeout)
    return read_image(source)


def _download(url: str, timeout: float | None) -> io.BytesIO:
    request = urllib.request.Request(url, headers={"User-Agent": "diffusers-diffdoctor"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            data = response.read(MAX_DOWNLOAD_BYTES + 1)
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"Cannot read {url}: {error}") from error
    if len(data) > MAX_DOWNLOAD_BYTES:
        raise ValueError(f"{url} is larger than {MAX_DOWNLOAD_BYTES // 2**20} MiB.")
    file = io.BytesIO(data)
    file.name = url  # for messages
    return file


class ArtifactDetectionPipeline(Pipeline):
    """Find the artifacts of generated images with any [`ArtifactDetectorForSemanticSegmentation`].

    ```python
    >>> import diffusers_diffdoctor
    >>> from transformers import pipeline

    >>> detect = pipeline("artifact-detection", model="detector")  # a folder, or an id of the Hub
    >>> detect("image.png")
    {'artifact_map': <PIL.Image.Image mode=L size=1024x1024>, 'max_confidence': 0.93, 'area_ratio': 0.04}
    ```

    The preprocessing is the model's own, in `confidence`; the pipeline needs no image processor.
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not callable(getattr(self.model, "confidence", None)):
            raise TypeError(
                f"The task {TASK!r} needs an artifact detector, a model with `confidence(images)`; "
                f"{type(self.model).__name__} has none."
            )
        self.model.eval()
        # Weights that are stored in half precision come in it; a CPU has little to gain and lacks some of its operations.
        if self.device.type == "cpu" and self.model.dtype == torch.float16:
            self.model.float()

    def __call__(self, inputs: ImageSource | list[ImageSource], **kwargs) -> dict[str, Any] | list[dict[str, Any]]:
        """Diagnose images.

        Args:
            inputs: a path, a URL, a PIL image, an array or a tensor, read by [`read_image`]; or a list of them (mixed as you
                like), or a generator or dataset of them.
            threshold (`float`, *optional*, defaults to 0.5): confidence in [0, 1] from which a pixel counts as artifact.
            tile (`int`, *optional*): side in pixels of square tiles in which the image is seen besides as a whole, so
                that small hands and faces in large images are found. See [`tiled_confidence`].
            overlap (`int`, *optional*): pixels that neighbouring tiles share; a quarter of `tile` by default.
            timeout (`float`, *optional*, defaults to 30): seconds to wait for the server of a URL; `None` waits for ever.

        Returns:
            a dictionary for one image, a list of them for a list: `artifact_map` (PIL "L" image of the image's size, 255 =
            confidence 1), `max_confidence` in [0, 1], `area_ratio` in [0, 1] (share of pixels with at least `threshold`).
        """
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(self, threshold=None, tile=None, overlap=None, **kwargs):
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"threshold must lie in [0, 1], got {threshold}.")
        if overlap is not None and tile is None:
            raise ValueError("overlap says how much tiles share; pass tile as well.")
        preprocess = {"timeout": kwargs.pop("timeout")} if "timeout" in kwargs else {}
        if kwargs:
            raise TypeError(f"Unknown options {', '.join(kwargs)}; there are threshold, tile, overlap and timeout.")
        forward = {"tile": tile, "overlap": overlap} if tile is not None else {}
        postprocess = {"threshold": threshold} if threshold is not None else {}
        return preprocess, forward, postprocess

    def preprocess(self, image, timeout: float | None = 30.0) -> dict[str, torch.Tensor]:
        return {"images": to_image_tensor(load_image(image, timeout))[None]}

    def _forward(self, inputs, tile: int | None = None, overlap: int | None = None) -> dict[str, torch.Tensor]:
        images = inputs["images"]
        maps = self.model.confidence(images) if tile is None else tiled_confidence(self.model, images, tile, overlap)
        return {"maps": maps}

    def postprocess(self, outputs, threshold: float = 0.5) -> dict[str, Any]:
        artifact_map = outputs["maps"][0, 0]
        return {
            "artifact_map": Image.fromarray((artifact_map * 255).round().byte().numpy()),
            "max_confidence": artifact_map.max().item(),
            "area_ratio": (artifact_map >= threshold).float().mean().item(),
        }
