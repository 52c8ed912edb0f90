# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What a checkpoint of treatment is, when it is whole, and what a run must share with it to continue.

A resumed run does what its arguments say: the learning rate, the schedule, the optimizer's settings and the batch are those of the
arguments, at the checkpoint's position. What cannot be both, another optimizer say, is refused; other differences are logged.
"""

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch.optim.lr_scheduler import LambdaLR

from ..files import digest, write_atomically
from ..names import shortened
from .adapter import lora_files, plain_values


LIVE_LORA_FILE = (
    "live_lora_weights.safetensors"  # the weights being trained, where the LoRA beside it is their average
)
RECORD_FILE = "treatment.json"
STATE_FILE = "trainer_state.json"  # `transformers.Trainer` writes it last, so it stands for a whole checkpoint
OPTIMIZER_FILES = ("optimizer.pt", "scheduler.pt")

# Settings of an adapter that may change on the way: they say how to train it, or which layers have it, and the layers are
# compared where the weights are loaded.
NOT_DRAWN = {
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "peft_version",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
# Arguments that say where a run is written, not what it does.
NOT_COMPARED = {"output_dir", "logging_dir", "run_name", "resume_from_checkpoint", "hub_token", "local_rank"}


def describe_base(pipeline: Any, denoiser_name: str) -> dict[str, str]:
    """What tells one base from another: name, class, type and a digest of the denoiser. Call it before an adapter is added.

    The digest covers the name, shape and a few values of each weight, rounded to bfloat16, so that it does not depend on
    the floating-point type the pipeline was loaded in, nor on where the folder lies.
    """
    denoiser, lines = getattr(pipeline, denoiser_name), []
    for name, weight in sorted(denoiser.state_dict().items()):
        sample = [value.to("cpu", torch.bfloat16).tolist() for value in plain_values(weight, 4)]
        lines.append(f"{name} {tuple(weight.shape)} {sample}\n")
    return {
        "pipeline": shortened(str(getattr(pipeline, "name_or_path", "") or "")),
        "pipeline_class": type(pipeline).__name__,
        "denoiser": denoiser_name,
        "dtype": str(denoiser.dtype).removeprefix("torch."),
        "digest": digest(lines)[:16],
    }


def describe_prompts(prompts: Sequence[str]) -> dict[str, int | str]:
    """Number and digest of the prompts: whether a resumed run goes through the same ones."""
    return {"count": len(prompts), "digest": digest(json.dumps(list(prompts)))[:16]}


def describe_adapter(peft_config: PeftConfig) -> dict[str, Any]:
    """The adapter's settings as JSON keeps them."""
    return _plain({key: sorted(v) if isinstance(v, set) else v for key, v in peft_config.to_dict().items()})


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


def write_record(folder: str | os.PathLike, record: dict[str, Any]) -> None:
    """Write `treatment.json`: what was treated, how, and how far."""
    write_atomically(Path(folder, RECORD_FILE), json.dumps(_plain(record), indent=2) + "\n")


def read_record(folder: str | os.PathLike) -> dict[str, Any]:
    """What [`write_record`] wrote. A `ValueError` if there is nothing."""
    path = Path(folder, RECORD_FILE)
    if not path.is_file():
        missing = f"it has no {RECORD_FILE}" if Path(folder).is_dir() else "there is no such folder"
        raise ValueError(
            f"`resume_from_checkpoint` is {str(folder)!r}, which is no checkpoint of treatment: {missing}."
        )
    return json.loads(path.read_text(encoding="utf-8"))


def _plain(value: Any) -> Any:
    """As JSON keeps it, without local paths: a record is published beside the weights."""
    return json.loads(json.dumps(shortened(value), default=str))


# --- whole or not ----------------------------------------------------------------------------------------------------------------


