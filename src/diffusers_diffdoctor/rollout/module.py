# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The rollout: prompts and seeds in, images with gradient out, in one module that a distributed wrapper can hold."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from . import drift as drifting
from .call import PipelineCall, decoders, for_each
from .checkpointing import checked, refusal
from .noise import SIGMA_SAMPLINGS
from .output import decoded, own_images
from .placement import Last, Placement
from .prompts import RememberedPrompts
from .requirements import check_pipeline, keep_float32
from .training_loss import NotAvailable, TrainingLoss
from .window import GradientWindow, refuse_cut_gradients


logger = logging.get_logger(__name__)


@dataclass
class RolloutOutput:
    """What one forward of [`DifferentiableRollout`] returns.

    Args:
        images: (B, 3, H, W), float32 in [0, 1], with the graph of the chosen steps; (n * B, 3, H, W) where the placement takes
            the last step n times, all images of the first time before those of the second.
        latents: what the last scheduler step returned, in the pipeline's own layout (packed for FLUX), with the same graph.
        prediction: what the denoiser says of the noised regularization images, (R, ...); None without them.
        target: what it should say, of the same shape.
        drift: (B,), how far the denoiser has left itself without its adapter in the early steps; None if not asked for.
        repeats: n, how often the images hold each prompt.
    """

    images: torch.Tensor
    latents: torch.Tensor
    prediction: torch.Tensor | None = None
    target: torch.Tensor | None = None
    drift: torch.Tensor | None = None
    repeats: int = 1


