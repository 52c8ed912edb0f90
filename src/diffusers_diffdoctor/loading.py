# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Load models that come from elsewhere: whatever is wrong with a file ends in a `ValueError` that names it.

The libraries keep files from running code. What they raise then names no file, or is of a type that no caller expects.
"""

import json
import os
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from packaging.version import parse
from safetensors import SafetensorError, safe_open

from .files import digest


@contextmanager
def errors_named(name: str | os.PathLike, called: str) -> Iterator[None]:
    """`with errors_named(folder, "`--detector folder`"):` load a model; what the library raises becomes a `ValueError`.

    Files of a folder are looked at before. An `OSError`, of which the libraries make good ones, passes.

    Args:
        name: folder or id of the model.
        called: what the error calls it.
    """
    if Path(name).is_dir():
        check_model_files(name, called)
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # of decoders, parsers, validators and the unpickler
        why = " ".join(str(error).split())[:300]
        if isinstance(error, UnpicklingError):
            pickled = ", ".join(path.relative_to(name).as_posix() for path in _files(Path(name), ".bin"))
            why = f"there is more in {pickled or 'its pickled weights'} than tensors and numbers, which could run code"
        raise ValueError(f"{called} cannot be loaded ({type(error).__name__}): {why}") from error


def dtype_argument(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """How `from_pretrained` of diffusers wants to be told the type of the weights: by another name since 0.42."""
    from diffusers import __version__

    return {"dtype" if parse(__version__) >= parse("0.42") else "torch_dtype": dtype}


def check_model_files(folder: str | os.PathLike, called: str) -> None:
    """Refuse a folder of a model or a pipeline with a file of weights, or a description of them, that is damaged or odd.

    Raises:
        ValueError: a file of safetensors whose header does not describe it, a pickled file that unpacks to more than itself, a
            configuration or index that is no JSON object, or an index that names a file outside of its folder. The file is named.
    """
    folder = Path(folder)
    for path in _files(folder, ".safetensors", ".bin", "config.json", "model_index.json", ".index.json"):
        look = {".safetensors": _wrong_weights, ".json": _wrong_description}.get(path.suffix, wrong_archive)
        wrong = look(path)
        if wrong:
            raise ValueError(f"{called} cannot be loaded: its {path.relative_to(folder).as_posix()} {wrong}.")


def wrong_archive(path: str | os.PathLike) -> str | None:
    """What makes a file of torch a bomb, in a clause, or None. Torch never compresses, but unpacks what is compressed."""
    try:
        if not zipfile.is_zipfile(path):
            return None
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        return f"is no whole archive: {error}"
    size = os.path.getsize(path)
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(x.file_size for x in entries) > size:
        return f"has {size} bytes and unpacks to {sum(x.file_size for x in entries)}, which torch never writes"
    return None


def load_state_dict(path: str | os.PathLike, inside: str | None = None) -> dict[str, torch.Tensor]:
    """Tensors by their keys, of a file that `torch.save` wrote. No code in it is run.

    Args:
        path: the file.
        inside: key under which a checkpoint may hold them, beside other things.

    Raises:
        ValueError: it is something else. The message names the file.
    """
    path = Path(path)
    wrong = wrong_archive(path)
    if wrong:
        raise ValueError(f"{path} {wrong}. Download it again.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd pickles; what is wrong with them is said below
            state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{path} is not a PyTorch state dict that can be loaded without running code in it ({reason}). Was it "
            "downloaded completely?"
        ) from error
    if inside is not None and isinstance(state_dict, dict):
        state_dict = state_dict.get(inside, state_dict)
    if not isinstance(state_dict, dict) or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise ValueError(f"{path} holds a {type(state_dict).__name__}, expected was a state dict of tensors alone.")
    return state_dict


@torch.no_grad()
def weights_sha256(model: torch.nn.Module) -> str:
    """sha256 of a model's weights by name: another model at the same address has another one."""

    def parts():
        for name, tensor in sorted(model.state_dict().items()):
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)}"
            yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

    return digest(parts())


def _files(folder: Path, *endings: str) -> list[Path]:
    """Files of a model, or of a pipeline and its parts; not those of checkpoints in a folder that was trained into."""
    found = [path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.name.endswith(endings)]
    parts = [path for path in found if path.parent == folder or not path.parent.name.startswith("checkpoint-")]
    return sorted(path for path in parts if path.is_file())


def _wrong_weights(path: Path) -> str | None:
    try:
        with safe_open(path, "pt"):  # reads the header, and compares it with the size of the file
            return None
    except (SafetensorError, OSError) as error:
        return f"is no whole file of safetensors: {error}"


def _wrong_description(path: Path) -> str | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"cannot be read as JSON: {error}"
    if not isinstance(content, dict):
        return f"holds a {type(content).__name__}, but must hold an object"
    if path.name.endswith(".index.json"):
        files = content.get("weight_map")
        if not isinstance(files, dict):
            return "has no `weight_map`"
        for file in files.values():
            if not isinstance(file, str) or not re.fullmatch(r"[^/\\]+", file) or file in (".", ".."):
                return f"names {file!r}, which is no file of its folder"
    return None
