# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The pipeline's own call with noise in its steps, so that what it draws has a likelihood: the policy of policy gradients.

A step of the scheduler is replaced by a Gaussian around what the denoiser says, whose standard deviation does not depend on it:

- flow matching, x_t = (1 - s) x_0 + s e: the SDE of Flow-GRPO (arXiv 2505.05470, eq. 9), one step of Euler-Maruyama;
- all others, x_t = a x_0 + s e: DDIM with eta (arXiv 2010.02502, eq. 16), as DDPO samples (arXiv 2305.13301). Where noise is added
  (a = 1), that is the ancestral step of Euler's scheduler.

The last step is taken without noise (ours), so that none is left in the image. Of the scheduler only its noise levels count, which
is why those that look back at earlier steps (DPM-Solver, UniPC) need no case of their own. Steps that ask the denoiser twice at a
level do: such a scheduler is replaced by the first-order one of the same configuration.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.utils import logging

from ..seeds import derive_seed
from .call import Reached, for_each, replaced
from .checkpointing import checked
from .clean import clean_prediction, noise_levels
from .drift import has_adapter, without_adapter
from .module import DifferentiableRollout
from .noise import Passed, is_flow


logger = logging.get_logger(__name__)

# how much noise a step adds without `noise_level`: of Flow-GRPO's code, and DDPO's
FLOW_NOISE_LEVEL, ETA = 0.7, 1.0
# their steps jump to the clean image, or draw by other rules than those above
OTHER_RULES = ("LCM", "TCD", "EDM", "SCM", "Consistency", "VQDiffusion", "Amused", "Unclip", "UnCLIP", "CogVideoX")


@dataclass(frozen=True)
class Gaussian:
    """What comes next, x' ~ N(mean, std^2).

    Args:
        mean: (B, ...) float32, with the gradient of what the denoiser says.
        std: the same for all values; 0 for a step without noise.
    """

    mean: torch.Tensor
    std: float

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        """(B,): the log-density of a value, as the mean over its elements, not their sum.

        So do ddpo-pytorch and flow_grpo, the code of both papers: ratios then do not depend on the size of the latents.
        """
        square = (value.float() - self.mean).square() / (2 * self.std**2)
        return (-square - math.log(self.std) - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)

    def divergence(self, other: torch.Tensor) -> torch.Tensor:
        """(B,): KL to the Gaussian of the same width around `other`, |mean - other|^2 / (2 std^2), the mean over the elements."""
        return (self.mean - other).square().flatten(1).mean(1) / (2 * self.std**2)


def flow_transition(
    clean: torch.Tensor, sample: torch.Tensor, sigmas: Sequence[float], index: int, noise_level: float
) -> Gaussian:
    """
    One step of the SDE that has the marginals of the flow: Flow-GRPO (arXiv 2505.05470), eq. 9.

    x' = x + (v + g^2 / (2 s) (x + (1 - s) v)) dt + g sqrt(-dt) z with g = noise_level sqrt(s / (1 - s)) and dt = s' - s. At s = 1,
    where g has no limit, 1 - s is that of the next level, as in its code.

    Args:
        clean: x_0 that the denoiser believes in, (B, ...).
        sample: x, of the same shape.
        sigmas: s of every step, and of the end.
        index: of the step.
        noise_level: the paper's a; 0 for the flow's own Euler step.
    """
    s, after = sigmas[index], sigmas[index + 1]
    dt, sample = after - s, sample.float()
    g = noise_level * math.sqrt(s / (1 - (s if s < 1 else sigmas[1]))) if noise_level else 0.0
    velocity = (sample - clean) / s
    mean = sample * (1 + g**2 / (2 * s) * dt) + velocity * (1 + g**2 * (1 - s) / (2 * s)) * dt
    return Gaussian(mean, g * math.sqrt(-dt))