class DifferentiableRollout(nn.Module):
    """
    One module whose `forward` runs a diffusers pipeline, with gradient in the last denoising steps.

    The denoiser is the only submodule, and the pipeline calls that same object: wrapping the rollout in
    `DistributedDataParallel` therefore wraps what is trained. Text encoders and VAE are frozen here; which weights of the
    denoiser are trained (a LoRA, as a rule) is the caller's choice. The denoiser stays in `eval()`; of its parts only the dropout
    of a LoRA follows `train()`.

    ```python
    rollout = DifferentiableRollout(pipeline, num_inference_steps=4, gradient_fraction=0.25)
    rollout.cache_prompts(["a hand holding a cup"])
    rollout.free_text_encoders()
    images = rollout(["a hand holding a cup"], seeds=[0]).images  # (1, 3, H, W) in [0, 1]
    ```

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            A text-to-image pipeline with a `transformer` or a `unet`. It is changed in place.
        height, width (`int`, *optional*):
            Size of the images in pixels; the pipeline's default without them.
        num_inference_steps (`int`, defaults to 4):
            Denoising steps, at least 1.
        gradient_fraction (`float`, defaults to 0.25):
            Share of the scheduler's steps, counted from the last, that carry gradient, in (0, 1]. Rounded up to a whole step
            (arXiv 2501.12382 takes the last 25 % of 4 steps; rounding is ours). Known as DRaFT-K (arXiv 2309.17400).
        placement ([`~diffusers_diffdoctor.rollout.Placement`], *optional*):
            Another way to choose the steps that carry gradient, in place of `gradient_fraction`.
        guidance_scale (`float`, *optional*):
            Passed to the pipeline; the pipeline's default without it.
        max_sequence_length (`int`, *optional*):
            Longest prompt in tokens, for pipelines that take it.
        pipeline_kwargs (`Mapping[str, Any]`, *optional*):
            Further arguments of every call of the pipeline.
        offline_sigmas (`str`, defaults to `"logit_normal"`):
            How the offline loss of flow models draws its noise level, or `"uniform"`. See
            [`~diffusers_diffdoctor.rollout.noise.draw_flow_sigmas`].
        offline_guidance_scale (`float`, defaults to 1.0):
            The embedded guidance of guidance-distilled models (FLUX.1-dev) in the offline loss. Ours: at 1 such a model
            predicts the plain velocity of the data, so that the loss does not pull at what distillation taught it.

    Attributes:
        denoiser (`nn.Module`): the pipeline's transformer or UNet.
        denoiser_name (`str`): `"transformer"` or `"unet"`.
        gradient_steps (`int`): how many steps' graphs are held at once, at most.
        height, width (`int`): size of the images in pixels.

    Raises:
        TypeError: `pipeline` is no pipeline.
        ValueError: an argument that cannot work; the message names it, the value found and what to do.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 4,
        gradient_fraction: float = 0.25,
        placement: Placement | None = None,
        guidance_scale: float | None = None,
        max_sequence_length: int | None = None,
        pipeline_kwargs: Mapping[str, Any] | None = None,
        offline_sigmas: str = "logit_normal",
        offline_guidance_scale: float = 1.0,
    ):
        super().__init__()
        self.denoiser_name = check_pipeline(pipeline)
        if not num_inference_steps >= 1:
            raise ValueError(f"`num_inference_steps` is {num_inference_steps}, but must be at least 1.")
        if placement is not None and not isinstance(placement, Placement):
            raise TypeError(f"`placement` is a {type(placement).__name__}, but must be a `Placement`.")
        if offline_sigmas not in SIGMA_SAMPLINGS:
            raise ValueError(f"`offline_sigmas` is {offline_sigmas!r}, but must be one of {SIGMA_SAMPLINGS}.")

        # No nn.Module, so it is not registered: what the rollout's parameters are is decided by the next line alone.
        self.pipeline = pipeline
        self.denoiser = getattr(pipeline, self.denoiser_name)
        self.call = PipelineCall(pipeline, self.denoiser_name)
        self.num_inference_steps = num_inference_steps
        self.placement = Last(gradient_fraction) if placement is None else placement
        self.gradient_steps = self.placement.graphs(num_inference_steps)
        self.height, self.width = self.call.image_size(height, width)
        self.call_kwargs = self.call.arguments(
            given={"guidance_scale": guidance_scale, "max_sequence_length": max_sequence_length},
            own={
                "height": self.height,
                "width": self.width,
                "num_inference_steps": num_inference_steps,
                "max_area": self.height * self.width,  # FLUX.1 Kontext scales every size to it
            },
            extra=pipeline_kwargs or {},
            num_inference_steps=num_inference_steps,
        )
        self.prompts = RememberedPrompts(self.call)
        self.training_loss = TrainingLoss(
            self.call, self.prompts, self.call_kwargs, offline_sigmas, offline_guidance_scale
        )
        self._steps: int | None = None  # of a run, once one was counted
        self._shares: bool | None = None  # whether an image in a batch is the one drawn alone
        self._checked = False  # whether all of the denoiser carries gradient
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.eval()
                if component is not self.denoiser:
                    component.requires_grad_(False)
        for vae in decoders(pipeline):
            keep_float32(vae)

    def train(self, mode: bool = True) -> "DifferentiableRollout":
        """The denoiser's own dropout and norms stay as they are in use; a LoRA's dropout follows `mode`."""
        super().train(False)
        self.training = mode
        for module in self.denoiser.modules():
            if isinstance(module, BaseTunerLayer):
                for dropout in getattr(module, "lora_dropout", {}).values():
                    dropout.train(mode)
        return self

    # --- prompts -----------------------------------------------------------------------------------------------------------

    @property
    def prompts_not_cached(self) -> str | None:
        """Why this pipeline's prompts cannot be cached, in one line; None where they can."""
        return self.prompts.missing

    def cache_prompts(self, prompts: Sequence[str], offline: bool = False) -> None:
        """Encode prompts once and keep their embeddings on the CPU, for every later `forward` and `generate`.

        Prompts that are cached already are skipped. A pipeline whose prompts cannot be remembered keeps getting them as text,
        and a warning says why.

        Args:
            prompts: texts.
            offline: they are those of regularization images, which are asked for without guidance.
        """
        if not offline:
            self.prompts.remember(prompts, self.call_kwargs)
        else:
            try:
                self.training_loss.remember(prompts)
            except NotAvailable as error:
                logger.warning(f"The offline loss is not available: {error}.")
        if self.prompts.missing is not None:
            logger.warning(f"Prompts are not cached, and the text encoders stay: {self.prompts.missing}.")

    def cache_embeddings(self, prompt: str, embeddings: Any) -> None:
        """Put embeddings that were made elsewhere into the cache, for text encoders too large to be loaded here.

        Args:
            prompt: the text they stand for.
            embeddings: what the pipeline's `encode_prompt` returns for `[prompt]`, with the dimension of the batch.
        """
        self.prompts.give(prompt, embeddings)

    def free_text_encoders(self) -> None:
        """Drop the pipeline's text encoders and tokenizers. From then on only cached prompts can be generated.

        A pipeline that needs them for something else keeps them, and a warning says for what.
        """
        if self.prompts.missing is None:
            if not self.prompts.free_text_encoders([self.call_kwargs, self.training_loss.arguments]):
                logger.warning(f"The text encoders stay: {self.prompts.missing}.")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # --- generation --------------------------------------------------------------------------------------------------------

    def forward(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        regularization_images: torch.Tensor | None = None,
        regularization_prompts: Sequence[str] | None = None,
        regularization_seeds: Sequence[int] | None = None,
        regularization_latents: torch.Tensor | None = None,
        drift: bool = False,
        placement_seed: int = 0,
    ) -> RolloutOutput:
        """
        Generate one image for each prompt and, with regularization images, the two sides of the offline loss.

        Everything is in one forward so that a distributed wrapper sees all uses of the denoiser. Without gradients (inside
        `torch.no_grad()`) the images are the same and carry no graph.

        Args:
            prompts: B texts.
            seeds: B numbers. A seed decides an image's noise, whatever the batch it is in, on any device.
            regularization_images: (R, 3, H, W) in [0, 1], of the rollout's size.
            regularization_prompts: their R texts.
            regularization_seeds: R numbers that decide noise and noise level of the offline loss.
            regularization_latents: in place of the images, what `encode_images` made of them.
            drift: also return the drift, see [`~diffusers_diffdoctor.rollout.drift.drift_step_weight`]; the denoiser must have
                an adapter.
            placement_seed: what a placement draws is drawn from it.

        Raises:
            ValueError: an argument that does not fit; a prompt that can no longer be encoded; a pipeline without offline loss.
        """
        prompts, seeds = _check_pairs("prompts", prompts, "seeds", seeds)
        offline = regularization_images is not None or regularization_latents is not None
        if offline:
            regularization_prompts, regularization_seeds = _check_pairs(
                "regularization_prompts", regularization_prompts, "regularization_seeds", regularization_seeds
            )
            found = regularization_latents if regularization_images is None else regularization_images
            if len(found) != len(regularization_prompts):
                raise ValueError(f"{len(found)} regularization images have {len(regularization_prompts)} prompts.")
        if drift and not drifting.has_adapter(self.denoiser):
            raise ValueError(
                f"`drift` compares the {self.denoiser_name} with itself without its adapter, but it has none: call "
                f"pipeline.{self.denoiser_name}.add_adapter(...) first."
            )
        output = self._generate(prompts, seeds, drift, placement_seed)
        if not offline:
            return output
        if regularization_latents is None:
            regularization_latents = self.encode_images(regularization_images)
        generators = [torch.Generator().manual_seed(seed) for seed in regularization_seeds]
        self._check_offline(regularization_prompts[0])
        with self._known(regularization_prompts, self.training_loss.arguments):
            output.prediction, output.target = self.training_loss.predict(
                regularization_latents, regularization_prompts, generators
            )
        return output

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], seeds: Sequence[int], batch_size: int = 8) -> torch.Tensor:
        """Images (N, 3, H, W) on the CPU, float32 in [0, 1], without gradient and at most `batch_size` at a time."""
        prompts, seeds = _check_pairs("prompts", prompts, "seeds", seeds)
        batches = range(0, len(prompts), batch_size)
        return torch.cat(
            [self._generate(prompts[i : i + batch_size], seeds[i : i + batch_size]).images.cpu() for i in batches]
        )

    def _generate(
        self, prompts: list[str], seeds: list[int], drift: bool = False, placement_seed: int = 0
    ) -> RolloutOutput:
        """One call of the pipeline for the prompts that may share a batch; as a rule that is all."""
        with self._known(prompts, self.call_kwargs):
            groups = self.prompts.groups(prompts, self.call_kwargs)
            largest = max(groups, key=len)
            if len(largest) > 1 and not self._may_share([prompts[i] for i in largest], [seeds[i] for i in largest]):
                groups = [[i] for i in range(len(prompts))]
            parts = [
                self._run([prompts[i] for i in group], [seeds[i] for i in group], drift, placement_seed)
                for group in groups
            ]
        if len(parts) == 1:
            return parts[0]
        order = torch.tensor([i for group in groups for i in group]).argsort()

        def together(name: str, repeats: int = 1) -> torch.Tensor | None:
            values = [getattr(part, name) for part in parts]
            if values[0] is None:
                return None
            values = [value.unflatten(0, (repeats, -1)) for value in values]
            return torch.cat(values, dim=1)[:, order.to(values[0].device)].flatten(0, 1)

        repeats = parts[0].repeats
        return RolloutOutput(
            together("images", repeats), together("latents", repeats), drift=together("drift"), repeats=repeats
        )

    def _may_share(self, prompts: list[str], seeds: list[int]) -> bool:
        """Whether the denoiser is asked the same of an image in a batch and alone. Looked at once, in its first call."""
        if self._shares is None:
            try:
                with torch.no_grad(), self.prompts.answering():
                    together, alone = (
                        self.call.denoiser_inputs(
                            prompt=prompts[part],
                            generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
                            **for_each(self.call_kwargs, len(prompts[part])),
                        )
                        for part in (slice(None), slice(1, 2))
                    )
                self._shares = all(
                    torch.allclose(many[1].float(), one[0].float(), rtol=0, atol=1e-2 * (1 + one.float().abs().max()))
                    for many, one in zip(together, alone)
                    if len(many) % len(prompts) == 0 and many[1].shape == one[0].shape and len(many) > len(one)
                )
                why = "its denoiser is asked something else of an image in a batch than of the image alone"
            except Exception as error:
                self._shares, why = False, f"a batch fails with {type(error).__name__}: {error}".splitlines()[0]
            if not self._shares:
                logger.warning(f"{type(self.pipeline).__name__} draws images one by one: {why}.")
        return self._shares

    def _run(self, prompts: list[str], seeds: list[int], drift: bool, placement_seed: int) -> RolloutOutput:
        name = type(self.pipeline).__name__
        also = (
            (lambda step, total: drifting.drift_step_weight(step, total) > 0) if drift else lambda step, total: False
        )
        window = GradientWindow(self.pipeline.scheduler, self.placement, placement_seed, seeds, self._steps, also)
        # CPU generators give the same noise on every device
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        first = torch.is_grad_enabled() and not self._checked
        if first and self.denoiser.dtype == torch.float16:
            logger.warning(
                f"The {self.denoiser_name} is in float16, where gradients below 6e-8 become 0: scale the loss, as "
                "torch.amp.GradScaler and the trainer's `fp16=True` do, or load the pipeline in bfloat16 or float32."
            )
        with ExitStack() as stack:
            if first:
                stack.enter_context(checked(self.denoiser))
            calls = stack.enter_context(drifting.recorded(self.denoiser, window) if drift else nullcontext())
            stack.enter_context(self.prompts.answering())
            pixels = stack.enter_context(decoded(decoders(self.pipeline)))
            stack.enter_context(window.watch(self.denoiser))
            if first:
                stack.enter_context(refuse_cut_gradients(self.denoiser, window))
            returned = self.call(prompt=prompts, generator=generators, **for_each(self.call_kwargs, len(prompts)))
        self._checked = self._checked or first
        if window.finished == 0:
            raise ValueError(
                f"{name} does not call the `step` of its scheduler, so no steps can be chosen for gradient."
            )
        if not window.wanted:
            self._steps = window.finished
        elif window.finished != window.expected:  # the pipeline takes other steps than its scheduler lists
            if self._steps is not None:
                raise ValueError(
                    f"{name} took {window.finished} steps where {window.expected} were expected: a placement by "
                    f"{type(self.placement).__name__} cannot be had with it. Use another `gradient_placement`."
                )
            with torch.no_grad():
                self._run(prompts, seeds, False, placement_seed)  # to count them
            return self._run(prompts, seeds, drift, placement_seed)
        size, repeats = (self.height, self.width), 1 + window.expected - window.total
        drawn = pixels[-1] if pixels else window.latents
        images = own_images(returned, drawn, size, len(prompts) * repeats, name)
        trained = any(parameter.requires_grad for parameter in self.denoiser.parameters())
        if torch.is_grad_enabled() and trained and not images.requires_grad:
            raise ValueError(
                f"The images of {name} carry no gradient although its {self.denoiser_name} has weights to train: something in "
                "its __call__ switches gradients off."
            )
        return RolloutOutput(
            images,
            window.latents,
            drift=drifting.drift(self.denoiser, calls, len(prompts)) if drift else None,
            repeats=repeats,
        )

    @contextmanager
    def _known(self, prompts: Sequence[str], arguments: Mapping[str, Any]) -> Iterator[None]:
        """The prompts are in memory inside the block; those that were not cached are forgotten at its end."""
        with self.prompts.nothing_kept():
            self.prompts.remember(prompts, arguments)
            yield

    # --- offline loss ------------------------------------------------------------------------------------------------------

    @property
    def offline_loss_missing(self) -> str | None:
        """Why this pipeline has no offline loss, in one line; None where it has. Measured once, on a step of its own call."""
        return self.training_loss.missing(self.prompts.any_known(self.training_loss.arguments) or "a photo")

    def _check_offline(self, prompt: str) -> None:
        missing = self.training_loss.missing(prompt)
        if missing is not None:
            raise ValueError(
                f"The offline loss is not available for {type(self.pipeline).__name__}: {missing}. Train without "
                "regularization images; the pixel loss needs none."
            )

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Images (R, 3, H, W) in [0, 1] -> latents (R, ...) for `regularization_latents`, as the pipeline draws its own.

        Deterministic: the mode of the VAE's posterior.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"Regularization images have shape {tuple(images.shape)} and type {images.dtype}, but must be floating-point "
                "(R, 3, H, W) in [0, 1]."
            )
        self._check_offline(self.prompts.any_known(self.training_loss.arguments) or "a photo")
        return self.training_loss.encode(images)

    # --- memory ------------------------------------------------------------------------------------------------------------

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the denoiser's activations in the backward pass. Gradients are the same."""
        if not getattr(self.denoiser, "_supports_gradient_checkpointing", False):
            raise refusal(self.denoiser, "diffusers has none for it")
        self.denoiser.enable_gradient_checkpointing()
        self._checked = False

    def activation_checkpointing_enable(self, **options) -> None:
        """What `transformers.Trainer` calls where `gradient_checkpointing` is on, by this name or the one below it.

        Raises:
            ValueError: an option is set: diffusers' models have none.
        """
        chosen = {name: value for name, value in options.items() if value not in (None, 1, False)}
        if chosen:
            raise ValueError(
                f"Gradient checkpointing of a diffusers model has no options, found {chosen}. Leave them out."
            )
        self.enable_gradient_checkpointing()

    gradient_checkpointing_enable = activation_checkpointing_enable

    @property
    def vae_gradient_checkpointing(self) -> bool:
        """Whether the activations of the VAE are recomputed in the backward pass. Gradients are the same."""
        return any(getattr(vae, "is_gradient_checkpointing", False) for vae in decoders(self.pipeline))

    @vae_gradient_checkpointing.setter
    def vae_gradient_checkpointing(self, value: bool) -> None:
        for vae in decoders(self.pipeline):
            if value and not getattr(vae, "_supports_gradient_checkpointing", False):
                logger.warning(f"{type(vae).__name__} has no gradient checkpointing: it keeps its activations.")
            elif value:
                vae.enable_gradient_checkpointing()
            elif vae.is_gradient_checkpointing:
                vae.disable_gradient_checkpointing()


def _check_pairs(name: str, values: Any, seeds_name: str, seeds: Any) -> tuple[list[str], list[int]]:
    if isinstance(values, str) or not values:
        raise ValueError(f"`{name}` is {values!r}, but must be a list of at least one text.")
    if seeds is None or len(seeds) != len(values):
        found = "missing" if seeds is None else f"{len(seeds)} numbers"
        raise ValueError(f"`{seeds_name}` is {found} for {len(values)} `{name}`: one seed for each is needed.")
    return list(values), [int(seed) for seed in seeds]
