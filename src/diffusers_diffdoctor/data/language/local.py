# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""A model of transformers that looks at pictures and answers, in this process."""

import io
import json
import threading
from functools import cached_property
from typing import Any

import torch

from ...images import read_image
from ...loading import errors_named, weights_sha256
from .client import Answer, Request


SURE = 0.2  # share of the likelihood from which a further name is among the answers


class LocalModel:
    """An `image-text-to-text` model that is asked as an endpoint is.

    Args:
        name: Hub id or folder.
        likelihood: choose among `choices` of a request by their likelihood instead of writing an answer. A model that writes no JSON
            can still do this, and it never names anything else.
        device: of torch.
        dtype: of the weights.
    """

    concurrency = 1

    def __init__(
        self, name: str, *, likelihood: bool = False, device: str = "cpu", dtype: torch.dtype = torch.float32
    ):
        self.name, self.likelihood, self.device, self.dtype = name, likelihood, device, dtype
        self._lock = threading.Lock()

    @cached_property
    def model(self) -> str:
        """What tells its answers from those of others: a digest of its weights, and the way to answer."""
        return f"{weights_sha256(self._loaded[0])}:{self.dtype}:{'likelihood' if self.likelihood else 'written'}"

    @cached_property
    def _loaded(self) -> tuple[torch.nn.Module, Any]:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        with errors_named(self.name, f"`model` {self.name!r}"):
            model = AutoModelForImageTextToText.from_pretrained(self.name, dtype=self.dtype)
            processor = AutoProcessor.from_pretrained(self.name)
        return model.eval().requires_grad_(False).to(self.device), processor

    def ask(self, request: Request) -> Answer:
        with self._lock, torch.inference_mode():
            inputs = self.inputs(request)
            if self.likelihood:
                return self._chosen(request, inputs)
            return self._written(request, inputs)

    def inputs(self, request: Request) -> dict[str, torch.Tensor]:
        """The question as the model reads it, by its chat template where it has one: tensors of a batch of one."""
        _, processor = self._loaded
        images = [] if request.image is None else [read_image(io.BytesIO(request.image))]
        if getattr(processor, "chat_template", None):
            content = [{"type": "image"} for _ in images] + [{"type": "text", "text": request.text}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        else:
            text = f"{getattr(processor, 'image_token', '<image>') * len(images)}\n{request.text}\n"
        given = {"images": images} if images else {}
        return dict(processor(text=[text], return_tensors="pt", **given).to(self.device, self.dtype))

    def _written(self, request: Request, inputs: dict[str, torch.Tensor]) -> Answer:
        model, processor = self._loaded
        chance = (
            {"do_sample": True, "temperature": request.temperature} if request.temperature else {"do_sample": False}
        )
        with torch.random.fork_rng(devices=[self.device] if self.device.startswith("cuda") else []):
            torch.manual_seed(request.seed)
            written = model.generate(**inputs, max_new_tokens=request.most_tokens, **chance)
        asked = inputs["input_ids"].shape[1]
        answer = written[0, asked:]
        return Answer(processor.tokenizer.decode(answer, skip_special_tokens=True), asked, len(answer))

    def _chosen(self, request: Request, inputs: dict[str, torch.Tensor]) -> Answer:
        if not request.choices:
            raise ValueError("A choice by likelihood needs a vocabulary: give one, or let the model write.")
        scores = torch.tensor([self.log_likelihood(inputs, choice) for choice in request.choices])
        shares = scores.softmax(0)
        order = scores.argsort(descending=True, stable=True).tolist()
        names = [request.choices[i] for i in order if i == order[0] or shares[i] >= SURE]
        asked = inputs["input_ids"].shape[1]
        return Answer(json.dumps({"categories": names}), asked * len(request.choices), 0)

    @torch.inference_mode()
    def log_likelihood(self, inputs: dict[str, torch.Tensor], choice: str) -> float:
        """Log of the probability that the model answers `choice` and nothing more (where its tokenizer has an end)."""
        model, processor = self._loaded
        tokens = processor.tokenizer(choice, add_special_tokens=False)["input_ids"]
        if processor.tokenizer.eos_token_id is not None:
            tokens = [*tokens, processor.tokenizer.eos_token_id]
        said = torch.tensor([tokens], device=self.device)
        length = inputs["input_ids"].shape[1]
        longer = {"input_ids": torch.cat([inputs["input_ids"], said], 1)}
        for name, tensor in inputs.items():
            if name != "input_ids":
                per_token = tensor.shape == inputs["input_ids"].shape
                fill = torch.ones_like if name == "attention_mask" else torch.zeros_like
                longer[name] = torch.cat([tensor, fill(said).to(tensor.dtype)], 1) if per_token else tensor
        logits = model(**longer).logits[0, length - 1 : -1].float()
        return logits.log_softmax(-1).gather(1, said[0, :, None]).sum().item()
