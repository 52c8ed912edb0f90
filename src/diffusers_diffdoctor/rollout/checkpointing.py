# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Gradient checkpointing of the denoiser, and whether its class can bear it.

Most classes can. Some fail with it, some exchange their attention before the backward pass comes back to it, and some say something
else with it: each is found in the first run, and refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .drift import prediction_of


def is_checkpointed(denoiser: nn.Module) -> bool:
    return bool(getattr(denoiser, "is_gradient_checkpointing", False))


def refusal(denoiser: nn.Module, why: str) -> ValueError:
    return ValueError(
        f"`gradient_checkpointing` is on, but the {type(denoiser).__name__} of this pipeline cannot bear it: {why}. "
        "Set `gradient_checkpointing=False`."
    )


@contextmanager
def checked(denoiser: nn.Module) -> Iterator[None]:
    """A `ValueError` if the run inside the block shows that checkpointing and this denoiser do not go together."""
    if not is_checkpointed(denoiser) or not torch.is_grad_enabled():
        yield
        return
    seen: dict[str, Any] = {}

    def keep(module, args, kwargs, result):
        if torch.is_grad_enabled():
            seen.update(args=args, kwargs=kwargs, said=prediction_of(result).detach(), processors=_processors(module))

    hook = denoiser.register_forward_hook(keep, with_kwargs=True)
    try:
        yield
    except (TypeError, torch.utils.checkpoint.CheckpointError) as error:
        raise refusal(denoiser, f"{type(error).__name__}: {error}") from error
    finally:
        hook.remove()
    if not seen:
        return
    if seen["processors"] != _processors(denoiser):
        raise refusal(denoiser, "the pipeline exchanges its attention processors before the backward pass")
    if any(isinstance(module, nn.Dropout) and module.training and module.p > 0 for module in denoiser.modules()):
        return  # two runs differ anyway
    with torch.no_grad():
        plain = prediction_of(denoiser(*seen["args"], **seen["kwargs"]))
    difference = (plain.float() - seen["said"].float()).abs().max()
    if difference > 1e-2 * plain.float().abs().max():
        raise refusal(denoiser, f"its output differs by up to {difference:.2g} from the one without checkpointing")


def _processors(denoiser: nn.Module) -> list[int]:
    return [id(processor) for processor in getattr(denoiser, "attn_processors", {}).values()]