def is_whole(checkpoint: str | os.PathLike) -> bool:
    """Whether the checkpoint was written to its end. Its last file is JSON, so that half of it is seen too."""
    try:
        json.loads(Path(checkpoint, STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(lora_files(checkpoint)) and Path(checkpoint, RECORD_FILE).is_file()


def last_checkpoint(output_dir: str | os.PathLike) -> str:
    """The whole checkpoint of `output_dir` with the most steps. A `ValueError` if there is none."""
    found = {
        int(match[1]): path
        for path in (Path(output_dir).iterdir() if Path(output_dir).is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and is_whole(path)
    }
    if not found:
        raise ValueError(
            f"`resume_from_checkpoint` is True, but {str(output_dir)!r} has no whole checkpoint. Start without it, or pass "
            "the path of a checkpoint."
        )
    return str(found[max(found)])


def remove_checkpoint(folder: str | os.PathLike) -> None:
    """Delete a checkpoint, its sign of wholeness first: what is left by a kill in between must not look whole."""
    Path(folder, STATE_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def flush_to_disk(folder: str | os.PathLike) -> None:
    """The files so far must reach the disk before the one that says that all are there."""
    for path in [*Path(folder).rglob("*"), Path(folder)]:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:  # folders cannot be opened on Windows
            continue
        try:
            os.fsync(descriptor)
        except OSError:  # nor synchronised on some network file systems
            pass
        finally:
            os.close(descriptor)


# --- resuming --------------------------------------------------------------------------------------------------------------------


def check_resumable(checkpoint: str | os.PathLike, now: dict[str, Any], ignore_data_skip: bool = False) -> None:
    """Refuse a checkpoint that a run recorded as `now` cannot continue.

    Raises:
        ValueError: it is none, is not whole, treats another base, has an adapter that draws otherwise, counts its position
            in another batch, or lacks the optimizer's state. Both values are named.
    """
    folder, then = Path(checkpoint), read_record(checkpoint)
    if not is_whole(folder):
        raise ValueError(
            f"`resume_from_checkpoint` is {str(folder)!r}, which was not written to its end. Resume from the one before; "
            "`resume_from_checkpoint=True` finds it."
        )
    check_same_base(folder, then["base"], now["base"])
    check_same_adapter(folder, then["adapter"], now["adapter"])
    if then["samples_per_update"] != now["samples_per_update"] and not ignore_data_skip:
        raise ValueError(
            f"Checkpoint {str(folder)!r} was trained with {then['samples_per_update']} images per update, but "
            f"`per_device_train_batch_size` x `gradient_accumulation_steps` x processes is {now['samples_per_update']}: the "
            "prompts it has not seen yet cannot be told. Choose a product as before, or set `ignore_data_skip=True` to begin "
            "a pass over the prompts anew."
        )
    missing = [name for name in OPTIMIZER_FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"Checkpoint {str(folder)!r} has no {' and no '.join(missing)} (`save_only_model`): its optimizer and schedule "
            "would start anew. Resume from another, or load its LoRA into the pipeline, merge it (pipe.fuse_lora(); "
            "pipe.unload_lora_weights()) and start a new treatment of that."
        )


def check_same_base(folder: Path, then: dict[str, str], now: dict[str, str]) -> None:
    if any(then[key] != now[key] for key in ("pipeline_class", "denoiser", "digest")):
        before, here = (
            f"{side['pipeline'] or 'unnamed'!r} ({side['pipeline_class']}, weights {side['digest']})"
            for side in (then, now)
        )
        raise ValueError(
            f"Checkpoint {str(folder)!r} treats the pipeline {before}, but this trainer treats {here}. Resume with the "
            "pipeline of the checkpoint, or start anew in another `output_dir`."
        )


def check_same_adapter(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    differing = [
        f"{key} {then[key]!r}, here {now[key]!r}"
        for key in sorted(then.keys() & now.keys() - NOT_DRAWN)
        if then[key] != now[key]
    ]
    if differing:
        raise ValueError(
            f"The adapter of checkpoint {str(folder)!r} has {'; '.join(differing)}: its weights would draw other images. "
            "Resume with the `peft_config` (or `lora_rank` and `lora_alpha`) it was trained with."
        )


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What a resumed run does otherwise than the checkpoint's, each as `name: before -> here`. Both are records."""
    then, now = _plain(then), _plain(now)
    pairs = {key: (then["args"].get(key), now["args"].get(key)) for key in then["args"].keys() | now["args"].keys()}
    pairs |= {"processes": (then["processes"], now["processes"]), "prompts": (then["prompts"], now["prompts"])}
    return [
        f"{key}: {before!r} -> {here!r}"
        for key, (before, here) in sorted(pairs.items())
        if before != here and key not in NOT_COMPARED
    ]


def check_same_optimizer(then: dict[str, Any], now: dict[str, Any], schedule: Any) -> None:
    """Refuse to load the state of another optimizer, or of a schedule whose rate cannot be told from its position.

    `then` and `now` are records with the keys "optimizer", "schedule" and "args".
    """
    then, now = _plain(then), _plain(now)
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
        plain = _plain(here)
        group |= {key: here[key] for key in here if key != "lr" and plain[key] != before.get(key)}
    if isinstance(schedule, LambdaLR):
        schedule.base_lrs = [group["lr"] for group in now]
        rates = [base * factor(schedule.last_epoch) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas)]
        schedule._last_lr = rates
        for group, base, rate in zip(optimizer.param_groups, schedule.base_lrs, rates):
            group |= {"initial_lr": base, "lr": rate}
