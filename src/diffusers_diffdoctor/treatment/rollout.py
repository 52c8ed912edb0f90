# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Generation with gradient: a pipeline's own `__call__`, differentiated through its last denoising steps.

No pipeline's loop is copied. `torch.no_grad` decorates `__call__`, so the function under the decorator runs instead, and the
scheduler's `step`, which every loop calls once for each step however it does guidance, counts the steps and switches
gradients on when the window begins.
"""

import functools
import gc
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from torch import nn

from .families import FAMILIES, SIGMA_SAMPLINGS, family_of


logger = logging.get_logger(__name__)

# Arguments of a pipeline's `__call__` that are the rollout's to set.
_RESERVED = {
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
# Texts beside the prompt: encoded with it where prompts are cached, repeated for each sample where they are not.
_TEXTS = ("prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3")


@dataclass
class RolloutOutput:
    """What one forward of [`DifferentiableRollout`] returns.

    Args:
        images: (B, 3, H, W), float32 in [0, 1], with the graph of the gradient window.
        latents: what the last scheduler step returned, in the pipeline's own layout (packed for FLUX), with the same graph.
        prediction: what the denoiser says of the noised regularization images, (R, ...); None without them.
        target: what it should say, of the same shape.
        drift: (B,), how far the denoiser has left itself without its adapter in the early steps; None if not asked for.
    """

    images: torch.Tensor
    latents: torch.Tensor
    prediction: torch.Tensor | None = None
    target: torch.Tensor | None = None
    drift: torch.Tensor | None = None


class _StraightThroughClamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def _denormalize(images: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> [0, 1]. A plain clamp would hide the artifacts of white and black pixels from the denoiser."""
    return _StraightThroughClamp.apply(images * 0.5 + 0.5)


