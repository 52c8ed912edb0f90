# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Gradient in the denoising steps that were chosen, see `placement`, while the pipeline runs its own loop."""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..seeds import derive_seed
from .call import replaced
from .clean import clean_prediction, noise_levels
from .noise import Passed
from .placement import Placement, Steps


class GradientWindow:
    """
    Counts a scheduler's steps while a pipeline runs, and lets gradient pass where the placement has it.

    Counted are the scheduler's own steps, one for each entry of `scheduler.timesteps`: with a scheduler of second order they
    are about twice `num_inference_steps`. Before the first chosen step nothing has a graph.

    Args:
        scheduler: the pipeline's.
        placement: which steps carry gradient.
        seed: what the placement draws is drawn from it.
        seeds: one for each image; noise that the placement adds is drawn from them.
        total: number of steps if it is known from an earlier run; else the length of `scheduler.timesteps`.
        also: `(step, total) -> bool`, further steps whose prediction carries gradient, but not their latents.

    Attributes:
        finished: steps taken so far.
        total: number of steps in all; `expected` counts those beyond that the placement adds.
        latents: what the last step returned.
    """

    def __init__(
        self,
        scheduler: Any,
        placement: Placement,
        seed: int = 0,
        seeds: Sequence[int] = (),
        total: int | None = None,
        also: Callable[[int, int], bool] = lambda step, total: False,
    ):
        self.scheduler, self.placement, self.seed, self.seeds, self.also = scheduler, placement, seed, seeds, also
        self.known, self.total = total, total
        self.steps = Steps(frozenset())
        self.finished, self.latents = 0, None
        self.wanted = torch.is_grad_enabled()
        self._said: list[Any] = []  # by the denoiser, in the step whose belief is the image
        self._asked = 0  # how often the denoiser was asked since
        self._again: list[torch.Tensor] = []  # clean latents, of each time that the last step was taken
        self._timesteps: torch.Tensor | None = None  # of the scheduler, where the loop was given more
        self._last_level = (0.0, 1.0)  # how the last step's latents are made of image and noise
        self._landing: torch.Tensor | None = None  # of the leap under way
        self._distances: list[torch.Tensor] = []  # of the leaps' ends from the true latents, (B,)

    # --- where in the loop ---------------------------------------------------------------------------------------------------

    @property
    def expected(self) -> int:
        """How many steps the loop has, with those that the placement adds."""
        return self.total + (self.steps.repeats - 1 if self.wanted else 0)

    @property
    def begun(self) -> bool:
        """Whether the first chosen step is reached."""
        return self.finished >= min(self.steps.chosen, default=self.total)

    @property
    def is_chosen(self) -> bool:
        return self.finished in self.steps.chosen or self.finished >= self.total

    @property
    def carries_gradient(self) -> bool:
        """Whether the pipeline runs with gradient at this moment."""
        return self.wanted and self.total is not None and (self.begun or self.also(self.finished, self.total))

    @property
    def asks_gradient(self) -> bool:
        """Whether the denoiser is to have gradient at this moment."""
        return self.wanted and self.total is not None and (self.is_chosen or self.also(self.finished, self.total))

    @contextmanager
    def watch(self, denoiser: nn.Module) -> Iterator["GradientWindow"]:
        scheduler, set_timesteps, step = self.scheduler, self.scheduler.set_timesteps, self.scheduler.step
        parameters = inspect.signature(step)

        @functools.wraps(set_timesteps)  # pipelines look at the arguments that it takes
        def noted_timesteps(*args, **kwargs):
            result = set_timesteps(*args, **kwargs)
            self.total = self.known or len(scheduler.timesteps)
            if self.wanted:
                self.steps = self.placement.choose(self.total, torch.Generator().manual_seed(self.seed))
                self._lengthen()
            _switch_gradients(self.carries_gradient)
            return result

        @functools.wraps(step)
        def counted_step(*args, **kwargs):
            if self.wanted:
                result = self._step(step, parameters.bind(*args, **kwargs))
            else:
                result = step(*args, **kwargs)
            self.finished += 1
            self.latents = result[0]
            _switch_gradients(self.carries_gradient)
            return result

        def check(module, args):
            if self.carries_gradient and not torch.is_grad_enabled():
                raise ValueError(
                    f"The pipeline switches gradients off before it calls its {type(module).__name__}: fewer steps would "
                    "carry gradient than were chosen. This pipeline cannot be treated."
                )

        with ExitStack() as stack:
            stack.callback(denoiser.register_forward_pre_hook(check).remove)
            stack.enter_context(replaced(scheduler, "set_timesteps", noted_timesteps))
            stack.enter_context(replaced(scheduler, "step", counted_step))
            if self.wanted:
                stack.enter_context(replaced(denoiser, "forward", functools.partial(self._ask, denoiser.forward)))
            yield self

    # --- the denoiser --------------------------------------------------------------------------------------------------------

    def _ask(self, forward: Callable, *args, **kwargs) -> Any:
        """The denoiser's forward, as the steps have it."""
        steps = self.steps
        if (
            steps.image_of is not None and self.finished > steps.image_of
        ):  # the image is made: what is said changes nothing
            self._asked += 1
            return self._said[(self._asked - 1) % len(self._said)]
        if steps.chained or not torch.is_grad_enabled():
            result = forward(*args, **kwargs)
        elif not self.asks_gradient:
            _switch_gradients(False)
            try:
                result = forward(*args, **kwargs)
            finally:
                _switch_gradients(True)
        else:
            discount = steps.leap.discount if steps.leap is not None else 0.0
            args, kwargs = _discounted(args, discount), _discounted(kwargs, discount)
            result = checkpoint(forward, *args, use_reentrant=False, **kwargs)
        if self.finished == steps.image_of:
            self._said.append(_detached(result))
        return result

    # --- the scheduler -------------------------------------------------------------------------------------------------------

    def _step(self, step: Callable, call: inspect.BoundArguments) -> Any:
        """The scheduler's step, as the steps have it."""
        steps, number, given = self.steps, self.finished, call.arguments
        if steps.image_of is not None and number > steps.image_of:
            return Passed((given["sample"],) * 2)
        if number == steps.image_of != self.total - 1:
            return Passed((self._belief(given),) * 2)
        if steps.repeats > 1:
            self.scheduler.timesteps = (
                self._timesteps
            )  # the loop has those it goes through; the scheduler looks for its last one
            if number >= self.total - 1:
                return self._repeated(step, call)
        if steps.leap is not None:
            return self._leaping(step, call)
        # a prediction of `also` carries gradient for its own sake; and before the first step nothing does
        if not self.begun:
            call.arguments.update(_detached(given))
        elif not self.is_chosen:
            given["model_output"] = _detached(given["model_output"])
        return step(*call.args, **call.kwargs)

    def _belief(self, given: dict[str, Any]) -> torch.Tensor:
        """The clean latents that a step about to be taken believes in, as the sample's type."""
        output, sample = given["model_output"], given["sample"]
        if output.shape != sample.shape and output.shape[1] == 2 * sample.shape[1]:  # a learned variance
            output = output.chunk(2, dim=1)[0]
        try:
            clean = clean_prediction(self.scheduler, given["timestep"]).clean(output, sample)
        except (AttributeError, KeyError, IndexError) as error:
            raise self._refusal(error) from error
        return clean.to(sample.dtype)

    def _levels(self) -> list[tuple[float, float]]:
        try:
            return noise_levels(self.scheduler)
        except (AttributeError, KeyError, IndexError) as error:
            raise self._refusal(error) from error

    def _refusal(self, error: Exception) -> ValueError:
        return ValueError(
            f"`gradient_placement` asks for the clean image that a step believes in, which the {type(self.scheduler).__name__} of "
            f'this pipeline does not tell ({type(error).__name__}: {error}). Use "last" or "sparse", or another scheduler.'
        )

    # --- the last step again ---------------------------------------------------------------------------------------------------

    def _lengthen(self) -> None:
        """Have the pipeline take its last step again, in its own loop."""
        more, scheduler = self.steps.repeats - 1, self.scheduler
        if more:
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(0)  # else the first of equal timesteps is looked up
            timesteps = self._timesteps = scheduler.timesteps
            scheduler.timesteps = torch.cat([timesteps, timesteps[-1:].expand(more, *timesteps.shape[1:])])

    def _repeated(self, step: Callable, call: inspect.BoundArguments) -> Passed:
        given, number = call.arguments, self.finished
        if number == self.total - 1:
            self._last_level = self._levels()[number]
            clean = step(*call.args, **call.kwargs)[0]
            if getattr(self.scheduler, "_step_index", None) is not None:
                self.scheduler._step_index = number
        else:
            clean = self._belief(given)
        self._again.append(clean)
        if len(self._again) < self.steps.repeats:
            signal, noise = self._last_level
            fresh = [
                torch.randn(
                    clean.shape[1:], generator=torch.Generator().manual_seed(derive_seed("renoise", seed, number))
                )
                for seed in self.seeds
            ]
            renoised = signal * clean.detach().float() + noise * torch.stack(fresh).to(clean.device)
            return Passed((renoised.to(clean.dtype),) * 2)
        return Passed((torch.cat(self._again),) * 2)

    # --- leaps -----------------------------------------------------------------------------------------------------------------

    def _leaping(self, step: Callable, call: inspect.BoundArguments) -> Any:
        steps, number, given = self.steps, self.finished, call.arguments
        second = max(steps.chosen)
        if number in steps.chosen:
            belief = self._belief(given).float()
            if number != second:
                belief = _leap(belief, given["sample"].float(), *(self._levels()[i] for i in (number, second)))
            self._landing = belief
        given["model_output"], given["sample"] = _detached(given["model_output"]), _detached(given["sample"])
        result = step(*call.args, **call.kwargs)
        if number + 1 not in (second, self.total) or self._landing is None:
            return result
        latents, landing = result[0].detach(), self._landing
        self._distances.append((landing.detach() - latents.float()).abs().flatten(1).mean(1))
        carried = landing - landing.detach()  # the value is the true one, the gradient that of the leap
        if number + 1 == self.total:
            carried = carried * self._weights().view(-1, *[1] * (carried.ndim - 1))
        latents = latents + carried.to(latents.dtype)
        return Passed((latents,) * 2)

    def _weights(self) -> torch.Tensor:
        """(B,): how much a sample counts, by how near its leaps came."""
        tolerance = self.steps.leap.tolerance
        if tolerance == 0:
            return torch.ones_like(self._distances[0])
        return 1 / torch.stack([distance.clamp(min=tolerance) for distance in self._distances]).sum(0)