def diffusion_transition(
    clean: torch.Tensor, sample: torch.Tensor, level: tuple[float, float], after: tuple[float, float], eta: float
) -> Gaussian:
    """
    One step of DDIM with eta (arXiv 2010.02502, eq. 12 and 16), from x = a x_0 + s e to x' = a' x_0 + s' e'.

    x' = a' x_0 + sqrt(s'^2 - d^2) e + d z with d = eta s' sqrt(1 - (a s' / (s a'))^2): at eta = 1 the posterior of DDPM.

    Args:
        clean: x_0 that the denoiser believes in, (B, ...).
        sample: x, of the same shape.
        level, after: (a, s) of this step and of the next.
        eta: 0 for the deterministic step.
    """
    (a, s), (a_after, s_after) = level, after
    d = eta * s_after * math.sqrt(max(0.0, 1 - (a * s_after / (s * a_after)) ** 2))
    noise = (sample.float() - a * clean) / s
    return Gaussian(a_after * clean + math.sqrt(max(0.0, s_after**2 - d**2)) * noise, d)


def transition(
    scheduler: Any, timestep: Any, index: int, output: torch.Tensor, sample: torch.Tensor, noise_level: float
) -> Gaussian:
    """The Gaussian of one step of a scheduler, which it is about to take; without noise at its last step.

    Args:
        scheduler: with its timesteps set.
        timestep, output, sample: what its `step` is given.
        index: of the step, from 0.
        noise_level: see [`flow_transition`], or eta of [`diffusion_transition`].
    """
    levels = noise_levels(scheduler)
    if output.shape != sample.shape and output.shape[1] == 2 * sample.shape[1]:  # a learned variance
        output = output.chunk(2, dim=1)[0]
    clean = clean_prediction(scheduler, timestep).clean(output, sample)
    if index + 2 == len(levels):
        noise_level = 0.0
    if is_flow(scheduler):
        return flow_transition(clean, sample, [s for _, s in levels], index, noise_level)
    return diffusion_transition(clean, sample, levels[index], levels[index + 1], noise_level)


def first_order(scheduler: Any, name: str) -> Any:
    """The scheduler, or the first-order one of the same configuration where its steps ask twice at a level.

    Raises:
        ValueError: one whose steps follow other rules, or whose levels a first-order scheduler would not keep. `name` is that of
            the pipeline.
    """
    kind = type(scheduler).__name__
    refusal = (
        f"`pipeline` is a {name} with a {kind}, {{}}: the likelihood of its steps is not known. Give it a DDIM, Euler or "
        "DPM-Solver scheduler first: pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)."
    )
    if any(rule in kind for rule in OTHER_RULES) or scheduler.config.get("prediction_type") not in (
        None,
        "epsilon",
        "v_prediction",
        "sample",
        "flow_prediction",
    ):
        raise ValueError(refusal.format("whose steps follow other rules than DDIM or a flow"))
    if getattr(scheduler, "order", 1) == 1 and "PNDM" not in kind and "SDE" not in kind:
        return scheduler
    spaced = [
        key for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas") if scheduler.config.get(key)
    ]
    if is_flow(scheduler):
        found = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    elif float(scheduler.init_noise_sigma) != 1.0:
        found = EulerDiscreteScheduler.from_config(scheduler.config)
    elif spaced:
        raise ValueError(refusal.format(f"whose {spaced[0]} DDIM does not know"))
    else:
        found = DDIMScheduler.from_config(scheduler.config)
    logger.warning(
        f"{kind} asks the denoiser more than once at a level. Training samples with {type(found).__name__} of the same "
        "configuration instead; evaluation does as the pipeline does."
    )
    return found


# --- trajectories ------------------------------------------------------------------------------------------------------------


