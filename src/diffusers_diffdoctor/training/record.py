# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What a run writes beside its weights about itself, and what a resumed run must share with it.

A resumed run does what its arguments say: the learning rate, the schedule, the optimizer's settings and the batch are those of the
arguments, at the checkpoint's position. What cannot be both, another optimizer say, is refused; other differences are logged.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from ..files import write_atomically
from ..names import shortened


OPTIMIZER_FILES = ("optimizer.pt", "scheduler.pt")
# Arguments that say where and how often a run is written or stopped, not what it does.
NOT_COMPARED = {
    "output_dir",
    "logging_dir",
    "run_name",
    "resume_from_checkpoint",
    "hub_token",
    "local_rank",
    "overwrite_output_dir",
    "stop_grace",
    "push_timeout",
}


def describe_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's kind and the settings of its groups, as they were asked for. Call it before the first step."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    bits = getattr(getattr(inner, "args", None), "optim_bits", None)  # bitsandbytes has one class for all widths
    kind = f"{type(inner).__module__}.{type(inner).__qualname__}"
    groups = [
        {key: value for key, value in group.items() if key not in ("params", "initial_lr")}
        | {"lr": group.get("initial_lr", group["lr"])}
        for group in optimizer.param_groups
    ]
    return {"kind": kind if bits is None else f"{kind} ({bits}-bit)", "groups": groups}


def write_record(path: str | os.PathLike, record: dict[str, Any]) -> None:
    """Write what a run is as JSON, without local paths: it lies beside weights that are shared."""
    write_atomically(path, json.dumps(shortened(plain(record)), indent=2) + "\n")


def read_record(path: str | os.PathLike) -> dict[str, Any]:
    """What [`write_record`] wrote. A `ValueError` if there is nothing, or something else."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{str(path.parent)!r} is no checkpoint to resume from: it has no {path.name}.")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is no JSON of ours: {error}. Resume from another checkpoint.") from error
    if not isinstance(record, dict):
        raise ValueError(f"{str(path)!r} holds a {type(record).__name__}, but must hold an object.")
    return record


@contextmanager
def missing_entries_named(path: str | os.PathLike) -> Iterator[None]:
    """Code that takes a record, or another file of JSON, for what we wrote: where it is not, a `ValueError` names the file."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{str(path)!r} has other entries than were written ({type(error).__name__}: {error}). Take another "
            "checkpoint."
        ) from error


def plain(value: Any) -> Any:
    """The value as JSON keeps it."""
    return json.loads(json.dumps(value, default=str))


def check_position(
    folder: str | os.PathLike, then: dict[str, Any], now: dict[str, Any], ignore_data_skip: bool
) -> None:
    """Refuse a checkpoint whose position in the data or whose optimizer cannot be taken up. Both are records.

    Raises:
        ValueError: it counts its position in another batch, or has no state of an optimizer. Both values are named.
    """
    if then["samples_per_update"] != now["samples_per_update"] and not ignore_data_skip:
        raise ValueError(
            f"Checkpoint {str(folder)!r} was trained with {then['samples_per_update']} samples per update, but "
            f"`per_device_train_batch_size` x `gradient_accumulation_steps` x processes is {now['samples_per_update']}: what "
            "it has not seen yet cannot be told. Choose a product as before, or set `ignore_data_skip=True` to begin a pass "
            "over the data anew."
        )
    missing = [name for name in OPTIMIZER_FILES if not Path(folder, name).is_file()]
    if missing:
        raise ValueError(
            f"Checkpoint {str(folder)!r} has no {' and no '.join(missing)} (`save_only_model`): its optimizer and schedule "
            "would start anew. Resume from another, or start a new run from its weights; those of a LoRA are merged into the "
            "pipeline first (pipe.fuse_lora(); pipe.unload_lora_weights())."
        )


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What a resumed run does otherwise than the checkpoint's, each as `name: before -> here`. Both are records."""
    then, now = plain(then), plain(now)
    pairs = {key: (then["args"].get(key), now["args"].get(key)) for key in then["args"].keys() | now["args"].keys()}
    pairs |= {key: (then.get(key), now.get(key)) for key in ("processes", "prompts", "rows")}
    return [
        f"{key}: {before!r} -> {here!r}"
        for key, (before, here) in sorted(pairs.items())
        if before != here and key not in NOT_COMPARED
    ]


def check_same_optimizer(then: dict[str, Any], now: dict[str, Any], schedule: Any) -> None:
    """Refuse to load the state of another optimizer, or of a schedule whose rate cannot be told from its position.

    `then` and `now` are records with the keys "optimizer", "schedule" and "args".
    """
    then, now = plain(then), plain(now)
    for key, name in (("optimizer", "optim"), ("schedule", "lr_scheduler_type")):
        before, here = (side[key]["kind"] if key == "optimizer" else side[key] for side in (then, now))
        if before != here:
            raise ValueError(
                f"`{name}` asks for {here}, but the checkpoint holds the state of {before}. Resume with "
                f"`{name}={then['args'][name]!r}`."
            )
    if not isinstance(schedule, LambdaLR):  # its rate is the outcome of the run so far
        rates = [[group["lr"] for group in side["optimizer"]["groups"]] for side in (then, now)]
        settings = [side["args"].get("lr_scheduler_kwargs") for side in (then, now)]
        if rates[0] != rates[1] or settings[0] != settings[1]:
            raise ValueError(
                f"`learning_rate` is {rates[1][0]} with `lr_scheduler_kwargs` {settings[1]}, but the checkpoint was trained "
                f"with {rates[0][0]} and {settings[0]}, and the rate of {now['schedule']} follows from the run so far. Resume "
                "with the values of the checkpoint."
            )


def apply_settings(
    optimizer: torch.optim.Optimizer, schedule: Any, then: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]
) -> None:
    """After the checkpoint's state was loaded: what the arguments changed is as they say, the rest as it was saved.

    Args:
        optimizer: with the checkpoint's state.
        schedule: its schedule, likewise. A `LambdaLR` keeps its position, and its rate there is computed anew.
        then, now: the "groups" of [`describe_optimizer`], in the checkpoint and here.
    """
    for group, before, here in zip(optimizer.param_groups, then, now):
        here_plain = plain(here)
        group |= {key: here[key] for key in here if key != "lr" and here_plain[key] != before.get(key)}
    if isinstance(schedule, LambdaLR):
        schedule.base_lrs = [group["lr"] for group in now]
        rates = [base * factor(schedule.last_epoch) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas)]
        schedule._last_lr = rates
        for group, base, rate in zip(optimizer.param_groups, schedule.base_lrs, rates):
            group |= {"initial_lr": base, "lr": rate}
