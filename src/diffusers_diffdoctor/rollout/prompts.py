# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Prompts are remembered, not translated: what a pipeline's own `encode_prompt` returned is given back to it.

Every prompt is encoded alone, so that its embedding never depends on who shared a batch. In a batch, the results are put together
as the pipeline itself stacks them, which is seen by encoding one prompt and the same prompt twice. Prompts whose results have
different shapes are never padded to one another; [`RememberedPrompts.groups`] tells which may share a batch.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from torch import nn

from .call import PipelineCall, for_each, replaced


logger = logging.get_logger(__name__)

Key = tuple  # texts and options of one prompt, as `encode_prompt` was given them
Path = tuple  # of a tensor in what it returned
Growth = int | str | tuple[str, int]  # how it grows with the batch


class NotRemembered(ValueError):
    """A prompt that was not encoded while there were text encoders."""


@dataclass
class Row:
    """What `encode_prompt` returned for one prompt: a tree whose tensors lie on the CPU, and which call it came from."""

    result: Any
    options: str


class RememberedPrompts:
    """
    Stands between a pipeline and its `encode_prompt`.

    Args:
        call: the pipeline's own call.

    Attributes:
        missing: why prompts cannot be remembered for this pipeline, in one line; None where they can.
        takes_device: whether `encode_prompt` can be told where to encode.
    """

    def __init__(self, call: PipelineCall):
        self.call, self.pipeline = call, call.pipeline
        self.encode = getattr(self.pipeline, "encode_prompt", None)
        self.signature = None if self.encode is None else inspect.signature(self.encode)
        self.takes_device = self.signature is not None and "device" in self.signature.parameters
        self.missing: str | None = None
        if self.encode is None:
            self.missing = f"{type(self.pipeline).__name__} has no encode_prompt of its own"
        self.rows: dict[Key, Row] = {}
        self.given: dict[str, Row] = {}
        self.keys_of: dict[tuple[str, str], list[Key]] = {}  # (prompt, arguments of the call) -> what it asked for
        self.dims: dict[tuple[str, Path], Growth] = {}
        self._shared: dict[tuple, torch.Tensor] = {}
        self._asked: list[Key] = []

    # --- filling the memory ------------------------------------------------------------------------------------------------

    def remember(self, prompts: Sequence[str], arguments: Mapping[str, Any]) -> None:
        """Encode prompts that are not known yet, by running the call up to its denoiser, one prompt at a time.

        Args:
            prompts: texts.
            arguments: of the call that they will be used in; guidance, for one, decides what is encoded.
        """
        for prompt in dict.fromkeys(prompts):
            identity = (prompt, _identity(arguments))
            if self.missing is not None or identity in self.keys_of:
                continue
            self._check_can_encode(prompt)
            self._asked = []
            with self.answering():
                generator = [torch.Generator().manual_seed(0)]
                self.call.denoiser_inputs(prompt=[prompt], generator=generator, **for_each(arguments, 1))
            if not self._asked:
                self.missing = f"{type(self.pipeline).__name__} does not call its encode_prompt"
            self.keys_of[identity] = list(dict.fromkeys(self._asked))

    def any_known(self, arguments: Mapping[str, Any]) -> str | None:
        """A prompt that is in memory for calls with these arguments."""
        known = (prompt for prompt, identity in self.keys_of if identity == _identity(arguments))
        return next(known, next(iter(self.given), None))

    def give(self, prompt: str, result: Any) -> None:
        """Results of `encode_prompt` that were made elsewhere, for one prompt (dimension of the batch included)."""
        self.given[prompt] = Row(_mapped(result, lambda path, value: value.detach().cpu()), "given")

    def _check_can_encode(self, prompt: str) -> None:
        names = text_components(self.pipeline)
        if names and all(getattr(self.pipeline, name) is None for name in names) and prompt not in self.given:
            raise NotRemembered(
                f"The prompt {prompt!r} was not cached before the text encoders were freed. Pass all prompts, those of "
                "evaluation too, to cache_prompts() first, or keep the text encoders."
            )

    def free_text_encoders(self, arguments: Sequence[Mapping[str, Any]]) -> bool:
        """Drop text encoders and tokenizers, if the pipeline then still runs with a prompt that it knows.

        Args:
            arguments: of the calls that must run.

        Returns:
            Whether they are gone. If not, `missing` says why.
        """
        names = text_components(self.pipeline)
        kept = {name: getattr(self.pipeline, name) for name in names}
        for name in names:
            setattr(self.pipeline, name, None)
        for each in arguments:
            prompt = self.any_known(each)
            if prompt is None:
                continue
            try:
                with self.answering():
                    self.call.denoiser_inputs(
                        prompt=[prompt], generator=[torch.Generator().manual_seed(0)], **for_each(each, 1)
                    )
            except Exception as error:
                for name, component in kept.items():
                    setattr(self.pipeline, name, component)
                self.missing = (
                    f"{type(self.pipeline).__name__} needs its text encoders for more than encode_prompt "
                    f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
                )
                return False
        return True

    @contextmanager
    def nothing_kept(self) -> Iterator[None]:
        """What is encoded inside the block is forgotten at its end."""
        rows, keys_of = set(self.rows), set(self.keys_of)
        try:
            yield
        finally:
            for memory, before in ((self.rows, rows), (self.keys_of, keys_of)):
                for key in memory.keys() - before:
                    del memory[key]

    # --- answering ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def answering(self) -> Iterator[None]:
        """The pipeline's `encode_prompt` answers from memory inside the block."""
        if self.encode is None:
            yield
            return
        with replaced(self.pipeline, "encode_prompt", self._answer):
            yield

    def _answer(self, *args, **kwargs) -> Any:
        bound = self.signature.bind(*args, **kwargs)
        if any(_is_embedding(name) and value is not None for name, value in bound.arguments.items()):
            return self.encode(*args, **kwargs)
        samples = self._samples(bound)
        rows = [self._row(sample) for sample in samples]
        device = bound.arguments.get("device") or self.pipeline._execution_device
        return self._joined(rows, device)

    def _samples(self, bound: inspect.BoundArguments) -> list[inspect.BoundArguments]:
        """The arguments for each prompt alone. Lists of texts hold one for each."""
        texts = {name: value for name, value in bound.arguments.items() if _is_text(name)}
        lists = [len(value) for value in texts.values() if isinstance(value, (list, tuple))]
        count = max([bound.arguments.get("batch_size") or 1, *lists])
        samples = []
        for i in range(count):
            sample = inspect.BoundArguments(self.signature, bound.arguments.copy())
            for name, value in texts.items():
                if isinstance(value, (list, tuple)):
                    sample.arguments[name] = [value[i if len(value) == count else 0]]
            if "batch_size" in sample.arguments:
                sample.arguments["batch_size"] = 1
            samples.append(sample)
        return samples

    def _row(self, sample: inspect.BoundArguments) -> Row:
        prompt = sample.arguments.get("prompt")
        prompt = prompt[0] if isinstance(prompt, list) else prompt
        if prompt in self.given:
            self._asked.append(("given", prompt))
            return self.given[prompt]
        texts = {name: value for name, value in sample.arguments.items() if _is_text(name)}
        options = repr(
            sorted(
                (name, value)
                for name, value in sample.arguments.items()
                if name != "device" and name not in texts and not _is_embedding(name)
            )
        )
        key = (repr(sorted(texts.items())), options)
        self._asked.append(key)
        if key not in self.rows:
            self._check_can_encode(prompt)
            result = self._encoded(sample)
            self._learn(sample, result, options)
            self.rows[key] = Row(_mapped(result, self._kept_once), options)
        return self.rows[key]

    @torch.no_grad()
    def _encoded(self, sample: inspect.BoundArguments) -> Any:
        """Where the text encoders lie, which need not be where the denoiser does."""
        arguments = {  # lists are copied: Z-Image writes its template into the one it is given
            name: list(value) if isinstance(value, list) else value for name, value in sample.arguments.items()
        }
        sample = inspect.BoundArguments(self.signature, arguments)
        encoders = (getattr(self.pipeline, name) for name in text_components(self.pipeline))
        device = next((encoder.device for encoder in encoders if isinstance(encoder, nn.Module)), None)
        if self.takes_device and device is not None:
            sample.arguments["device"] = device
        return self.encode(*sample.args, **sample.kwargs)

    def _learn(self, sample: inspect.BoundArguments, result: Any, options: str) -> None:
        """Find where each tensor grows with the batch, by encoding the prompt twice in one batch."""
        leaves = dict(_leaves(result))
        if all((options, path) in self.dims for path in leaves):
            return
        pair = inspect.BoundArguments(self.signature, sample.arguments.copy())
        for name, value in sample.arguments.items():
            if _is_text(name) and isinstance(value, list):
                pair.arguments[name] = value * 2
        if "batch_size" in pair.arguments:
            pair.arguments["batch_size"] = 2
        try:
            twice = dict(_leaves(self._encoded(pair)))
        except Exception:  # a pipeline that cannot encode two prompts at once draws them one by one
            twice = {}
        for path, value in leaves.items():
            self.dims[options, path] = _growing(value, twice.get(path))

    def _kept_once(self, path: Path, value: torch.Tensor) -> torch.Tensor:
        """Equal tensors of many prompts, such as the empty negative prompt's, are one tensor."""
        value = value.detach().to("cpu", copy=True)
        shared = self._shared.setdefault((path, value.shape, value.dtype), value)
        return shared if torch.equal(shared, value) else value

    # --- batches -----------------------------------------------------------------------------------------------------------

    def groups(self, prompts: Sequence[str], arguments: Mapping[str, Any]) -> list[list[int]]:
        """The positions of prompts that may share a batch: those whose results have the same shapes.

        Without a memory all do: the pipeline then makes of the texts what it makes of them.
        """
        if self.missing is not None:
            return [list(range(len(prompts)))]
        groups: dict[Any, list[int]] = {}
        for i, prompt in enumerate(prompts):
            groups.setdefault(self._shape(prompt, arguments, i), []).append(i)
        return list(groups.values())

    def _shape(self, prompt: str, arguments: Mapping[str, Any], position: int) -> tuple:
        shape = []
        for key in self.keys_of[prompt, _identity(arguments)]:
            row = self.given[prompt] if key[0] == "given" else self.rows[key]
            for path, value in _leaves(row.result):
                dim = self.dims.get((row.options, path), 0 if row.options == "given" else "alone")
                if dim == "alone":
                    shape.append(position)  # nobody else has it
                elif dim == "list":
                    shape.append((path, dim))
                elif isinstance(dim, tuple):
                    shape.append((path, dim, *(entry.shape for entry in value)))
                else:
                    same = value.shape if isinstance(value, torch.Tensor) and dim != "shared" else id(value)
                    shape.append((path, dim, same))
        return tuple(shape)

    def _joined(self, rows: list[Row], device: torch.device) -> Any:
        first = rows[0]

        def join(path: Path, value: Any, *others: Any) -> Any:
            values = [value, *others]
            dim = self.dims.get((first.options, path), 0)
            if isinstance(dim, tuple):
                return [_stacked(entries, dim[1]).to(device) for entries in zip(*values)]
            if isinstance(value, list):
                return [entry.to(device) for block in zip(*values) for entry in block]
            if not isinstance(value, torch.Tensor):
                return value
            if dim == "shared" or (first.options == "given" and value.ndim < 3 and value.shape[0] != 1):
                return value.to(device)
            if len(values) == 1:
                return value.to(device)
            if dim == "lengths":
                lengths = torch.cat([each.diff() for each in values])
                return torch.cat([value[:1], lengths.cumsum(0).to(value.dtype)]).to(device)
            return _stacked(values, dim).to(device)

        return _mapped(first.result, join, *(row.result for row in rows[1:]), lists=True, others=True)