@dataclass
class Trajectory:
    """One call of the pipeline with noise in its T steps, as it went, for B images that shared it. Tensors lie on the CPU.

    Attributes:
        rows: which of the prompts that were asked for these are.
        prompts, seeds: B of each. A seed decides all noise of its image, whatever the batch.
        latents: (T + 1, B, ...), before every step and at the end.
        timesteps: T, as the scheduler counts them.
        stds: T, of the noise that a step adds; 0 where it adds none, as the last does.
        log_probs: (T, B) float32, see [`Gaussian.log_prob`]; 0 where a step adds no noise.
        images: (B, 3, H, W) float32 in [0, 1].
        answers: for each step what the denoiser returned in each of its calls, as zeros that take no memory.
    """

    rows: list[int]
    prompts: list[str]
    seeds: list[int]
    latents: torch.Tensor
    timesteps: list[float]
    stds: list[float]
    log_probs: torch.Tensor
    images: torch.Tensor
    answers: list[list[Any]]

    @property
    def noisy_steps(self) -> list[int]:
        """The steps whose outcome has a likelihood."""
        return [step for step, std in enumerate(self.stds) if std > 0]


@dataclass
class StepLikelihood:
    """What the denoiser makes of one recorded step now.

    Attributes:
        log_probs: (B,) with gradient, of what came next in the record.
        divergence: (B,) with gradient, the KL to the denoiser without its adapter; None if not asked for.
    """

    log_probs: torch.Tensor
    divergence: torch.Tensor | None = None


class StochasticRollout(DifferentiableRollout):
    """
    A rollout whose images can be drawn with noise in every step, and whose recorded steps can be asked for their likelihood.

    ```python
    trajectories = rollout.sample(["a hand holding a cup"] * 2, seeds=[0, 1])
    likelihood = rollout(trajectories, step=0)  # one denoiser step with gradient, whatever the number of steps
    ratio = (likelihood.log_probs - trajectories[0].log_probs[0]).exp()  # 1 until the denoiser changes
    ```

    Args:
        pipeline, **kwargs: of [`DifferentiableRollout`]. What it does with other arguments of `forward`, it still does.
        noise_level (`float`, *optional*):
            How much noise a step adds, above 0. Flow models: the `a` of Flow-GRPO (0.7 without it). All others: the eta of
            DDIM (1 without it).

    Raises:
        ValueError: also a scheduler whose steps have no known likelihood.
    """

    def __init__(self, pipeline: Any, *, noise_level: float | None = None, **kwargs):
        super().__init__(pipeline, **kwargs)
        scheduler = pipeline.scheduler
        if noise_level is None:
            noise_level = FLOW_NOISE_LEVEL if is_flow(scheduler) else ETA
        if not (math.isfinite(noise_level) and noise_level > 0):
            raise ValueError(
                f"`noise_level` is {noise_level}, but must be finite and above 0: without noise a step has no likelihood."
            )
        if not is_flow(scheduler) and noise_level > 1:
            raise ValueError(
                f"`noise_level` is {noise_level}, the eta of DDIM for this pipeline, but must be at most 1."
            )
        self.noise_level = noise_level
        self.policy_scheduler = first_order(scheduler, type(pipeline).__name__)
        self._likelihood_checked = False

    # --- drawing -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Trajectory]:
        """Draw one image for each prompt and record how; one trajectory for each call of the pipeline, as a rule one."""
        trajectories, run = [], self._run

        def recorded(prompts: list[str], seeds: list[int], *args, **kwargs) -> Any:
            drawing = _Drawing(self, seeds)
            with drawing.watch():
                output = run(prompts, seeds, *args, **kwargs)
            trajectories.append(drawing.trajectory(prompts, seeds, output.images.cpu()))
            return output

        with replaced(self, "_run", recorded):
            self._generate(list(prompts), [int(seed) for seed in seeds])
        waiting = dict(enumerate(zip(prompts, seeds)))
        for trajectory in trajectories:
            for pair in zip(trajectory.prompts, trajectory.seeds):
                row = next(row for row, asked in waiting.items() if asked == pair)
                trajectory.rows.append(row)
                del waiting[row]
        return trajectories

    # --- likelihoods -------------------------------------------------------------------------------------------------------

    def forward(self, prompts: Any = None, *args, step: int | None = None, reference: bool = False, **kwargs) -> Any:
        """
        What [`DifferentiableRollout`] does; or the likelihood of one step of recorded trajectories, of all their images together.

        The pipeline's own call is run again. Its denoiser is asked in the chosen step alone, and every step is answered from
        the record, so that guidance and all else that a pipeline does around its denoiser is its own, and one step's graph is
        all that is kept.

        Args:
            prompts: texts, or a list of [`Trajectory`].
            step: which step of the trajectories, one of their `noisy_steps`.
            reference: also return the divergence from the denoiser without its adapter.

        Returns:
            [`StepLikelihood`], in the order of the trajectories.
        """
        if step is None:
            return super().forward(prompts, *args, **kwargs)
        found = [self._likelihood(trajectory, step, reference) for trajectory in prompts]
        divergence = torch.cat([each.divergence for each in found]) if reference else None
        return StepLikelihood(torch.cat([each.log_probs for each in found]), divergence)

    def _likelihood(self, trajectory: Trajectory, step: int, reference: bool) -> StepLikelihood:
        if step not in trajectory.noisy_steps:
            raise ValueError(f"`step` is {step}, but must be one that adds noise: {trajectory.noisy_steps}.")
        first = torch.is_grad_enabled() and not self._likelihood_checked
        with ExitStack() as stack:
            if first:
                stack.enter_context(checked(self.denoiser))
            now = self._transition(trajectory, step)
        self._likelihood_checked = self._likelihood_checked or first
        after = trajectory.latents[step + 1].to(now.mean.device)
        divergence = None
        if reference:
            if not has_adapter(self.denoiser):
                raise ValueError(
                    f"`reference` compares the {self.denoiser_name} with itself without its adapter: it has none."
                )
            with torch.no_grad(), without_adapter(self.denoiser):
                divergence = self._transition(trajectory, step)
            divergence = now.divergence(divergence.mean)
        return StepLikelihood(now.log_prob(after), divergence)

    def _transition(self, trajectory: Trajectory, step: int) -> Gaussian:
        """The Gaussian of a recorded step, by the denoiser as it is now."""
        prompts, replay = trajectory.prompts, _Replay(self, trajectory, step)
        generators = [torch.Generator().manual_seed(seed) for seed in trajectory.seeds]
        with self._known(prompts, self.call_kwargs), self.prompts.answering(), replay.watch():
            try:
                self.call(prompt=list(prompts), generator=generators, **for_each(self.call_kwargs, len(prompts)))
            except Reached:
                pass
        if replay.found is None:
            raise ValueError(f"{type(self.pipeline).__name__} took other steps than were recorded.")
        return replay.found


