# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Weights as their authors published them: found, read, renamed to transformers' names, every tensor accounted for."""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from ..loading import errors_named


# where a tensor of ours is in the published file: its key there, and what to take of it
Source = Callable[[str], tuple[str, Callable[[torch.Tensor], torch.Tensor]]]
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


def published_file(weights: str | os.PathLike, filename: str) -> Path:
    """The file itself; `filename` in a folder; or `filename` of an id of the Hub, downloaded once.

    Raises:
        OSError: there is none. The message names what was looked for.
    """
    path = Path(weights)
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / filename).is_file():
            raise FileNotFoundError(f"The folder {path} has no {filename}; download it, or name the file itself.")
        return path / filename
    try:
        return Path(hf_hub_download(str(weights), filename))
    except (OSError, ValueError) as error:
        raise OSError(
            f"{str(weights)!r} is no file or folder here, and {filename} cannot be had from the Hub under this id: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error


def load_tokenizer(given: str | os.PathLike | None, weights: str | os.PathLike, default: str) -> Any:
    """The tokenizer that is `given`, or the one beside the weights, or `default`'s of the Hub."""
    if given is None:
        path = Path(weights)
        folder = path.parent if path.is_file() else path
        given = folder if any((folder / name).is_file() for name in TOKENIZER_FILES) else default
    with errors_named(given, f"The tokenizer {str(given)!r}"):
        return AutoTokenizer.from_pretrained(given)


def load_pretrained(model_class: type[PreTrainedModel], name: str | os.PathLike) -> PreTrainedModel:
    """`from_pretrained` in float32, every tensor accounted for.

    Args:
        model_class: of transformers.
        name: id or folder.

    Raises:
        ValueError: a tensor is missing, unexpected, of another shape or not finite.
        OSError: there is no such model.
    """
    with errors_named(name, f"{model_class.__name__} {str(name)!r}"):
        model, found = model_class.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    # older files hold what is counted now
    unexpected = [key for key in found["unexpected_keys"] if not key.endswith("position_ids")]
    _refuse(str(name), found["missing_keys"], unexpected, [key for key, *_ in found["mismatched_keys"]])
    _refuse_not_finite(str(name), model.state_dict())
    return model


def take_from_published(
    tensors: Mapping[str, torch.Tensor],
    path: str | os.PathLike,
    parts: Mapping[str, tuple[nn.Module, Source]],
    unused: Iterable[str] = (),
) -> None:
    """Fill modules from published tensors.

    Args:
        tensors: key -> tensor, as published.
        path: of their file, for errors.
        parts: by any name, a module and where its tensors are in the file.
        unused: regular expressions of further keys that may be in the file, and have no part in the score.

    Raises:
        ValueError: a tensor is missing, left over, of another shape or not finite. The message names the file and the tensors, as
            they are called in it.
    """
    used, missing, misshapen, taken = set(), [], [], {}
    for part, (module, source) in parts.items():
        taken[part] = {}
        for key, own in module.state_dict().items():
            theirs, take = source(key)
            used.add(theirs)
            if theirs not in tensors:
                missing.append(theirs)
                continue
            try:
                taken[part][key] = take(tensors[theirs])
                fits = taken[part][key].shape == own.shape
            except (IndexError, RuntimeError):
                fits = False
            if not fits:
                misshapen.append(theirs)
    known = re.compile("|".join(unused) or r"(?!)")
    unexpected = [key for key in tensors if key not in used and not known.fullmatch(key)]
    _refuse(str(path), missing, unexpected, misshapen)
    _refuse_not_finite(str(path), {key: tensors[key] for key in used})
    for part, (module, _) in parts.items():
        module.load_state_dict({key: tensor.clone() for key, tensor in taken[part].items()})


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(0, 1)


def third(index: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Of query, key and value in one tensor."""
    return lambda tensor: tensor.chunk(3)[index]


def shape_of(tensors: Mapping[str, torch.Tensor], key: str, path: str | os.PathLike, dimensions: int) -> torch.Size:
    """Shape of a tensor, from which the size of a model is read.

    Raises:
        ValueError: there is none, or with another number of dimensions.
    """
    if key not in tensors:
        some = ", ".join(list(tensors)[:3])
        raise ValueError(f"{path} has no tensor {key!r}. Its tensors begin with {some or 'nothing: it is empty'}.")
    shape = tensors[key].shape
    if len(shape) != dimensions:
        raise ValueError(
            f"{path} has the tensor {key!r} of shape {tuple(shape)}; expected were {dimensions} dimensions."
        )
    return shape


def count_of(tensors: Mapping[str, torch.Tensor], pattern: str) -> int:
    """How many layers there are: one more than the highest number that the pattern's group finds in a key."""
    return 1 + max((int(found[1]) for key in tensors if (found := re.match(pattern, key))), default=-1)


def square_side(patches: int, path: str | os.PathLike) -> int:
    side = round(patches**0.5)
    if side < 1 or side * side != patches:
        raise ValueError(f"{path} has positions for {patches} patches, which make no square.")
    return side


def _refuse(name: str, missing: Iterable[str], unexpected: Iterable[str], misshapen: Iterable[str]) -> None:
    wrong = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    said = [
        f"{len(keys)} {what} ({_some(keys)})" for what, keys in ((w, sorted(set(k))) for w, k in wrong.items()) if keys
    ]
    if said:
        raise ValueError(
            f"{name} does not fit: of its tensors are {', '.join(said)}. Is it the file that was published?"
        )


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


def _refuse_not_finite(name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    bad = [key for key, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise ValueError(f"{name} has values that are not finite in {_some(sorted(bad))}; download it again.")
