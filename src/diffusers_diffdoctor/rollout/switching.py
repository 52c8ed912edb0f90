# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Draw with an adapter in a part of the denoising steps, and without it in the others."""

import functools
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from .call import replaced
from .drift import without_adapter
from .requirements import check_pipeline


@contextmanager
def adapter_until(pipeline: Any, share: float) -> Iterator[None]:
    """
    Inside the block the pipeline draws with its adapter in the first `share` of the steps, and as it was before in the rest.

    The early steps settle what is drawn, the late ones its surface, which is where a reward is hacked: the untreated denoiser wipes off
    much of that, at no cost (MixGRPO, arXiv 2507.21802, samples so). What the late steps have learnt is lost with it, so measure.

    ```python
    with adapter_until(pipe, 0.75):
        image = pipe("a hand holding a cup", num_inference_steps=20).images[0]  # 15 steps with the LoRA, 5 without
    ```

    Args:
        pipeline: with an adapter on its denoiser.
        share: in [0, 1], of the scheduler's own steps; rounded to the nearest whole one.

    Raises:
        ValueError: a share out of its range.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"`share` is {share}, but must lie in [0, 1].")
    denoiser, scheduler = getattr(pipeline, check_pipeline(pipeline)), pipeline.scheduler
    forward, set_timesteps, step = denoiser.forward, scheduler.set_timesteps, scheduler.step
    taken, last = 0, math.inf

    @functools.wraps(set_timesteps)  # pipelines look at the arguments that it takes
    def counted_timesteps(*args, **kwargs):
        nonlocal taken, last
        result = set_timesteps(*args, **kwargs)
        taken, last = 0, round(share * len(scheduler.timesteps))
        return result

    @functools.wraps(step)
    def counted_step(*args, **kwargs):
        nonlocal taken
        taken += 1
        return step(*args, **kwargs)

    def asked(*args, **kwargs):
        with without_adapter(denoiser) if taken >= last else nullcontext():
            return forward(*args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(replaced(scheduler, "set_timesteps", counted_timesteps))
        stack.enter_context(replaced(scheduler, "step", counted_step))
        stack.enter_context(replaced(denoiser, "forward", asked))
        yield