class _Steps:
    """Stands in the place of the scheduler's step and of the denoiser's forward while the pipeline runs.

    Args:
        rollout: whose pipeline it is.
    """

    def __init__(self, rollout: StochasticRollout):
        self.rollout, self.index = rollout, 0
        self.scheduler = rollout.policy_scheduler

    @contextmanager
    def watch(self) -> Iterator[None]:
        rollout, scheduler, denoiser = self.rollout, self.scheduler, self.rollout.denoiser
        step, forward = scheduler.step, denoiser.forward

        @functools.wraps(step)  # pipelines look at the arguments that it takes
        def own_step(model_output, timestep, sample, *args, **kwargs):
            if self.index == 0:
                self._check_levels()
            after = self.next(model_output, timestep, sample)
            with torch.no_grad():  # for its own count of steps; what it returns is not used
                step(model_output.detach(), timestep, sample.detach(), *args, **kwargs)
            self.index += 1
            return Passed((after, after))

        @functools.wraps(forward)
        def own_forward(*args, **kwargs):
            return self.answer(forward, args, kwargs)

        with ExitStack() as stack:
            if scheduler is not rollout.pipeline.scheduler:
                stack.enter_context(replaced(rollout.pipeline, "scheduler", scheduler))
            stack.enter_context(replaced(scheduler, "step", own_step))
            stack.enter_context(replaced(denoiser, "forward", own_forward))
            yield

    def _check_levels(self) -> None:
        timesteps, kind = self.scheduler.timesteps.tolist(), type(self.scheduler).__name__
        if any(later >= earlier for earlier, later in pairwise(timesteps)):
            raise ValueError(
                f"`pipeline` has a {kind} whose timesteps {timesteps} do not fall from step to step: the likelihood of its steps "
                "is not known. Give it another scheduler: pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)."
            )

    def transition(self, output: torch.Tensor, timestep: Any, sample: torch.Tensor) -> Gaussian:
        return transition(self.scheduler, timestep, self.index, output, sample, self.rollout.noise_level)

    def next(self, output: torch.Tensor, timestep: Any, sample: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def answer(self, forward: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        raise NotImplementedError


class _Drawing(_Steps):
    """Draws every step's noise and records what happens."""

    def __init__(self, rollout: StochasticRollout, seeds: Sequence[int]):
        super().__init__(rollout)
        self.generators = [torch.Generator().manual_seed(derive_seed(seed, "steps")) for seed in seeds]
        self.latents, self.timesteps, self.stds, self.log_probs, self.answers = [], [], [], [], [[]]

    def next(self, output, timestep, sample):
        gaussian = self.transition(output, timestep, sample)
        after, log_prob = gaussian.mean, torch.zeros(len(sample))
        if gaussian.std > 0:
            noise = [torch.randn(sample.shape[1:], generator=generator) for generator in self.generators]
            after = gaussian.mean + gaussian.std * torch.stack(noise).to(sample.device)
        after = after.to(sample.dtype)
        if gaussian.std > 0:
            log_prob = gaussian.log_prob(after).cpu()
        if not self.latents:
            self.latents.append(sample.cpu())
        self.latents.append(after.cpu())
        self.timesteps.append(float(timestep))
        self.stds.append(gaussian.std)
        self.log_probs.append(log_prob)
        self.answers.append([])
        return after

    def answer(self, forward, args, kwargs):
        said = forward(*args, **kwargs)
        self.answers[-1].append(_hollow(said))
        return said

    def trajectory(self, prompts: list[str], seeds: list[int], images: torch.Tensor) -> Trajectory:
        return Trajectory(
            rows=[],
            prompts=list(prompts),
            seeds=list(seeds),
            latents=torch.stack(self.latents),
            timesteps=self.timesteps,
            stds=self.stds,
            log_probs=torch.stack(self.log_probs),
            images=images,
            answers=self.answers[: len(self.stds)],
        )


class _Replay(_Steps):
    """Answers every step from a record; in the chosen one the denoiser itself speaks, and there the call ends."""

    def __init__(self, rollout: StochasticRollout, trajectory: Trajectory, chosen: int):
        super().__init__(rollout)
        self.trajectory, self.chosen = trajectory, chosen
        self.found: Gaussian | None = None
        self.waiting = [list(answers) for answers in trajectory.answers]

    def next(self, output, timestep, sample):
        if self.index == self.chosen:
            self.found = self.transition(output, timestep, sample)
            raise Reached
        return self.trajectory.latents[self.index + 1].to(sample.device)

    def answer(self, forward, args, kwargs):
        if self.index == self.chosen:
            return forward(*args, **kwargs)
        return self.waiting[self.index].pop(0)


def _hollow(said: Any) -> Any:
    """What a denoiser returned with its tensors replaced by zeros of the same shape, which share one element."""
    if isinstance(said, torch.Tensor):
        return torch.zeros((), dtype=said.dtype, device=said.device).expand(said.shape)
    if isinstance(said, Mapping):  # an output of diffusers
        return type(said)(**{key: _hollow(value) for key, value in said.items()})
    if isinstance(said, (list, tuple)):
        return type(said)(_hollow(value) for value in said)
    return said
