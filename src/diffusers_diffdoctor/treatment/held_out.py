# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Held-out prompts of a run: what the untreated pipeline and the LoRA draw of them, from the same seeds."""

from collections.abc import Callable, Sequence

from accelerate import Accelerator
from accelerate.utils import gather_object

from .config import TreatmentConfig
from .examine import Sample


class HeldOut:
    """One set of held-out prompts.

    Args:
        prompts: texts; taken in order, and again with further seeds if there are fewer than `args.eval_num_images`.
        args: `eval_num_images`, `eval_seeds_per_prompt`, `eval_seed` and `log_images` of the configuration.
        examine: `(prompts, seeds, treated) -> samples`, generates and judges on this process.

    Attributes:
        prompts, seeds: one for each image of an evaluation.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        args: TreatmentConfig,
        examine: Callable[[list[str], list[int], bool], list[Sample]],
    ):
        each = args.eval_seeds_per_prompt
        self.prompts = [prompts[i // each % len(prompts)] for i in range(args.eval_num_images)]
        self.seeds = [args.eval_seed + i for i in range(args.eval_num_images)]
        self._examine, self._count = examine, min(args.log_images, args.eval_num_images)
        self._before: list[Sample] | None = None
        self._after: tuple[int, list[Sample]] | None = None  # the step of the LoRA, and what it draws

    def samples(self, treated: bool, step: int, accelerator: Accelerator) -> list[Sample]:
        """All images, made by all processes together, on each of them. `step` is that of the LoRA."""
        rank, world = accelerator.process_index, accelerator.num_processes
        mine = self._examine(self.prompts[rank::world], self.seeds[rank::world], treated)
        samples = sorted(gather_object(mine), key=lambda sample: sample.seed)
        self._keep(samples[: self._count], treated, step)
        return samples

    def before_and_after(self, step: int) -> tuple[list[Sample], list[Sample]]:
        """The first `log_images` without the LoRA and with it. Those that are not at hand for this step are made here."""
        if self._before is None:
            self._keep(self._first(treated=False), treated=False, step=step)
        if self._after is None or self._after[0] != step:
            self._keep(self._first(treated=True), treated=True, step=step)
        return self._before, self._after[1]

    def forget(self) -> None:
        """The LoRA is another one than that of the last images, though its step may be the same."""
        self._after = None

    def _first(self, treated: bool) -> list[Sample]:
        return self._examine(self.prompts[: self._count], self.seeds[: self._count], treated)

    def _keep(self, samples: list[Sample], treated: bool, step: int) -> None:
        if treated:
            self._after = (step, samples)
        else:
            self._before = samples