class DifferentiableRollout(nn.Module):
    """
    One module whose `forward` runs a diffusers pipeline, with gradient in the last denoising steps.

    The denoiser is the only submodule, and the pipeline calls that same object: wrapping the rollout in
    `DistributedDataParallel` therefore wraps what is trained. Text encoders and VAE are frozen here; which weights of the
    denoiser are trained (a LoRA, as a rule) is the caller's choice.

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
            Share of the steps, counted from the last, that carry gradient, in (0, 1]. Rounded up to a whole step (arXiv
            2501.12382 takes the last 25 % of 4 steps; rounding is ours).
        guidance_scale (`float`, *optional*):
            Passed to the pipeline; the pipeline's default without it.
        max_sequence_length (`int`, *optional*):
            Longest prompt in tokens, for pipelines that take it.
        pipeline_kwargs (`Mapping[str, Any]`, *optional*):
            Further arguments of every call of the pipeline.
        offline_sigmas (`str`, defaults to `"logit_normal"`):
            How the offline loss of flow models draws its noise level, or `"uniform"`. See
            [`~diffusers_diffdoctor.treatment.families.draw_flow_sigmas`].
        offline_guidance_scale (`float`, defaults to 1.0):
            The embedded guidance of guidance-distilled models (FLUX.1-dev) in the offline loss. Ours: at 1 such a model
            predicts the plain velocity of the data, so that the loss does not pull at what distillation taught it.

    Attributes:
        denoiser (`nn.Module`): the pipeline's transformer or UNet.
        denoiser_name (`str`): `"transformer"` or `"unet"`.
        gradient_steps (`int`): the denoising steps that carry gradient, at least 1.
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
        guidance_scale: float | None = None,
        max_sequence_length: int | None = None,
        pipeline_kwargs: Mapping[str, Any] | None = None,
        offline_sigmas: str = "logit_normal",
        offline_guidance_scale: float = 1.0,
    ):
        super().__init__()
        if not isinstance(pipeline, DiffusionPipeline):
            raise TypeError(
                f"`pipeline` is a {type(pipeline).__name__}, but must be a DiffusionPipeline: load it with "
                "DiffusionPipeline.from_pretrained(...)."
            )
        if getattr(pipeline, "_offload_device", None) is not None:
            raise ValueError(
                "`pipeline` moves its models between devices (CPU offload), which would pull weights away before the backward "
                "pass. Use pipe.remove_all_hooks(); pipe.to(device), and free_text_encoders() to save memory."
            )
        self.denoiser_name = next(
            (name for name in ("transformer", "unet") if isinstance(getattr(pipeline, name, None), nn.Module)), None
        )
        if self.denoiser_name is None:
            raise ValueError(
                f"`pipeline` is a {type(pipeline).__name__} with neither a transformer nor a unet to treat, only "
                f"{sorted(pipeline.components)}."
            )
        if not num_inference_steps >= 1:
            raise ValueError(f"`num_inference_steps` is {num_inference_steps}, but must be at least 1.")
        if not 0 < gradient_fraction <= 1:
            raise ValueError(
                f"`gradient_fraction` is {gradient_fraction}, but must lie in (0, 1]: "
                + (
                    "a gradient window of 0 steps trains nothing."
                    if gradient_fraction == 0
                    else "it is a share of the steps."
                )
            )
        if offline_sigmas not in SIGMA_SAMPLINGS:
            raise ValueError(f"`offline_sigmas` is {offline_sigmas!r}, but must be one of {SIGMA_SAMPLINGS}.")

        # No nn.Module, so it is not registered: what the rollout's parameters are is decided by the next line alone.
        self.pipeline = pipeline
        self.denoiser = getattr(pipeline, self.denoiser_name)
        self.family = family_of(pipeline)
        self.num_inference_steps = num_inference_steps
        # 1e-9: 0.3 * 10 is a little more than 3
        self.gradient_steps = max(1, math.ceil(gradient_fraction * num_inference_steps - 1e-9))
        self.offline_sigmas, self.offline_guidance_scale = offline_sigmas, offline_guidance_scale
        self._call = inspect.unwrap(type(pipeline).__call__)
        self._accepted = inspect.signature(self._call).parameters
        self.height, self.width = self._image_size(height, width)
        self.call_kwargs = self._check_call_kwargs(guidance_scale, max_sequence_length, pipeline_kwargs or {})
        self._embeddings: dict[str, dict[str, torch.Tensor]] = {}
        self._shared: dict[str, torch.Tensor] = {}

        for name, component in pipeline.components.items():
            if isinstance(component, nn.Module) and name != self.denoiser_name:
                component.requires_grad_(False).eval()

    # --- checks --------------------------------------------------------------------------------------------------------------

    def _image_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        factor = getattr(self.pipeline, "vae_scale_factor", 8)
        default = getattr(self.pipeline, "default_sample_size", None) or self.denoiser.config.get("sample_size")
        default = [default, default] if isinstance(default, int) else default
        if default is None and (height is None or width is None):
            raise ValueError(f"`height` and `width` are needed: {type(self.pipeline).__name__} has no default size.")
        height = default[0] * factor if height is None else height
        width = default[1] * factor if width is None else width
        patch = self.denoiser.config.get("patch_size") or 1
        processor = getattr(getattr(self.pipeline, "image_processor", None), "config", {})
        multiple = math.lcm(
            processor.get("vae_scale_factor", factor), factor * (patch if isinstance(patch, int) else 1)
        )
        for name, value in (("height", height), ("width", width)):
            if value < multiple or value % multiple:
                raise ValueError(
                    f"`{name}` is {value}, but must be a positive multiple of {multiple}, the pixels of one latent of this "
                    f"{type(self.pipeline).__name__}."
                )
        return height, width

    def _check_call_kwargs(
        self, guidance_scale: float | None, max_sequence_length: int | None, extra: Mapping[str, Any]
    ) -> dict[str, Any]:
        name = type(self.pipeline).__name__
        if "prompt" not in self._accepted:
            raise ValueError(
                f"`pipeline` is a {name}, whose __call__ takes no prompt; a text-to-image pipeline is needed."
            )
        given = {"guidance_scale": guidance_scale, "max_sequence_length": max_sequence_length}
        given = {key: value for key, value in given.items() if value is not None}
        for key in (*given, *extra):
            if key not in self._accepted:
                where = f"`{key}`" if key in given else f"`pipeline_kwargs` has {key!r}, which"
                raise ValueError(f"{where} is no argument of {name}.__call__, which accepts {sorted(self._accepted)}.")
        taken = sorted(_RESERVED & set(extra))
        if taken:
            raise ValueError(
                f"`pipeline_kwargs` has {taken}, which the rollout sets. Use its own arguments and remove them."
            )
        for key in ("timesteps", "sigmas"):
            if extra.get(key) is not None and len(extra[key]) != self.num_inference_steps:
                raise ValueError(
                    f"`pipeline_kwargs` has {len(extra[key])} {key}, but `num_inference_steps` is {self.num_inference_steps}: "
                    "make them equal."
                )
        defaults = dict(self.family.call_defaults) if self.family is not None else {}
        sizes = {"height": self.height, "width": self.width, "num_inference_steps": self.num_inference_steps}
        # some pipelines, such as those with a `resolution`, take no size
        return {key: value for key, value in (defaults | sizes).items() if key in self._accepted} | given | dict(extra)

    # --- prompts -------------------------------------------------------------------------------------------------------------

    def cache_prompts(self, prompts: Sequence[str], batch_size: int = 16) -> None:
        """Encode prompts once and keep their embeddings on the CPU, for every later `forward` and `generate`.

        Prompts that are cached already are skipped. A pipeline whose family has no row keeps getting its prompts as text, and
        a warning says so.
        """
        if self.family is None:
            logger.warning(
                f"{type(self.pipeline).__name__} is no known family: prompts are not cached, and its text encoders stay. See "
                "diffusers_diffdoctor/treatment/families.py to add it."
            )
            return
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._embeddings]
        self._check_can_encode(missing)
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            for field, values in self._encode(batch).items():
                for prompt, value in zip(batch, values):
                    self._embeddings.setdefault(prompt, {})[field] = self._share(field, value.to("cpu", copy=True))

    def cache_embeddings(self, prompt: str, embeddings: Mapping[str, torch.Tensor]) -> None:
        """Put embeddings that were made elsewhere into the cache, for text encoders too large to be loaded here.

        Args:
            prompt: the text they stand for.
            embeddings: for each argument of the pipeline's `__call__`, such as `"prompt_embeds"`, a tensor without the
                dimension of the batch.
        """
        known = [] if self.family is None else [f for f in self.family.prompt_fields if f in self._accepted]
        required = {field for field in known if not field.startswith("negative_")}
        if not required or required - set(embeddings) or set(embeddings) - set(self._accepted):
            raise ValueError(
                f"`embeddings` has {sorted(embeddings)}, but a {type(self.pipeline).__name__} takes {known}"
                + (f" and needs {sorted(required)}." if required else ": it is no known family.")
            )
        self._embeddings[prompt] = {field: self._share(field, value.cpu()) for field, value in embeddings.items()}

    def _share(self, field: str, value: torch.Tensor) -> torch.Tensor:
        """The embedding of an empty negative prompt is the same for all prompts: keep it once."""
        shared = self._shared.setdefault(field, value)
        return shared if torch.equal(shared, value) else value

    def free_text_encoders(self) -> None:
        """Drop the pipeline's text encoders and tokenizers. From then on only cached prompts can be generated.

        Does nothing for a pipeline whose prompts cannot be cached.
        """
        if self.family is None:
            return
        for name in self._text_components():
            setattr(self.pipeline, name, None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _text_components(self) -> list[str]:
        return [name for name in self.pipeline.components if name.startswith(("text_encoder", "tokenizer"))]

    def _check_can_encode(self, prompts: Sequence[str]) -> None:
        if prompts and all(getattr(self.pipeline, name) is None for name in self._text_components()):
            raise ValueError(
                f"The prompt {prompts[0]!r} was not cached before the text encoders were freed. Pass all prompts, those of "
                "evaluation too, to cache_prompts() first, or keep the text encoders."
            )

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """The arguments of `__call__` that stand for the prompts, each a tensor whose rows are the prompts."""
        pipeline, accepted = self.pipeline, inspect.signature(self.pipeline.encode_prompt).parameters
        # Defaults are those of `__call__`: those of `encode_prompt` may differ.
        options = {
            key: self.call_kwargs.get(key, parameter.default)
            for key, parameter in self._accepted.items()
            if key in accepted
            and key not in _RESERVED - {"max_sequence_length"}
            and "embeds" not in key
            and "mask" not in key
        }
        encoders = [getattr(pipeline, name) for name in self._text_components() if name.startswith("text_encoder")]
        # Not the pipeline's device: the text encoders may be on the GPU while the denoiser is not yet.
        options["device"] = next((encoder.device for encoder in encoders if encoder is not None), pipeline.device)
        # Later texts of the prompt are the prompt itself unless given.
        options |= {key: None for key in ("prompt_2", "prompt_3") if key in accepted and key not in options}
        fixed = {"do_classifier_free_guidance": True, "num_images_per_prompt": 1}
        options |= {key: value for key, value in fixed.items() if key in accepted}
        texts = {key: self._repeat(value, len(prompts)) for key, value in options.items() if key in _TEXTS}
        fields = self._encode_fields(prompts, options | texts)
        negative = self.call_kwargs.get("negative_prompt")
        if (
            negative is not None and "negative_prompt" not in accepted
        ):  # encoded by a call of its own, as for FLUX and Qwen
            second = self.call_kwargs.get("negative_prompt_2", negative)
            options |= {"prompt_2": self._repeat(second, len(prompts))} if "prompt_2" in accepted else {}
            encoded = self._encode_fields(self._repeat(negative, len(prompts)), options)
            fields |= {f"negative_{field}": value for field, value in encoded.items()}
        return {field: value for field, value in fields.items() if field in self._accepted}

    def _encode_fields(self, prompts: list[str], options: dict[str, Any]) -> dict[str, torch.Tensor]:
        results = self.pipeline.encode_prompt(prompt=prompts, **options)
        fields = dict(zip(self.family.prompt_fields, results))
        fields.pop(None, None)
        # Embeddings with a mask have as many tokens as the longest prompt of the batch; a mask of ones may be left out.
        for field in self.family.prompt_fields:
            if field is not None and field.endswith("mask") and fields.get(field) is None:
                embeds = fields[field.removesuffix("_mask") if "embeds" in field else "prompt_embeds"]
                fields[field] = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        return {field: value for field, value in fields.items() if value is not None}

    @staticmethod
    def _repeat(value: Any, count: int) -> Any:
        return [value] * count if isinstance(value, str) else value

    def _prompt_kwargs(self, prompts: list[str]) -> dict[str, Any]:
        """The arguments that stand for the prompts in the pipeline's call: embeddings, or text without a row."""
        if self.family is None:
            texts = {
                key: self._repeat(value, len(prompts)) for key, value in self.call_kwargs.items() if key in _TEXTS
            }
            return {"prompt": prompts} | texts
        return {key: None for key in _TEXTS if key in self._accepted} | self._embed(prompts)

    def _embed(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Embeddings of prompts, from the cache or encoded now, on the denoiser's device."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._embeddings]
        self._check_can_encode(missing)
        rows = self._embeddings
        if missing:
            encoded = self._encode(missing)
            rows = rows | {
                prompt: {key: value[i] for key, value in encoded.items()} for i, prompt in enumerate(missing)
            }
        device = self.denoiser.device
        return {key: _stack([rows[prompt][key].to(device) for prompt in prompts]) for key in rows[prompts[0]]}

    # --- generation ----------------------------------------------------------------------------------------------------------

    def forward(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        regularization_images: torch.Tensor | None = None,
        regularization_prompts: Sequence[str] | None = None,
        regularization_seeds: Sequence[int] | None = None,
        regularization_latents: torch.Tensor | None = None,
        drift: bool = False,
    ) -> RolloutOutput:
        """
        Generate one image for each prompt and, with regularization images, the two sides of the offline loss.

        Everything is in one forward so that a distributed wrapper sees all uses of the denoiser. Without gradients (inside
        `torch.no_grad()`) the images are the same and carry no graph.

        Args:
            prompts: B texts.
            seeds: B numbers. A seed decides an image's noise, whatever the batch it is in, on any device.
            regularization_images: (R, 3, H, W) in [0, 1], of any size that the VAE takes.
            regularization_prompts: their R texts.
            regularization_seeds: R numbers that decide noise and noise level of the offline loss.
            regularization_latents: in place of the images, what `encode_images` made of them.
            drift: also return the drift, see [`drift_step_weight`]; the denoiser must have an adapter.

        Raises:
            ValueError: an argument that does not fit; a prompt that can no longer be encoded; a family without offline loss.
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
            self._check_offline()
        if drift and not getattr(self.denoiser, "_hf_peft_config_loaded", False):
            raise ValueError(
                f"`drift` compares the {self.denoiser_name} with itself without its adapter, but it has none: call "
                f"pipeline.{self.denoiser_name}.add_adapter(...) first."
            )
        calls: list[_Call] | None = [] if drift else None
        images, latents = self._generate(prompts, seeds, calls)
        output = RolloutOutput(images, latents, drift=self._drift(calls, len(prompts)) if drift else None)
        if not offline:
            return output
        if regularization_latents is None:
            regularization_latents = self.encode_images(regularization_images)
        output.prediction, output.target = self.family.offline.predict(
            self.pipeline,
            self.denoiser,
            regularization_latents,
            self._embed(regularization_prompts),
            [torch.Generator().manual_seed(seed) for seed in regularization_seeds],
            self.offline_sigmas,
            self.offline_guidance_scale,
        )
        return output

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], seeds: Sequence[int], batch_size: int = 8) -> torch.Tensor:
        """Images (N, 3, H, W) on the CPU, float32 in [0, 1], without gradient and `batch_size` at a time."""
        prompts, seeds = _check_pairs("prompts", prompts, "seeds", seeds)
        batches = range(0, len(prompts), batch_size)
        return torch.cat(
            [self._generate(prompts[i : i + batch_size], seeds[i : i + batch_size])[0].cpu() for i in batches]
        )

    def _generate(
        self, prompts: list[str], seeds: list[int], calls: "list[_Call] | None" = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, 3, H, W) and latents. What the denoiser was asked in steps whose drift counts is added to `calls`.

        Those steps carry gradient for the drift, but before the window none reaches the latents.
        """
        pipeline, scheduler = self.pipeline, self.pipeline.scheduler
        kwargs = self.call_kwargs | self._prompt_kwargs(prompts)
        # CPU generators give the same noise on every device
        kwargs["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
        wanted = torch.is_grad_enabled()
        before = self.num_inference_steps - self.gradient_steps  # steps before the window
        finished, latents = 0, None
        step = scheduler.step

        def drift_weight() -> float:
            return 0.0 if calls is None else drift_step_weight(finished // scheduler.order, self.num_inference_steps)

        def in_window() -> bool:  # a scheduler of order 2 steps twice for each step but the last
            return finished >= before * scheduler.order

        @functools.wraps(step)  # pipelines look at the arguments that `step` takes
        def counted_step(*args, **kwargs):
            nonlocal finished, latents
            if not in_window():  # a prediction whose drift counts carries gradient
                args, kwargs = _detached(args), _detached(kwargs)
            result = step(*args, **kwargs)
            finished += 1
            latents = result[0]
            torch.set_grad_enabled(wanted and (in_window() or drift_weight() > 0))
            return result

        def record(module, args, kwargs, result):
            if (weight := drift_weight()) > 0:
                calls.append(_Call(args, kwargs, _prediction(result), weight))

        with ExitStack() as stack:
            if calls is not None:
                stack.callback(self.denoiser.register_forward_hook(record, with_kwargs=True).remove)
            # The outer context restores the mode, whatever the inner switches did.
            stack.enter_context(torch.set_grad_enabled(wanted and (in_window() or drift_weight() > 0)))
            stack.enter_context(_replaced(scheduler, "step", counted_step))
            stack.enter_context(_replaced(pipeline, "_progress_bar_config", {"disable": True}))
            if getattr(pipeline, "image_processor", None) is not None:
                stack.enter_context(_replaced(pipeline.image_processor, "denormalize", _denormalize))
            for name in ("watermark", "safety_checker"):  # these leave the graph by way of numpy
                if getattr(pipeline, name, None) is not None:
                    stack.enter_context(_replaced(pipeline, name, None))
            images = self._call(pipeline, **kwargs, output_type="pt", return_dict=False)[0]
        self._check_images(images, finished, len(prompts))
        return images.float(), latents

    def _drift(self, calls: "list[_Call]", count: int) -> torch.Tensor:
        """(B,): the weighted mean over early steps of the squared difference that the adapter makes to the prediction.

        Inside the window the gradient also runs through the latents.
        """
        drift = 0.0
        for call in calls:
            self.denoiser.disable_adapters()
            try:
                with torch.no_grad():
                    untreated = _prediction(self.denoiser(*call.args, **call.kwargs))
            finally:
                self.denoiser.enable_adapters()
            dtype = torch.promote_types(call.prediction.dtype, torch.float32)
            square = (call.prediction.to(dtype) - untreated.to(dtype)).square().flatten(1).mean(1)
            per_image = square.unflatten(0, (-1, count)).mean(0)  # guidance asks for each image twice
            drift = drift + call.weight * per_image
        return drift / sum(call.weight for call in calls)

    def _check_images(self, images: Any, finished: int, count: int) -> None:
        name = type(self.pipeline).__name__
        if not isinstance(images, torch.Tensor) or images.ndim != 4 or images.shape[:2] != (count, 3):
            found = tuple(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
            raise ValueError(
                f"{name} returned {found} for {count} prompts; images of shape ({count}, 3, H, W) are needed."
            )
        if not torch.is_grad_enabled():
            return
        if finished == 0:
            raise ValueError(
                f"{name} does not call the `step` of its scheduler, so no steps can be chosen for gradient."
            )
        if not images.requires_grad and any(parameter.requires_grad for parameter in self.denoiser.parameters()):
            raise ValueError(
                f"The images of {name} carry no gradient although its {self.denoiser_name} has weights to train: something in "
                "its __call__ switches gradients off."
            )

    # --- offline loss --------------------------------------------------------------------------------------------------------

    def _check_offline(self) -> None:
        if self.family is None or self.family.offline is None:
            have = [name for name, family in FAMILIES.items() if family.offline is not None]
            raise ValueError(
                f"The offline loss is not available for {type(self.pipeline).__name__}, only for {have}. Train without "
                "regularization images; the pixel loss needs none."
            )

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Images (R, 3, H, W) in [0, 1] -> latents (R, C, h, w) for `regularization_latents`. Deterministic."""
        self._check_offline()
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"Regularization images have shape {tuple(images.shape)} and type {images.dtype}, but must be floating-point "
                "(R, 3, H, W) in [0, 1]."
            )
        return self.family.offline.encode(self.pipeline, images)

    # --- memory --------------------------------------------------------------------------------------------------------------

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the denoiser's activations in the backward pass. Gradients are the same."""
        self.denoiser.enable_gradient_checkpointing()

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
        """Whether the VAE's activations are recomputed in the backward pass. Gradients are the same."""
        return self.pipeline.vae.is_gradient_checkpointing

    @vae_gradient_checkpointing.setter
    def vae_gradient_checkpointing(self, value: bool) -> None:
        vae = self.pipeline.vae
        if value and not vae._supports_gradient_checkpointing:
            logger.warning(f"{type(vae).__name__} has no gradient checkpointing: it keeps its activations.")
        elif value:
            vae.enable_gradient_checkpointing()
        elif vae.is_gradient_checkpointing:
            vae.disable_gradient_checkpointing()


@dataclass
class _Call:
    """One call of the denoiser in a rollout, what it said, and how much its drift counts."""

    args: tuple
    kwargs: dict[str, Any]
    prediction: torch.Tensor
    weight: float


def drift_step_weight(step: int, num_inference_steps: int) -> float:
    """
    How much the drift of a denoising step counts: `(1 - step / num_inference_steps) ** 8`, and 0 below a tenth. Ours.

    The first steps settle the layout, and with it what differs between two seeds; the later ones must be free to mend.

    Args:
        step: counted from 0.
        num_inference_steps: of the whole rollout.
    """
    weight = (1 - step / num_inference_steps) ** 8
    return weight if weight >= 0.1 else 0.0


def _prediction(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result.sample


def _detached(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {key: _detached(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_detached(item) for item in value)
    return value


def _check_pairs(name: str, values: Any, seeds_name: str, seeds: Any) -> tuple[list[str], list[int]]:
    if isinstance(values, str) or not values:
        raise ValueError(f"`{name}` is {values!r}, but must be a list of at least one text.")
    if seeds is None or len(seeds) != len(values):
        found = "missing" if seeds is None else f"{len(seeds)} numbers"
        raise ValueError(f"`{seeds_name}` is {found} for {len(values)} `{name}`: one seed for each is needed.")
    return list(values), [int(seed) for seed in seeds]


def _stack(rows: list[torch.Tensor]) -> torch.Tensor:
    """Stack embeddings of one prompt each; shorter ones are padded with zeros, which their mask then covers."""
    longest = max(row.shape[0] for row in rows)
    if all(row.shape[0] == longest for row in rows):
        return torch.stack(rows)
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` inside the block.

    Written to the instance's dictionary, because a pipeline's own `__setattr__` would also rewrite its config.
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