def _stacked(values: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """One batch of several; guidance may have put two results on top of each other: all first ones, then all second ones."""
    return torch.stack(list(values), dim + 1).flatten(dim, dim + 1)


def text_components(pipeline: DiffusionPipeline) -> list[str]:
    return [name for name in pipeline.components if name.startswith(("text_encoder", "tokenizer"))]


def _is_embedding(name: str) -> bool:
    return "embeds" in name or "mask" in name


def _is_text(name: str) -> bool:
    return name.startswith(("prompt", "negative_prompt")) and not _is_embedding(name)


def _identity(arguments: Mapping[str, Any]) -> str:
    return repr(sorted(arguments.items(), key=lambda item: item[0]))


def _growing(alone: Any, twice: Any) -> Growth:
    """How a result grows from one prompt to two.

    Returns:
        A dimension; `("each", dimension)` of a list's tensors; `"list"` for a list of one entry, or several, for each prompt;
        `"lengths"` for cumulative ones; `"shared"` for what stays the same; `"alone"` if unknown.
    """
    if isinstance(alone, list) and isinstance(twice, list):
        if len(twice) == 2 * len(alone):
            return "list"
        grown = {_growing(a, b) for a, b in zip(alone, twice)} if len(twice) == len(alone) else set()
        grown = grown.pop() if len(grown) == 1 else None
        return ("each", grown) if isinstance(grown, int) else "alone"
    if not isinstance(alone, torch.Tensor):
        return "shared" if twice == alone else "alone"
    if not isinstance(twice, torch.Tensor) or twice.ndim != alone.ndim:
        return "alone"
    if twice.shape == alone.shape:
        return "shared"
    grown = [d for d in range(alone.ndim) if twice.shape[d] != alone.shape[d]]
    if len(grown) == 1 and twice.shape[grown[0]] == 2 * alone.shape[grown[0]]:
        return grown[0]
    if alone.ndim == 1 and alone[0] == 0 and len(twice) - 1 == 2 * (len(alone) - 1):
        return "lengths"  # cumulative lengths of packed sequences
    return "alone"


def _is_entry_list(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(entry, torch.Tensor) for entry in value)


def _leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, (*path, key))
    elif isinstance(tree, (tuple, list)) and not _is_entry_list(tree):
        for i, value in enumerate(tree):
            yield from _leaves(value, (*path, i))
    else:
        yield path, tree


def _mapped(tree: Any, function: Any, *trees: Any, path: Path = (), lists: bool = False, others: bool = False) -> Any:
    """The tree with each tensor replaced by `function(path, tensor, ...)`; lists of tensors and other leaves if asked for."""
    if isinstance(tree, Mapping):
        return {
            key: _mapped(v, function, *(t[key] for t in trees), path=(*path, key), lists=lists, others=others)
            for key, v in tree.items()
        }
    if isinstance(tree, (tuple, list)) and not (lists and _is_entry_list(tree)):
        values = [
            _mapped(v, function, *(t[i] for t in trees), path=(*path, i), lists=lists, others=others)
            for i, v in enumerate(tree)
        ]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    if isinstance(tree, (torch.Tensor, list)) or others:
        return function(path, tree, *trees)
    return tree
