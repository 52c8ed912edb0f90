# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Rewards over HTTP, from a server that runs here."""

import base64
import io
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_diffdoctor.rewards import CombinedReward, EndpointReward


def brightness_and_length(body):
    """What a user's server does: decode, score."""
    pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(image)))) for image in body["images"]]
    return [picture.mean() / 255 + len(prompt) for picture, prompt in zip(pictures, body["prompts"])]


@contextmanager
def server(*answers):
    """Each request gets the next of the answers, the last of them for ever: a status and bytes, None for a right answer."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(body)
            answer = answers[min(len(requests), len(answers)) - 1]
            if answer == "slow":
                time.sleep(1)
                return
            if answer is None:
                answer = 200, json.dumps({"scores": brightness_and_length(body)}).encode()
            self.send_response(answer[0])
            self.end_headers()
            self.wfile.write(answer[1])

        def log_message(self, *_):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{httpd.server_address[1]}/score", requests
    finally:
        httpd.shutdown()
        httpd.server_close()


IMAGES, PROMPTS = torch.rand(3, 3, 5, 7, generator=torch.Generator().manual_seed(0)), ["a", "bc", "déf"]


def test_scores_are_those_of_the_server():
    with server(None) as (url, requests):
        for batch_size, asked in ((None, [3]), (2, [2, 1])):
            requests.clear()
            scores = EndpointReward(url, batch_size=batch_size)(IMAGES, PROMPTS)
            expected = IMAGES.mean(dim=(1, 2, 3)) + torch.tensor([1, 2, 3])
            torch.testing.assert_close(scores, expected, atol=2e-3, rtol=0)
            assert [len(request["images"]) for request in requests] == asked
        output = CombinedReward([EndpointReward(url)])(IMAGES, PROMPTS)
        torch.testing.assert_close(output.score, scores)
        with pytest.raises(ValueError, match="The reward `endpoint` gives no gradient"):
            CombinedReward([EndpointReward(url)])(IMAGES.clone().requires_grad_(), PROMPTS)


def test_failures_that_pass_are_tried_again():
    with server((500, b""), (429, b"later"), "slow", None) as (url, requests):
        scores = EndpointReward(url, timeout=0.3, wait=0.01)(IMAGES, PROMPTS)
        assert len(scores) == 3 and len(requests) == 4 and requests[0] == requests[3]


@pytest.mark.parametrize(
    ("answer", "error", "message", "asked"),
    [
        ((503, b"busy"), ConnectionError, "gave no scores in 2 attempts; the last: status 503 busy", 2),
        ("slow", ConnectionError, "in 2 attempts; the last: no answer within 0.2 s", 2),
        ((404, b"no such page"), ValueError, "status 404: no such page", 1),
        ((200, b"<html>"), ValueError, r"answered b'<html>'; expected was \{\"scores\": \[3 finite numbers\]\}", 1),
        ((200, b"[1, 2, 3]"), ValueError, "expected was", 1),
        ((200, b'{"scores": [1, 2]}'), ValueError, r"answered the scores \[1, 2\]; expected was", 1),
        ((200, b'{"scores": [1, 2, NaN]}'), ValueError, r"\[1, 2, nan\]; expected was", 1),
        ((200, b'{"scores": [1, 2, "3"]}'), ValueError, "expected was", 1),
        ((200, b'{"scores": {"a": 1}}'), ValueError, "expected was", 1),
    ],
)
def test_what_does_not_pass_names_the_server(answer, error, message, asked):
    with server(answer) as (url, requests):
        with pytest.raises(error, match=f"The reward at {url} .*{message}"):
            EndpointReward(url, timeout=0.2, retries=1, wait=0)(IMAGES, PROMPTS)
        assert len(requests) == asked


def test_nobody_there():
    with server(None) as (url, _):
        pass
    with pytest.raises(ConnectionError, match=r"in one attempt; the last: .*refused"):
        EndpointReward(url, retries=0)(IMAGES, PROMPTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"url": "file:///etc/passwd"}, "`url` must begin with http"),
        ({"timeout": 0}, "`timeout` must be a positive"),
        ({"retries": -1}, "`retries` and `wait`"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        EndpointReward(**{"url": "http://localhost", **arguments})
    with pytest.raises(ValueError, match="one prompt per image: 3 images"):
        EndpointReward("http://localhost")(IMAGES, ["a"])
