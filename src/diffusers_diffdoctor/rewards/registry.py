# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Rewards by name, as a command line names them."""

import difflib
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .aesthetic import AestheticReward
from .artifact_scorer import ArtifactScorerReward
from .clip import CLIPReward
from .endpoint import EndpointReward
from .hpsv2 import HPSv2Reward
from .image_reward import ImageRewardReward
from .pickscore import PickScoreReward


# A reward of one's own is a line here, or a callable.
REWARDS: dict[str, type] = {
    "aesthetic": AestheticReward,
    "artifact_scorer": ArtifactScorerReward,
    "clip": CLIPReward,
    "hpsv2": HPSv2Reward,
    "image_reward": ImageRewardReward,
    "pickscore": PickScoreReward,
}


def named_reward(name: str) -> Any:
    """The reward of a name: one of `REWARDS` with its published weights; `NAME=WHERE` with weights from an id, a folder or a file; the
    `http://` or `https://` address of an [`EndpointReward`]; or `FILE.py:FUNCTION`, whose file is run.

    Raises:
        ValueError: there is no such name or function, or the weights are something else.
        OSError: there are no such weights, or no such file.
    """
    check_reward_name(name)
    if _is_address(name):
        return EndpointReward(name)
    if _file_of(name):
        return _function_of(name)
    short, _, where = name.partition("=")
    reward = REWARDS[short].from_pretrained
    return reward(where) if where else reward()


def check_reward_name(name: str, others: tuple[str, ...] = ()) -> None:
    """Refuse a name that is none, before anything is loaded.

    Args:
        name: what [`named_reward`] takes.
        others: names that the caller knows beside.
    """
    short, _, where = name.partition("=")
    if short in REWARDS and not where and REWARDS[short].published[0] is None:
        raise ValueError(f"No {short} is published: say where yours is, {short}=WHERE.")
    known = (*others, *REWARDS)
    if name in others or _is_address(name) or short in REWARDS:
        return
    file = _file_of(name)
    if file:
        if not Path(file).is_file():
            raise FileNotFoundError(f"Of the reward {name!r} there is no file {file!r}.")
        return
    close = difflib.get_close_matches(short, known, n=1)
    meant = f", did you mean {close[0]!r}?" if close else "."
    raise ValueError(
        f"There is no reward {name!r}{meant} Name one of {', '.join(known)}, NAME=WHERE for weights from an id, a folder or a file, "
        "FILE.py:FUNCTION for one of your own, or the http:// address of a server that scores."
    )


def _is_address(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def _file_of(name: str) -> str | None:
    file, _, function = name.rpartition(":")
    return file if file.endswith(".py") and function else None


def _function_of(name: str) -> Callable:
    file, _, function = name.rpartition(":")
    found = runpy.run_path(file).get(function)
    if not callable(found):
        raise ValueError(f"Of the reward {name!r}, the file {file!r} has no function {function!r}.")
    return found
