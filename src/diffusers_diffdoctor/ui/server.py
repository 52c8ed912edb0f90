# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What the page for painting asks its server, in a few routes under `/annotate`. Masks travel as bytes, a byte for each pixel, so that
no encoder of a browser comes between.

A page of another site may send requests to a server on this machine. It cannot send those that write here: their content type is one
that browsers ask about first, and the answer is no. Nor can it read answers under a name of its own: see [`TrustedHostMiddleware`].
"""

import io
import json
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from starlette.middleware.trustedhost import TrustedHostMiddleware

from .queue import Queue, Refused


PAGE = Path(__file__).parent / "page"
# what the page consists of: name -> content type. Nothing else of the folder, or of any other, is served
FILES = {
    "annotate.html": "text/html; charset=utf-8",
    "annotate.css": "text/css; charset=utf-8",
    "annotate.js": "text/javascript; charset=utf-8",
}
BYTES = "application/octet-stream"
LARGEST_REQUEST = 64 * 2**20  # compressed mask; 89 million pixels, the largest image that is read, are far less
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; frame-ancestors 'self' https://huggingface.co",
}


def local_hosts(host: str) -> list[str]:
    """Names under which a server on `host` is asked for: all of them if it listens to other machines, else its own."""
    return ["127.0.0.1", "localhost", "[::1]"] if host in ("127.0.0.1", "localhost", "::1") else ["*"]


def create_server(queue: Queue | None, host: str = "127.0.0.1") -> FastAPI:
    """The server, with the routes of the page for painting where there is a queue."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=local_hosts(host))
    if queue is not None:
        _add_routes(app, queue)
    return app


def _add_routes(app: FastAPI, queue: Queue) -> None:
    @app.exception_handler(Refused)
    def refused(request: Request, error: Refused) -> Response:
        return JSONResponse({"error": str(error)}, 409)

    @app.exception_handler(ValueError)
    def wrong(request: Request, error: ValueError) -> Response:
        return JSONResponse({"error": str(error)}, 400)

    @app.exception_handler(OSError)
    def failed(
        request: Request, error: OSError
    ) -> Response:  # a full disk: the page says so and keeps what was painted
        return JSONResponse({"error": f"Not saved: {error.strerror or error}."}, 507)

    @app.get("/annotate/{name}")
    def page(name: str) -> Response:
        if name not in FILES:
            return JSONResponse({"error": "There is no such page."}, 404)
        return Response(_file(name), media_type=FILES[name], headers=HEADERS)

    @app.get("/annotate/api/settings")
    def settings() -> Response:
        return _json({"kinds": queue.kinds, "loan_seconds": queue.loan_seconds})

    @app.post("/annotate/api/claim")
    async def claim(request: Request) -> Response:
        asked = await _read_json(request)
        annotator, page, key = (asked.get(name) for name in ("annotator", "page", "key"))
        if not isinstance(annotator, str) or not isinstance(page, str) or not 8 <= len(page) <= 64:
            raise ValueError("`annotator` and `page` are needed.")
        if key is not None and not isinstance(key, str):
            raise ValueError("`key` must be a text.")
        item = await run_in_threadpool(queue.claim, annotator, page, key)
        return _json({"item": item, "progress": queue.progress(annotator)})

    @app.get("/annotate/api/image/{key}")
    def image(key: str) -> Response:
        file = io.BytesIO()
        queue.image(key).save(file, "PNG", compress_level=1)
        return Response(file.getvalue(), media_type="image/png", headers=HEADERS)

    @app.get("/annotate/api/suggestion/{key}")
    def suggestion(key: str) -> Response:
        found = queue.suggestion(key)
        return Response(b"" if found is None else found.tobytes(), media_type=BYTES, headers=HEADERS)

    @app.get("/annotate/api/mask/{key}")
    def mask(key: str, annotator: str) -> Response:
        found = queue.annotation(key, annotator)
        array = queue.first_layer(key) if found is None else found.mask
        return Response(array.tobytes(), media_type=BYTES, headers=HEADERS)

    @app.post("/annotate/api/save/{key}")
    async def save(request: Request, key: str, loan: str, state: str, kinds: str = "", seconds: float = 0) -> Response:
        content = await _body(request, BYTES)
        return _json(await run_in_threadpool(_save, queue, key, content, loan, state, kinds, seconds))

    @app.post("/annotate/api/renew/{key}")
    async def renew(request: Request, key: str) -> Response:
        asked = await _read_json(request)
        await run_in_threadpool(queue.renew, key, str(asked.get("loan")))
        return _json({})


def _save(queue: Queue, key: str, content: bytes, loan: str, state: str, kinds: str, seconds: float) -> dict[str, Any]:
    item = queue.item(key)
    mask = np.frombuffer(inflate(content, item.width * item.height), np.uint8).reshape(item.height, item.width)
    chosen = [kind for kind in kinds.split(",") if kind]
    return {"revision": queue.save(key, loan, mask, state, chosen, seconds)}


def inflate(content: bytes, size: int) -> bytes:
    """What zlib made of `size` bytes; never more memory than for those.

    Raises:
        ValueError: it is something else.
    """
    try:
        decoder = zlib.decompressobj()
        found = decoder.decompress(content, size + 1)
    except zlib.error as error:
        raise ValueError(f"The mask is no zlib stream: {error}.") from error
    if len(found) != size or not decoder.eof or decoder.unused_data:
        raise ValueError(f"The mask must have {size} bytes, one for each pixel of its image.")
    return found


def _json(content: Any) -> Response:
    return JSONResponse(content, headers=HEADERS)


async def _read_json(request: Request) -> dict[str, Any]:
    try:
        found = json.loads(await _body(request, "application/json"))
    except json.JSONDecodeError as error:
        raise ValueError(f"The request is no JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError("The request must be a JSON object.")
    return found


async def _body(request: Request, content_type: str) -> bytes:
    """The body of a request of this type, which no form of another site can send."""
    found = request.headers.get("content-type", "")
    if found.split(";")[0].strip() != content_type:
        raise ValueError(f"The content type must be {content_type}, found {found!r:.100}.")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > LARGEST_REQUEST:
            raise ValueError(f"The request is larger than {LARGEST_REQUEST} bytes.")
        parts.append(part)
    return b"".join(parts)


@lru_cache
def _file(name: str) -> bytes:
    return (PAGE / name).read_bytes()
