# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Which denoising steps carry gradient.

Truncated backpropagation through the last K steps is DRaFT-K (arXiv 2309.17400), with K = 1 its DRaFT-1; ReFL (arXiv 2304.05977)
takes a single step drawn at random, AlignProp (arXiv 2310.03739) a window of random length. DiffDoctor (arXiv 2501.12382) takes
the last 25 % of the steps, which is what is here.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .call import replaced


def window_length(fraction: float, steps: int) -> int:
    """How many of `steps` carry gradient: `fraction` of them, rounded up (ours), at least one."""
    return max(1, math.ceil(fraction * steps - 1e-9))  # 1e-9: 0.3 * 10 is a little more than 3


class GradientWindow:
    """
    Counts a scheduler's steps while a pipeline runs, and switches gradients on when the window begins.

    Counted are the scheduler's own steps, one for each entry of `scheduler.timesteps`: with a scheduler of second order they
    are about twice `num_inference_steps`. Before the window nothing has a graph.

    Args:
        scheduler: the pipeline's.
        fraction: share of the steps, counted from the last, in (0, 1].
        total: number of steps if it is known from an earlier run; else the length of `scheduler.timesteps`.
        also: `(step, total) -> bool`, further steps whose prediction carries gradient, but not their latents.

    Attributes:
        finished: steps taken so far.
        total: number of steps in all.
        latents: what the last step returned.
    """

    def __init__(
        self,
        scheduler: Any,
        fraction: float,
        total: int | None = None,
        also: Callable[[int, int], bool] = lambda step, total: False,
    ):
        self.scheduler, self.fraction, self.also = scheduler, fraction, also
        self.known, self.total = total, total
        self.finished, self.latents = 0, None
        self.wanted = torch.is_grad_enabled()

    @property
    def begun(self) -> bool:
        return self.finished >= self.total - window_length(self.fraction, self.total)

    @property
    def carries_gradient(self) -> bool:
        return self.wanted and self.total is not None and (self.begun or self.also(self.finished, self.total))

    @contextmanager
    def watch(self, denoiser: nn.Module) -> Iterator["GradientWindow"]:
        scheduler, set_timesteps, step = self.scheduler, self.scheduler.set_timesteps, self.scheduler.step

        @functools.wraps(set_timesteps)  # pipelines look at the arguments that it takes
        def noted_timesteps(*args, **kwargs):
            result = set_timesteps(*args, **kwargs)
            self.total = self.known or len(scheduler.timesteps)
            _switch_gradients(self.carries_gradient)
            return result

        @functools.wraps(step)
        def counted_step(*args, **kwargs):
            if not self.begun:  # a prediction of `also` carries gradient for its own sake
                args, kwargs = _detached(args), _detached(kwargs)
            result = step(*args, **kwargs)
            self.finished += 1
            self.latents = result[0]
            _switch_gradients(self.carries_gradient)
            return result

        def check(module, args):
            if self.carries_gradient and not torch.is_grad_enabled():
                raise ValueError(
                    f"The pipeline switches gradients off before it calls its {type(module).__name__}: the gradient window "
                    "would be shorter than `gradient_fraction` says. This pipeline cannot be treated."
                )

        with ExitStack() as stack:
            stack.callback(denoiser.register_forward_pre_hook(check).remove)
            stack.enter_context(replaced(scheduler, "set_timesteps", noted_timesteps))
            stack.enter_context(replaced(scheduler, "step", counted_step))
            yield self


@contextmanager
def refuse_cut_gradients(denoiser: nn.Module, window: GradientWindow) -> Iterator[None]:
    """A `ValueError` if a layer of the denoiser runs without gradient inside the window: the rest would be trained by half of it.

    Some mixtures of experts do so in evaluation mode.
    """

    def check(module, args):
        if window.carries_gradient and not torch.is_grad_enabled():
            raise ValueError(
                f"`pipeline` has a {type(denoiser).__name__} whose {names[module]} runs without gradient: only a part of the "
                "gradient would reach the adapter. It cannot be treated."
            )

    names = {
        module: name
        for name, module in denoiser.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and name
    }
    hooks = [module.register_forward_pre_hook(check) for module in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _switch_gradients(enabled: bool) -> None:
    if enabled != torch.is_grad_enabled():
        torch.set_grad_enabled(enabled)
        torch.clear_autocast_cache()  # torch 2.10 uses casts of weights again that were made without gradient


def _detached(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {key: _detached(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_detached(item) for item in value)
    return value
