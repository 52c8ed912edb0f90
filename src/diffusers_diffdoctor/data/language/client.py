# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""A request to a language model, its answer, and the client of endpoints that speak the chat completions protocol."""

import base64
import email.utils
import json
import math
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from ...files import digest


NO_KEY = "none"  # is sent where there is no key


@dataclass(frozen=True)
class Request:
    """One question.

    Args:
        text: the question.
        image: bytes of a JPEG or PNG that it is about.
        schema: JSON schema of the answer.
        choices: names among which a model that scores likelihoods chooses; others ignore them.
        most_tokens: of the answer.
        temperature: 0 takes the likeliest answer.
        seed: for models that take one.
    """

    text: str
    image: bytes | None = None
    schema: dict[str, Any] | None = None
    choices: tuple[str, ...] = ()
    most_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0

    def key(self, model: str) -> str:
        """sha256 of the model and of everything that was asked: two requests of one key have one answer."""
        image = None if self.image is None else digest(self.image)
        asked = [model, self.text, image, self.schema, self.choices, self.most_tokens, self.temperature, self.seed]
        return digest(json.dumps(asked, sort_keys=True, ensure_ascii=True))


class Answer(NamedTuple):
    """What a model said, and the tokens it took; `refused` is the reason why it will never answer this request."""

    text: str
    tokens_in: int = 0
    tokens_out: int = 0
    refused: str | None = None


class NoAnswer(RuntimeError):
    """None this time: the same request may be answered later.

    Args:
        reason: in a few words.
        wait: seconds that the server asks to wait.
    """

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.reason, self.wait = reason, wait


class Refused(ValueError):
    """This request will never be answered: it is too large, or not allowed."""


class Client(Protocol):
    """What answers requests. `model` tells it from others in the cache; `concurrency` is how many it takes at a time."""

    model: str
    concurrency: int

    def ask(self, request: Request) -> Answer: ...


@dataclass
class Endpoint:
    """A server that speaks the OpenAI chat completions protocol, asked by [`huggingface_hub.InferenceClient`].

    Args:
        model: what the server calls it.
        base_url: such as `http://localhost:8000/v1`; without one the Hub's inference providers.
        api_key: is sent to this server, and written nowhere. Without one a `base_url` gets the word `none`: the token of the Hub that
            a machine may have is not for strangers.
        timeout: seconds for one answer.
        concurrency: requests under way at a time.
    """

    model: str
    base_url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 120.0
    concurrency: int = 8

    def __post_init__(self):
        from huggingface_hub import InferenceClient

        if not self.model or not isinstance(self.model, str):
            raise ValueError(f"`model` must name the model as the server does, found {self.model!r}.")
        if self.base_url is not None and not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"`base_url` must begin with http:// or https://, found {self.base_url!r:.100}.")
        if not (self.timeout > 0 and math.isfinite(self.timeout)):
            raise ValueError(f"`timeout` must be a positive number of seconds, found {self.timeout}.")
        if self.concurrency < 1:
            raise ValueError(f"`concurrency` must be at least 1, found {self.concurrency}.")
        if self.base_url is None:
            self._client = InferenceClient(token=self.api_key, timeout=self.timeout)
        else:
            # with no key, or an empty one, the client would look for the machine's own and send that
            key = self.api_key or NO_KEY
            self._client = InferenceClient(base_url=self.base_url, api_key=key, timeout=self.timeout)

    def ask(self, request: Request) -> Answer:
        """Ask once.

        Raises:
            NoAnswer: rate limit, failure of the server, time-out, broken connection, or an answer that is none of the protocol.
            Refused: the server will not have this request.
            ValueError: no request will be answered: the key, the model or the address is wrong.
        """
        from huggingface_hub.errors import HfHubHTTPError, HTTPError, InferenceTimeoutError

        try:
            said = self._client.chat_completion(
                _messages(request),
                model=self.model,
                max_tokens=request.most_tokens,
                temperature=request.temperature,
                seed=request.seed,
                response_format=_response_format(request.schema),
            )
            text = said.choices[0].message.content
            usage = said.usage
            counts = (0, 0) if usage is None else (int(usage.prompt_tokens), int(usage.completion_tokens))
            if not isinstance(text, str):
                raise TypeError("no text")
            return Answer(text, *counts)
        except InferenceTimeoutError as error:
            raise NoAnswer(f"no answer within {self.timeout:g} s") from error
        except HfHubHTTPError as error:
            raise self._meaning(error.response) from None  # its text may repeat what was sent
        except HTTPError as error:
            raise NoAnswer(f"connection failed ({type(error).__name__})") from error
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise NoAnswer("an answer that is none of the protocol") from error

    def _meaning(self, response: Any) -> Exception:
        status = response.status_code
        if status in (408, 409, 425, 429) or status >= 500:
            return NoAnswer(f"status {status}", retry_after(response.headers.get("retry-after")))
        where = self.base_url or "the Hub"
        if status in (401, 402, 403):
            return ValueError(
                f"{where} answers with status {status}: the key is missing, wrong, or has no credit. Name the environment "
                "variable that holds it (--api-key-env)."
            )
        if status in (404, 405):
            return ValueError(
                f"{where} answers with status {status}: it has no model {self.model!r}, or speaks no chat completions there. "
                "Check the model and the address, which often ends in /v1."
            )
        return Refused(f"refused with status {status}")


def retry_after(value: str | None) -> float:
    """Seconds that the header `Retry-After` asks to wait: a number, or a date. 0 where it says nothing."""
    if not value:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def _messages(request: Request) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = [{"type": "text", "text": request.text}]
    if request.image is not None:
        kind = "png" if request.image.startswith(b"\x89PNG") else "jpeg"
        url = f"data:image/{kind};base64,{base64.b64encode(request.image).decode()}"
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return [{"role": "user", "content": content if request.image is not None else request.text}]


def _response_format(schema: dict[str, Any] | None) -> dict[str, Any] | None:
    if schema is None:
        return None
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
