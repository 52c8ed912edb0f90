# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The pipeline's own `__call__`, without the `torch.no_grad` around it. No loop is copied: what is trained is what will run."""

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn


# Arguments of a pipeline's `__call__` that are the rollout's to set.
RESERVED = {
    "prompt",
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "max_sequence_length",
    "num_images_per_prompt",
    "generator",
    "latents",
    "output_type",
    "return_dict",
}


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` inside the block.

    Written to the dictionary of an instance or a module, because a pipeline's own `__setattr__` would also rewrite its config.
    """
    attributes = vars(owner)
    before = attributes.get(name, attributes)  # the dictionary itself stands for "was not there"
    attributes[name] = value
    try:
        yield
    finally:
        if before is attributes:
            del attributes[name]
        else:
            attributes[name] = before


class Reached(Exception):
    """Ends a pipeline's call where enough has been seen."""


class PipelineCall:
    """
    Calls a pipeline as its `__call__` would, with gradient where the caller has it switched on.

    Left out while it runs: the progress bar, a watermark and a safety checker, which leave the graph by way of numpy. Pipelines
    inside the pipeline (the Kandinsky combinations) run without their `no_grad` too. Afterwards everything is as before, also
    after an error, attention processors included.

    Args:
        pipeline: a text-to-image pipeline.
        denoiser_name: the component that is trained, `"transformer"` or `"unet"`.

    Attributes:
        accepted: the parameters of `__call__` by name.
    """

    def __init__(self, pipeline: DiffusionPipeline, denoiser_name: str):
        self.pipeline, self.denoiser_name = pipeline, denoiser_name
        self.function = inspect.unwrap(type(pipeline).__call__)
        self.accepted = inspect.signature(self.function).parameters
        self.nested = [value for value in vars(pipeline).values() if isinstance(value, DiffusionPipeline)]

    @property
    def denoiser(self) -> nn.Module:
        return getattr(self.pipeline, self.denoiser_name)

    def __call__(self, **kwargs) -> Any:
        """What the pipeline returns first: its images, as a rule a tensor with `output_type="pt"`."""
        with ExitStack() as stack:
            for pipeline in (self.pipeline, *self.nested):
                stack.enter_context(replaced(pipeline, "_progress_bar_config", {"disable": True}))
                for name in ("watermark", "watermarker", "safety_checker"):
                    if (guard := getattr(pipeline, name, None)) is not None:
                        stack.enter_context(replaced(pipeline, name, _without(guard)))
            for inner in {type(pipeline) for pipeline in self.nested}:
                stack.enter_context(_unwrapped(inner))
            stack.enter_context(_processors_kept(self.denoiser))
            stack.enter_context(
                torch.set_grad_enabled(torch.is_grad_enabled())
            )  # restores it, whatever is done inside
            return self.function(self.pipeline, **kwargs, output_type="pt", return_dict=False)[0]

    def denoiser_inputs(self, **kwargs) -> list[torch.Tensor]:
        """The tensors of the denoiser's first call, for which alone everything before it is run; lists are stacked."""
        seen: list[torch.Tensor] = []

        def stop(module, args, kwargs):
            for value in (*args, *kwargs.values()):
                if isinstance(value, list) and value and all(isinstance(entry, torch.Tensor) for entry in value):
                    value = torch.stack(value) if len({entry.shape for entry in value}) == 1 else None
                if isinstance(value, torch.Tensor) and value.ndim > 0:
                    seen.append(value)
            raise Reached

        # first of all hooks: nobody else's is to see this call
        hook = self.denoiser.register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
        try:
            with torch.no_grad():
                self(**kwargs)
        except Reached:
            pass
        finally:
            hook.remove()
        return seen

    # --- arguments ---------------------------------------------------------------------------------------------------------

    def image_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """(height, width) in pixels. Where none is asked for: the default of `__call__`, else that of the configuration."""
        pipeline, config = self.pipeline, self.denoiser.config
        factor = getattr(pipeline, "vae_scale_factor", 8)
        sample = getattr(pipeline, "default_sample_size", None) or config.get("sample_size")
        sample = [sample, sample] if isinstance(sample, int) else sample
        sizes = []
        for i, (name, value) in enumerate((("height", height), ("width", width))):
            default = self.accepted[name].default if name in self.accepted else None
            if value is None and isinstance(default, int):
                value = default
            if value is None and sample is not None:
                value = sample[i] * (factor if _has_decoder(pipeline) else 1)
            if value is None:
                raise ValueError(f"`height` and `width` are needed: {type(pipeline).__name__} has no default size.")
            sizes.append(value)
        patch = config.get("patch_size") or 1
        processor = getattr(getattr(pipeline, "image_processor", None), "config", {})
        multiple = math.lcm(
            int(processor.get("vae_scale_factor", factor)),
            int(factor) * (patch if isinstance(patch, int) else 1) if _has_decoder(pipeline) else 1,
        )
        for name, value in zip(("height", "width"), sizes):
            if value < multiple or value % multiple:
                raise ValueError(
                    f"`{name}` is {value}, but must be a positive multiple of {multiple}, the pixels of one latent of this "
                    f"{type(pipeline).__name__}."
                )
        return sizes[0], sizes[1]

    def arguments(
        self, given: Mapping[str, Any], own: Mapping[str, Any], extra: Mapping[str, Any], num_inference_steps: int
    ) -> dict[str, Any]:
        """The arguments of every call, checked.

        Args:
            given: what the user set by name; must be accepted where it is not None.
            own: what the rollout sets; left out where it is not accepted (some pipelines take no size).
            extra: the user's further arguments.
            num_inference_steps: the length that lists of timesteps or sigmas must have.
        """
        name = type(self.pipeline).__name__
        if "prompt" not in self.accepted:
            raise ValueError(
                f"`pipeline` is a {name}, whose __call__ takes no prompt; a text-to-image pipeline is needed."
            )
        given = {key: value for key, value in given.items() if value is not None}
        for key in (*given, *extra):
            if key not in self.accepted:
                where = f"`{key}`" if key in given else f"`pipeline_kwargs` has {key!r}, which"
                raise ValueError(f"{where} is no argument of {name}.__call__, which accepts {sorted(self.accepted)}.")
        if taken := sorted(RESERVED & set(extra)):
            raise ValueError(
                f"`pipeline_kwargs` has {taken}, which the rollout sets. Use its own arguments and remove them."
            )
        for key in ("timesteps", "sigmas"):
            if extra.get(key) is not None and len(extra[key]) != num_inference_steps:
                raise ValueError(
                    f"`pipeline_kwargs` has {len(extra[key])} {key}, but `num_inference_steps` is {num_inference_steps}: "
                    "make them equal."
                )
        # Binning would change the size that was asked for, and resize the image after the VAE.
        own = {"use_resolution_binning": False, **own}
        return {key: value for key, value in own.items() if key in self.accepted} | given | dict(extra)


def for_each(arguments: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Texts among the arguments of a call, repeated for each of `count` prompts."""
    return {
        key: [value] * count if key.startswith(("prompt", "negative_prompt")) and isinstance(value, str) else value
        for key, value in arguments.items()
    }


def decoders(pipeline: DiffusionPipeline) -> list[nn.Module]:
    """The components that turn latents into pixels: `vae`, `movq`, `vqvae`; none for a pipeline in pixel space."""
    return [
        component
        for component in pipeline.components.values()
        if isinstance(component, nn.Module) and callable(getattr(component, "decode", None))
    ]


def _has_decoder(pipeline: DiffusionPipeline) -> bool:
    return bool(decoders(pipeline))


class _Lenient:
    """Stands for a guard that a pipeline insists on: calls nothing unsafe and leaves what it is given as it is."""

    def to(self, *_, **__):
        return self

    def check_text_safety(self, text):
        return True

    def check_video_safety(self, frames):
        return frames


def _without(guard: Any) -> Any:
    return _Lenient() if hasattr(guard, "check_text_safety") else None


@contextmanager
def _unwrapped(pipeline_class: type) -> Iterator[None]:
    """Calls of the class run without `no_grad` inside the block."""
    before = pipeline_class.__call__
    pipeline_class.__call__ = inspect.unwrap(before)
    try:
        yield
    finally:
        pipeline_class.__call__ = before


@contextmanager
def _processors_kept(denoiser: nn.Module) -> Iterator[None]:
    """Pipelines with perturbed attention guidance exchange the processors, and a call that ends early leaves them so."""
    before = dict(getattr(denoiser, "attn_processors", None) or {})
    try:
        yield
    finally:
        if before and any(now is not before.get(name) for name, now in denoiser.attn_processors.items()):
            denoiser.set_attn_processor(before)
