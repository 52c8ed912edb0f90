# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""A reward that another process, or another machine, computes: images go out over HTTP, scores come back."""

import base64
import io
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Sequence

import torch

from ..images import read_image


TRY_AGAIN = (408, 425, 429)  # and everything from 500 on
MOST_BYTES = 2**24  # of an answer
LONGEST_WAIT = 30.0  # seconds between two attempts


class EndpointReward:
    """Ask a server for scores.

    It gets a POST of `{"images": [...], "prompts": [...]}`, a PNG in base64 and a text for each image, and answers `{"scores":
    [...]}`, a number for each, higher is better. Scores carry no gradient: for policy gradients, ranking and evaluation.

    Args:
        url: `http://` or `https://`.
        timeout: seconds for one answer.
        retries: how often a request is sent again that was not answered, or with status 408, 425, 429, or 500 and above.
        wait: seconds before the first of these; twice as many before each next one, at most 30.
        batch_size: most images in a request; all of them in one without it.

    Calling it with images, float (B, 3, H, W) in [0, 1], and B prompts returns scores (B,), in float32.

    Raises:
        ValueError: a wrong argument; and of a call, an answer that is not what was asked for, or a status that says that asking again
            would not help.
        ConnectionError: the server did not answer, however often it was asked.
    """

    __name__ = "endpoint"

    def __init__(
        self, url: str, timeout: float = 60.0, retries: int = 3, wait: float = 1.0, batch_size: int | None = None
    ):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"`url` must begin with http:// or https://, found {url!r:.100}.")
        if not (timeout > 0 and math.isfinite(timeout)):
            raise ValueError(f"`timeout` must be a positive number of seconds, found {timeout}.")
        if retries < 0 or not (wait >= 0 and math.isfinite(wait)):
            raise ValueError(f"`retries` and `wait` must be at least 0, found {retries} and {wait}.")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, found {batch_size}.")
        self.url, self.timeout, self.retries, self.wait = url, timeout, retries, wait
        self.batch_size = batch_size

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        if isinstance(prompts, str) or len(prompts) != len(images):
            raise ValueError(f"Pass a list of one prompt per image: {len(images)} images, prompts {prompts!r:.80}.")
        size = self.batch_size or max(1, len(images))
        scores = []
        for start in range(0, len(images), size):
            scores += self._ask(images[start : start + size], list(prompts[start : start + size]))
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _ask(self, images: torch.Tensor, prompts: list[str]) -> list[float]:
        body = json.dumps({"images": [_png(image) for image in images], "prompts": prompts}).encode()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(self.wait * 2 ** (attempt - 1), LONGEST_WAIT))
            try:
                request = urllib.request.Request(self.url, data=body, headers=headers, method="POST")
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return self._scores(answer.read(MOST_BYTES), len(images))
            except urllib.error.HTTPError as error:
                with error:
                    said = " ".join(error.read(2000).decode("utf-8", "replace").split())[:200]
                if error.code < 500 and error.code not in TRY_AGAIN:
                    raise ValueError(f"The reward at {self.url} answered with status {error.code}: {said}") from None
                why = f"status {error.code} {said}".strip()
            except TimeoutError:
                why = f"no answer within {self.timeout:g} s"
            except (OSError, urllib.error.URLError) as error:  # a broken connection, or none
                reason = getattr(error, "reason", error)
                timed_out = isinstance(reason, TimeoutError)
                why = f"no answer within {self.timeout:g} s" if timed_out else f"{reason}"
        times = f"{self.retries + 1} attempts" if self.retries else "one attempt"
        raise ConnectionError(f"The reward at {self.url} gave no scores in {times}; the last: {why}.")

    def _scores(self, answer: bytes, count: int) -> list[float]:
        expected = f'expected was {{"scores": [{count} finite numbers]}}'
        try:
            scores = json.loads(answer)["scores"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ValueError(f"The reward at {self.url} answered {answer[:100]!r}; {expected}.") from None
        numbers = isinstance(scores, list) and all(
            isinstance(score, (int, float)) and math.isfinite(score) for score in scores
        )
        if not numbers or len(scores) != count:
            raise ValueError(f"The reward at {self.url} answered the scores {scores!r:.200}; {expected}.")
        return [float(score) for score in scores]


def _png(image: torch.Tensor) -> str:
    file = io.BytesIO()
    read_image(image.detach().float().clamp(0, 1).cpu()).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