def _leap(
    clean: torch.Tensor, sample: torch.Tensor, level: tuple[float, float], after: tuple[float, float]
) -> torch.Tensor:
    """From x = a x_0 + s e to a' x_0 + s' e, by what a step believes of x_0 and so of e."""
    (signal, noise), (signal_after, noise_after) = level, after
    return signal_after * clean + noise_after * (sample - signal * clean) / noise


class _Discount(torch.autograd.Function):
    """Its input; of the gradient, a share."""

    @staticmethod
    def forward(ctx, x, share):
        ctx.share = share
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.share * gradient, None


def _discounted(value: Any, share: float) -> Any:
    """The tensors in a value with a share of their gradient; detached where it is 0."""
    if share == 0:
        return _detached(value)
    return _mapped(value, lambda tensor: _Discount.apply(tensor, share) if tensor.requires_grad else tensor)


@contextmanager
def refuse_cut_gradients(denoiser: nn.Module, window: GradientWindow) -> Iterator[None]:
    """A `ValueError` if a layer of the denoiser runs without gradient where it was chosen: the rest would be trained by half of it.

    Some mixtures of experts do so in evaluation mode.
    """

    def check(module, args):
        if window.asks_gradient and not torch.is_grad_enabled():
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
    return _mapped(value, torch.Tensor.detach)


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A value with all its tensors changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, BaseOutput):
        return type(value)(**{key: _mapped(item, change) for key, item in value.items()})
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(item, change) for item in value)
    return value
