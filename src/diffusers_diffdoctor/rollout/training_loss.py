# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The model's own training loss, from one step of the pipeline's own call.

The call's draw of noise is answered with noised latents, its scheduler holds one noise level, and its step is where the call
ends: model output, sample and layout are the pipeline's own. The target in that layout is the same call with the target put in.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.utils import logging
from torch import nn

from .call import PipelineCall, Reached, decoders, for_each, replaced
from .drift import prediction_of
from .latents import LatentMap, NotInvertible, encode, measure_latent_map
from .noise import LevelScheduler, add_noise, is_flow
from .output import shown, without_frames
from .prompts import NotRemembered, RememberedPrompts


logger = logging.get_logger(__name__)


class NotAvailable(ValueError):
    """This pipeline cannot be asked for its training loss."""


class TrainingLoss:
    """
    Asks a pipeline for the two sides of its training loss.

    What can go wrong is measured before the first use, and then refused: that one step is taken, without guidance, and that
    latents can be turned into what the decoder gets and back.

    Args:
        call: the pipeline's own call.
        prompts: its remembered prompts.
        arguments: of every call.
        sampling: see [`~diffusers_diffdoctor.rollout.noise.draw_flow_sigmas`].
        guidance_scale: embedded guidance of guidance-distilled models; 1 also switches classifier-free guidance off.
    """

    def __init__(
        self,
        call: PipelineCall,
        prompts: RememberedPrompts,
        arguments: Mapping[str, Any],
        sampling: str,
        guidance_scale: float,
    ):
        self.call, self.pipeline, self.prompts, self.sampling = call, call.pipeline, prompts, sampling
        self.arguments = {key: value for key, value in arguments.items() if key not in ("timesteps", "sigmas")}
        self.arguments |= _without_guidance(call, guidance_scale)
        if "num_inference_steps" in call.accepted:
            self.arguments["num_inference_steps"] = 1
        self._map: LatentMap | None = None  # from drawn latents to the decoder's input
        self._layout: LatentMap | None = None  # from drawn latents to what the scheduler's step is given
        self._mu: float | None = None
        self._one_call_for_all_levels = False
        self._missing: str | None = None
        self._measured = False

    # --- what is measured first --------------------------------------------------------------------------------------------

    def missing(self, prompt: str) -> str | None:
        """Why this pipeline cannot be asked, in one line; None where it can. Measured with `prompt` at the first time."""
        if not self._measured and self._missing is None:
            try:
                with torch.no_grad(), _eval(self.call.denoiser), self.prompts.nothing_kept():
                    self.remember([prompt])
                    self._measure(prompt)
                self._measured = True
            except (NotAvailable, NotInvertible) as error:
                self._missing = str(error)
        return self._missing

    def remember(self, prompts: Sequence[str]) -> None:
        """Have the prompts of regularization images in memory. A call that cannot be made makes the loss `missing`."""
        try:
            self.prompts.remember(prompts, self.arguments)
        except NotRemembered:
            raise
        except Exception as error:
            if self.arguments.get("guidance_scale") == 0.0:  # some classes start at 1, which is no guidance there
                self.arguments["guidance_scale"] = 1.0
                return self.remember(prompts)
            reason = f"its call fails with one step: {type(error).__name__}: {error}".splitlines()[0]
            self._missing = reason
            raise NotAvailable(reason) from error

    def _measure(self, prompt: str) -> None:
        device = self.call.denoiser.device
        level = self.pipeline.scheduler.config.num_train_timesteps // 2
        half = torch.tensor([float(level) if is_flow(self.pipeline.scheduler) else level])
        drawn: list[torch.Size] = []
        seen, said = self._step([prompt], None, half, drawn=drawn)
        if not drawn:
            raise NotAvailable("its call draws no latents")
        self._mu, shape = seen.mu, tuple(drawn[0][1:])
        with replaced(self.call.denoiser, "forward", lambda *args, **kwargs: said[0]):
            self._map = measure_latent_map(lambda x: self._decoder_input(prompt, x.to(device), half), shape)
            self._layout = measure_latent_map(
                lambda x: self._step([prompt], x.to(device), half, exact=True)[0].sample, shape
            )
        self._check_plain(prompt, half, said[0])
        levels = torch.tensor([0.4 * level, 1.6 * level]).to(half.dtype)
        pair = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)).to(device)
        alone = torch.cat([self._ask([prompt], pair[i : i + 1], levels[i : i + 1]) for i in range(2)])
        try:
            together = self._ask([prompt] * 2, pair, levels)
            close = (together.float() - alone.float()).norm() <= 0.02 * alone.float().norm()
            self._one_call_for_all_levels = together.shape == alone.shape and bool(close)
        except Exception:  # a loop that cannot do with a vector of levels
            self._one_call_for_all_levels = False

    def _check_plain(self, prompt: str, timesteps: torch.Tensor, said: Any) -> None:
        """What the scheduler is given is what the denoiser says, but for its sign, and not mixed with anything."""
        outputs = []
        for offset in (0.0, 1.0):
            with replaced(self.call.denoiser, "forward", lambda *a, offset=offset, **k: _moved(said, offset)):
                outputs.append(_without_variance(self._step([prompt], None, timesteps)[0]).float())
        difference = (outputs[1] - outputs[0]).abs()
        if not torch.allclose(difference, torch.ones_like(difference), rtol=0, atol=0.05):
            raise NotAvailable("what its scheduler is given is not what its denoiser says")

    def _decoder_input(self, prompt: str, latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        modules, inputs = decoders(self.pipeline), []

        def note(latents, *args, **kwargs):
            inputs.append(latents)
            raise Reached

        with ExitStack() as stack:
            for module in modules:
                stack.enter_context(replaced(module, "decode", note))
            seen, _ = self._step([prompt], latents, timesteps, go_on=bool(modules), exact=True)
        if not modules:
            return seen.sample
        if not inputs:
            raise NotAvailable("its call ends without decoding")
        return inputs[0]

    # --- images to latents -------------------------------------------------------------------------------------------------

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (R, 3, H, W) in [0, 1] -> latents (R, ...), as the pipeline draws its own."""
        modules = decoders(self.pipeline)
        vae = modules[0] if modules else None
        encoded = encode(vae, images, 1 + len(self._map.input_shape))
        if tuple(encoded.shape[1:]) != self._map.input_shape:
            raise ValueError(
                f"Regularization images of {images.shape[-2]} x {images.shape[-1]} pixels are encoded to "
                f"{tuple(encoded.shape[1:])}, but the decoder of this rollout takes {self._map.input_shape}: scale and crop "
                "them to the size of the rollout."
            )
        return self._map.invert(encoded)

    def decode(self, sample: torch.Tensor) -> torch.Tensor:
        """Clean latents (R, ...), as the scheduler's step is given them -> images (R, 3, H, W) in [0, 1]. Differentiable."""
        decoder_input = self._map.send(self._layout.invert(sample))
        modules = decoders(self.pipeline)
        if modules:
            weight = next(modules[0].parameters())
            decoder_input = modules[0].decode(decoder_input.to(weight.device, weight.dtype), return_dict=False)[0]
        return shown(without_frames(decoder_input).float())

    # --- the loss ----------------------------------------------------------------------------------------------------------

    def predict(
        self, latents: torch.Tensor, prompts: Sequence[str], generators: Sequence[torch.Generator]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the denoiser says of noised latents, and what it should say: two tensors of one shape (R, ...).

        Args:
            latents: (R, ...) of [`encode`].
            prompts: R texts.
            generators: R; each decides the noise and its level.
        """
        noised = add_noise(
            self.pipeline.scheduler, latents.to(self.call.denoiser.device), generators, self.sampling, self._mu
        )
        groups = self.prompts.groups(prompts, self.arguments)
        if not self._one_call_for_all_levels:
            groups = [[i] for group in groups for i in group]
        said = [
            self._ask([prompts[i] for i in group], noised.latents[group], noised.timesteps[group]) for group in groups
        ]
        order = torch.tensor([i for group in groups for i in group]).argsort()
        return torch.cat(said)[order.to(said[0].device)], self._layout.apply(noised.target)

    def _ask(self, prompts: list[str], latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the denoiser says of noised latents, in the layout of the scheduler's step."""
        seen, _ = self._step(prompts, latents, timesteps)
        return _without_variance(seen)

    def _step(
        self,
        prompts: list[str],
        latents: torch.Tensor | None,
        timesteps: torch.Tensor,
        go_on: bool = False,
        exact: bool = False,
        drawn: list[torch.Size] | None = None,
    ) -> tuple[LevelScheduler, list[Any]]:
        """One step of the pipeline's call.

        Args:
            prompts: B texts.
            latents: what the draw of noise is answered with; None for noise.
            timesteps: (B,) or (1,).
            go_on: whether the call goes on to its decoder.
            exact: answer in float32 whatever is asked for: for calls whose denoiser is replaced.
            drawn: receives the shapes that are drawn.

        Returns:
            What the scheduler's step was given, and what the denoiser returned in each of its calls.
        """
        level, said = LevelScheduler(self.pipeline.scheduler, timesteps), []
        step = vars(level.scheduler)["step"]
        answered = False

        def answer(shape, *args, **kwargs):
            nonlocal answered
            if drawn is not None:
                drawn.append(torch.Size(shape))
            if latents is None or answered:
                return draw(shape, *args, **kwargs)
            answered = True
            dtype = None if exact else kwargs.get("dtype")
            return latents.reshape(shape).to(kwargs.get("device"), dtype or latents.dtype)

        def ended(*args, **kwargs):
            result = step(*args, **kwargs)
            if not go_on:
                raise Reached
            return result

        def count(module, args, result):
            said.append(result)

        draw, modules = _drawing(self.pipeline)
        ended.__wrapped__ = step
        with ExitStack() as stack:
            stack.callback(self.call.denoiser.register_forward_hook(count).remove)
            stack.enter_context(replaced(self.pipeline, "scheduler", level.scheduler))
            stack.enter_context(replaced(level.scheduler, "step", ended))
            for module in modules:
                stack.enter_context(replaced(module, "randn_tensor", answer))
            stack.enter_context(self.prompts.answering())
            if getattr(self.pipeline, "guider", None) is not None:
                stack.enter_context(replaced(self.pipeline.guider, "_enabled", False))
            try:
                self.call(
                    prompt=list(prompts),
                    generator=[torch.Generator().manual_seed(0) for _ in prompts],
                    **for_each(self.arguments, len(prompts)),
                )
            except Reached:
                pass
        if level.sample is None:
            raise NotAvailable("its call takes no step when it is asked for one")
        if len(said) != 1 or prediction_of(said[0]).shape[0] == 2 * len(prompts):
            raise NotAvailable("its guidance cannot be switched off: the denoiser is asked more than once in a step")
        return level, said


def _without_variance(seen: LevelScheduler) -> torch.Tensor:
    """The model's output in the shape of the latents: what some say beyond that is a learned variance."""
    output, sample = seen.output, seen.sample
    if output.shape != sample.shape and output.shape[1] == 2 * sample.shape[1]:
        output = output.chunk(2, dim=1)[0]
    if output.shape != sample.shape:
        raise NotAvailable(f"its denoiser says {tuple(output.shape)} of latents of shape {tuple(sample.shape)}")
    return output


def _without_guidance(call: PipelineCall, guidance_scale: float) -> dict[str, Any]:
    """Arguments that leave classifier-free guidance out; a guidance that the denoiser is told of is the user's."""
    config = call.denoiser.config
    embedded = bool(config.get("guidance_embeds")) or config.get("time_cond_proj_dim") is not None
    scales = {
        "guidance_scale": guidance_scale if embedded else 0.0,
        "distilled_guidance_scale": guidance_scale,
        "true_cfg_scale": 1.0,
        "pag_scale": 0.0,
    }
    if "guidance_schedule" in call.accepted:  # it always asks twice, and at 1 takes the first answer
        scales |= {"guidance_schedule": None, "guidance_scale": 1.0}
    return {name: value for name, value in scales.items() if name in call.accepted}


def _drawing(pipeline: Any) -> tuple[Callable, list[Any]]:
    """`randn_tensor` and the modules whose code, run by the pipeline, draws with it."""
    names = dict.fromkeys(base.__module__ for base in type(pipeline).__mro__)
    modules = [sys.modules[name] for name in names if hasattr(sys.modules[name], "randn_tensor")]
    if not modules:
        raise NotAvailable("its module draws no noise with randn_tensor")
    return modules[0].randn_tensor, modules


def _moved(said: Any, offset: float) -> Any:
    if isinstance(said, torch.Tensor):
        return said + offset
    if isinstance(said, Mapping):  # an output of diffusers
        return type(said)(**{key: _moved(value, offset) for key, value in said.items()})
    if isinstance(said, (list, tuple)):
        return type(said)(_moved(value, offset) for value in said)
    return said


@contextmanager
def _eval(module: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
