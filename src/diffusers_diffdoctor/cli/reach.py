# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Whether the Hub has what an argument names, asked once: the libraries ask for half a minute and end in a long traceback."""

import logging
import sys
from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import HFValidationError, validate_repo_id


logger = logging.getLogger(__name__)

SECONDS = 5.0  # to wait for the Hub's answer
KINDS = {
    "model": "config.json",
    "pipeline": "model_index.json",
    "dataset": "README.md",
    "LoRA": "pytorch_lora_weights.safetensors",
}  # and a file that each kind has


def check_reachable(name: str, argument: str, kind: str = "model", remedy: str = "", file: str | None = None) -> None:
    """Refuse a name that leads nowhere. What lies in the cache is enough where the Hub does not answer, and then this process
    asks the Hub for nothing more, as with `HF_HUB_OFFLINE=1`.

    Args:
        name: an id of the Hub; folders are for the caller to look at.
        argument: what errors call it, such as `--detector`.
        kind: one of `KINDS`.
        remedy: a last sentence for the errors.
        file: that is looked for in the cache, where it is another than the kind's.

    Raises:
        OSError: it is no id, the Hub has no such repository, or cannot be reached. The message is one line.
    """
    here = f"`{argument} {name}` is no folder here, and"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise FileNotFoundError(f"{here} no id of the Hub either: check the path. {remedy}".strip()) from error
    cached = isinstance(try_to_load_from_cache(name, file or KINDS[kind], repo_type=_repo_type(kind)), str)
    cached = cached or (kind == "dataset" and _prepared(name).is_dir())
    if cached and constants.HF_HUB_OFFLINE:
        return
    try:
        HfApi().repo_info(name, repo_type=_repo_type(kind), timeout=SECONDS)
    except RepositoryNotFoundError as error:
        if cached:
            return
        why = f"the Hub gives out no {kind} of that id: check it, or log in with `hf auth login` if it is private."
        raise FileNotFoundError(f"{here} {why} {remedy}".strip()) from error
    except Exception as error:  # the client's transport, and with it the type, differs between its versions
        found = f"{constants.ENDPOINT} does not answer ({_first_line(error)})"
        if cached:
            if not isinstance(error, HfHubHTTPError):
                logger.warning(f"{found}: `{argument} {name}` is taken from the cache.")
                _ask_no_more()
            return
        if constants.HF_HUB_OFFLINE:
            found = "HF_HUB_OFFLINE is set, or the Hub has not answered before"
        why = f"it is not in the cache, while {found}: name a folder, or try again with a network."
        raise ConnectionError(f"{here} {why} {remedy}".strip()) from error


def _ask_no_more() -> None:
    """The libraries would ask for every file, wait for every answer and try again."""
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:  # else it looks at the constant when it is imported
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True


def _repo_type(kind: str) -> str:
    return "dataset" if kind == "dataset" else "model"


def _prepared(name: str) -> Path:
    """Where `datasets.load_dataset` keeps what it made of an id; it needs no network then."""
    import datasets  # a second, which diagnosing need not wait for

    return Path(datasets.config.HF_DATASETS_CACHE, name.replace("/", "___"))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
