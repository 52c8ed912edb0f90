# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Convert the detector that the authors of DiffDoctor released to an [`ArtifactDetectorForSemanticSegmentation`].

Their file is a pickled state dict of a `SegformerForSemanticSegmentation` of transformers 4.46. transformers 5 renamed the
keys: loaded with `strict=False`, nearly all weights would silently stay random. Here every tensor must find its place.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from ..files import digest, written_atomically
from ..loading import load_state_dict
from .configuration_artifact_detector import ArtifactDetectorConfig
from .image_processing_pil_artifact_detector import ArtifactDetectorImageProcessorPil
from .modeling_artifact_detector import ArtifactDetectorForSemanticSegmentation


KNOWN_CHECKPOINTS = {
    "574db3ea1d2296051ec3edafbb921417c65ca6a933e779075eaf622934539612": "DiffDoctor's release, ad_pytorch_model.bin",
}

# The sizes of the Mix Transformers (SegFormer, arXiv 2105.15203, table 6).
ARCHITECTURES = {
    "b0": ((2, 2, 2, 2), (32, 64, 160, 256), 256),
    "b1": ((2, 2, 2, 2), (64, 128, 320, 512), 256),
    "b2": ((3, 4, 6, 3), (64, 128, 320, 512), 768),
    "b3": ((3, 4, 18, 3), (64, 128, 320, 512), 768),
    "b4": ((3, 8, 27, 3), (64, 128, 320, 512), 768),
    "b5": ((3, 6, 40, 3), (64, 128, 320, 512), 768),
}


@dataclass(frozen=True)
class Conversion:
    """What was converted: `output_dir`, the `sha256` of the checkpoint, which release it is (`known_as`, or `None`), the
    `architecture` ("b0" to "b5") and the number of `parameters`."""

    output_dir: Path
    sha256: str
    known_as: str | None
    architecture: str
    parameters: int


def convert_detector_checkpoint(
    checkpoint: str | os.PathLike,
    output_dir: str | os.PathLike,
    image_size: int = 512,
    sha256: str | None = None,
) -> Conversion:
    """Convert a SegFormer state dict with one output channel, as transformers 4 names it, to a detector folder.

    The size (b0 to b5) is read from the tensors. The folder, with the weights as safetensors, configuration, image processor,
    code and a model card, appears at once when all is written, or not at all.

    Args:
        checkpoint: a file that `torch.save(model.state_dict(), ...)` wrote, such as `ad_pytorch_model.bin` of the release.
            It is read with `weights_only=True`: no code in it is run.
        output_dir: a folder that does not exist or is empty.
        image_size: short side in pixels at which the detector is to look at images; 512 in the release.
        sha256: refuse a file with another checksum.

    Raises:
        FileExistsError: `output_dir` holds something.
        FileNotFoundError: there is no such checkpoint.
        ValueError: the file is no state dict, or not one of this architecture; the message says in what.
    """
    checkpoint, output_dir = Path(checkpoint), Path(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise FileExistsError(f"The output {output_dir} exists and is not empty; name a new folder or remove it.")
    if not checkpoint.is_file():
        raise FileNotFoundError(
            f"There is no file {checkpoint}; pass the downloaded checkpoint, not a folder or a URL."
        )
    found = digest(checkpoint)
    if sha256 is not None and found != sha256.lower():
        raise ValueError(f"{checkpoint} has the sha256 {found}, expected was {sha256}; download it again.")
    state_dict = load_state_dict(checkpoint)
    architecture, config = _infer_config(state_dict, image_size)

    # The keys are renamed on loading, by the mapping that the model registers.
    try:
        model, loading = ArtifactDetectorForSemanticSegmentation.from_pretrained(
            None, config=config, state_dict=state_dict, output_loading_info=True
        )
    except RuntimeError as error:
        raise ValueError(f"{checkpoint} does not fit SegFormer-{architecture}: {error}") from error
    missing, unexpected = sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])
    if missing or unexpected or loading["mismatched_keys"]:
        raise ValueError(
            f"{checkpoint} does not fit SegFormer-{architecture}: {len(missing)} tensors are missing {missing[:3]}, "
            f"{len(unexpected)} are unexpected {unexpected[:3]}, {len(loading['mismatched_keys'])} have another shape."
        )

    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(output_dir) as unfinished:
        model.save_pretrained(unfinished)
        ArtifactDetectorImageProcessorPil.for_detector(config).save_pretrained(unfinished)
    return Conversion(output_dir, found, KNOWN_CHECKPOINTS.get(found), architecture, model.num_parameters())


def _infer_config(state_dict: dict[str, torch.Tensor], image_size: int) -> tuple[str, ArtifactDetectorConfig]:
    def shape(key: str) -> torch.Size:
        if key not in state_dict:
            some = ", ".join(list(state_dict)[:3])
            raise ValueError(
                f"The checkpoint has no tensor {key!r}, so it is not a SegformerForSemanticSegmentation of transformers 4. "
                f"Its tensors begin with {some or 'nothing: it is empty'}."
            )
        return state_dict[key].shape

    channels = shape("decode_head.classifier.weight")[0]
    if channels != 1:
        raise ValueError(f"The checkpoint has {channels} output channels; an artifact detector has one.")
    hidden_sizes = tuple(shape(f"segformer.encoder.patch_embeddings.{stage}.proj.weight")[0] for stage in range(4))
    decoder_hidden_size = shape("decode_head.linear_fuse.weight")[0]
    blocks = {
        match.groups()
        for key in state_dict
        if (match := re.match(r"segformer\.encoder\.block\.(\d+)\.(\d+)\.", key)) is not None
    }
    depths = tuple(sum(int(stage) == index for stage, _ in blocks) for index in range(4))
    sizes = (depths, hidden_sizes, decoder_hidden_size)
    architecture = next((name for name, known in ARCHITECTURES.items() if known == sizes), None)
    if architecture is None:
        raise ValueError(
            f"The checkpoint has depths {depths}, hidden sizes {hidden_sizes} and decoder size {decoder_hidden_size}; no "
            f"SegFormer ({', '.join(ARCHITECTURES)}) has these."
        )
    for key, value in state_dict.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"The tensor {key!r} of the checkpoint has values that are not finite.")
    config = ArtifactDetectorConfig(
        depths=depths, hidden_sizes=hidden_sizes, decoder_hidden_size=decoder_hidden_size, image_size=image_size
    )
    return architecture, config
