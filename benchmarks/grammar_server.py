# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""A stand-in for a language model: a server of chat completions that answers from the grammar of the miniature's captions.

It knows no language and takes no part in any figure of a model; it lets the loop run where no model is.

    python benchmarks/grammar_server.py     # prints the port it listens to
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from diffusers_diffdoctor.miniature.renderer import CATEGORIES, sample_scene


ANSWERED = 20  # prompts


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        category = asked["messages"][0]["content"].split("of this category: ")[1].split(".")[0]
        rng = np.random.default_rng(asked["seed"])
        prompts = (
            [sample_scene(rng, category=category).caption for _ in range(ANSWERED)] if category in CATEGORIES else []
        )
        message = {"role": "assistant", "content": json.dumps({"prompts": prompts})}
        answer = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": asked["model"],
            "system_fingerprint": "",
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def grammar_server() -> Iterator[str]:
    """Runs the server as a process; gives its address."""
    process = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True)
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
