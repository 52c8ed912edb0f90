# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""A server of language models that knows nothing, as a process: chat completions with faults, and a count of everything.

`python language_server.py '{"faults": 0.2}'` prints its port and serves until it is killed. `GET /counts` tells, for each request
body's digest, how often it came and how often it was answered. What it says of an image follows from the image's bytes; of prompts,
from the seed and the grammar below. It stands for a real model in protocol and in faults only.
"""

import hashlib
import json
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


KINDS = ("429", "500", "slow", "drop", "nonsense")
TOKENS_IN, TOKENS_OUT = 100, 10
CATEGORIES = ("hand", "face", "dog", "house", "cup")
COLORS = ("red", "green", "blue", "yellow", "white", "black", "purple", "orange")
PLACES = ("in a garden", "on a wooden table", "under the stars", "beside a river", "in a kitchen", "at the market")
STYLES = ("watercolour", "photograph", "pencil sketch", "oil painting", "woodcut", "comic")


def answer(body: dict) -> dict:
    content = body["messages"][0]["content"]
    if isinstance(content, list):
        url = content[0]["image_url"]["url"]
        number = hashlib.sha256(url.encode()).digest()[0]
        return {"categories": [CATEGORIES[number % 5].title() + "s"]}
    draw = random.Random(body["seed"])
    category = content.split("of this category: ")[1].split(".")[0]
    made = [
        f"a {draw.choice(STYLES)} of the {draw.choice(COLORS)} {category} {draw.choice(PLACES)}, number {draw.randrange(10**6)}"
        for _ in range(10)
    ]
    return {
        "prompts": [
            *made,
            made[0].upper(),
            "ein Bild mit der Hand und dem Hund auf der Straße",
            "nude " + made[1],
            "x",
        ]
    }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status: int, body: bytes, **headers):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        with self.server.lock:
            self.reply(200, json.dumps(self.server.state).encode())

    def do_POST(self):
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        key, body, state = hashlib.sha256(raw).hexdigest(), json.loads(raw), self.server.state
        with self.server.lock:
            state["asked"][key] = state["asked"].get(key, 0) + 1
            state["keys"] = sorted({*state["keys"], str(self.headers["Authorization"])})
            settings = self.server.settings
            fault = random.choice(KINDS) if random.random() < settings.get("faults", 0) else None
            fault = settings.get("always", fault)
            if fault:
                state["faults"][fault] = state["faults"].get(fault, 0) + 1
            else:
                state["answered"][key] = state["answered"].get(key, 0) + 1
        if fault == "429":
            return self.reply(429, b"{}", Retry_After=str(settings.get("retry_after", 0)))
        if fault == "500":
            return self.reply(500, b"down")
        if fault == "400":
            return self.reply(400, b"{}")
        if fault == "401":
            return self.reply(401, b"{}")
        if fault == "slow":
            time.sleep(settings.get("slow", 2))
            return self.reply(200, b"{}")
        if fault == "drop":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return None
        said = "Certainly! {" if fault == "nonsense" else json.dumps(answer(body))
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
        usage = {"prompt_tokens": TOKENS_IN, "completion_tokens": TOKENS_OUT, "total_tokens": TOKENS_IN + TOKENS_OUT}
        done = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "system_fingerprint": ""}
        return self.reply(200, json.dumps(done | {"choices": [choice], "usage": usage}).encode())


def main() -> None:
    class Server(ThreadingHTTPServer):
        request_queue_size = 128

        def handle_error(self, *_):
            pass  # clients that have hung up

    server = Server(("127.0.0.1", 0), Handler)
    server.lock = threading.Lock()
    server.settings = json.loads(sys.argv[1])
    server.state = {"asked": {}, "answered": {}, "faults": {}, "keys": []}
    random.seed(0)
    print(server.server_address[1], flush=True)
    server.serve_forever()


class Server:
    def __init__(self, port: int):
        self.url = f"http://127.0.0.1:{port}/v1"

    def counts(self) -> dict:
        with urllib.request.urlopen(self.url) as response:
            return json.load(response)

    def total(self) -> int:
        return sum(self.counts()["asked"].values())


@contextmanager
def serve(**settings):
    process = subprocess.Popen([sys.executable, __file__, json.dumps(settings)], stdout=subprocess.PIPE, text=True)
    try:
        yield Server(int(process.stdout.readline()))
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
