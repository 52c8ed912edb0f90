# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What the server answers, and to whom it does not."""

import io
import zlib

import numpy as np
import pytest
from fixtures.rows import photo_bytes, write_rows
from PIL import Image


pytest.importorskip("gradio", reason="needs gradio: make test-ui")

from fastapi.testclient import TestClient

from diffusers_diffdoctor.data import find_shards
from diffusers_diffdoctor.ui import Queue
from diffusers_diffdoctor.ui.application import create_application
from diffusers_diffdoctor.ui.looking import Detector
from diffusers_diffdoctor.ui.server import create_server, inflate


SIZE = (31, 23)
BYTES = {"Content-Type": "application/octet-stream"}
LOCAL = "http://127.0.0.1:7860"


@pytest.fixture
def queue(tmp_path):
    write_rows(tmp_path / "dataset/train.parquet", [{"image": photo_bytes(seed, SIZE)} for seed in range(2)])
    queue = Queue(find_shards(tmp_path / "dataset"), tmp_path / "queue")
    yield queue
    queue.close()


@pytest.fixture
def client(queue):
    return TestClient(create_server(queue), base_url=LOCAL)


def claim(client, annotator: str = "anna", page: str = "page-one") -> dict:
    answer = client.post("/annotate/api/claim", json={"annotator": annotator, "page": page})
    assert answer.status_code == 200, answer.text
    return answer.json()["item"]


def test_image_and_mask_come_and_go_exactly(client, queue):
    item = claim(client)
    image = Image.open(io.BytesIO(client.get(f"/annotate/api/image/{item['key']}").content))
    assert np.array_equal(np.array(image), np.array(Image.open(io.BytesIO(photo_bytes(0, SIZE)))))
    mask = np.random.default_rng(0).choice(np.array([0, 128, 255], np.uint8), SIZE[::-1])
    query = {"loan": item["loan"], "state": "draft", "kinds": "hand,face", "seconds": 1.5}
    where = f"/annotate/api/save/{item['key']}"
    assert client.post(where, params=query, content=zlib.compress(mask.tobytes()), headers=BYTES).json() == {
        "revision": 1
    }
    got = client.get(f"/annotate/api/mask/{item['key']}", params={"annotator": "anna"}).content
    assert got == mask.tobytes()
    assert queue.annotation(item["key"], "anna").kinds == ("hand", "face")


def test_an_older_page_is_told_so(client):
    old, new = claim(client), claim(client)
    where, body = f"/annotate/api/save/{old['key']}", zlib.compress(bytes(SIZE[0] * SIZE[1]))
    answers = [
        client.post(where, params={"loan": one["loan"], "state": "draft"}, content=body, headers=BYTES)
        for one in (old, new)
    ]
    assert [answer.status_code for answer in answers] == [409, 200]
    assert "opened elsewhere" in answers[0].json()["error"]


@pytest.mark.parametrize(
    "content",
    [b"", b"nonsense", zlib.compress(bytes(10)), zlib.compress(bytes(31 * 23 + 1)), zlib.compress(bytes(31 * 23))[:-4]]
    + [zlib.compress(bytes(31 * 23)) + b"more", zlib.compress(b"\x07" * (31 * 23))],
)
def test_what_is_no_mask_is_refused(client, queue, content):
    item = claim(client)
    query = {"loan": item["loan"], "state": "draft"}
    answer = client.post(f"/annotate/api/save/{item['key']}", params=query, content=content, headers=BYTES)
    assert answer.status_code == 400
    assert queue.annotation(item["key"], "anna") is None


def test_a_bomb_is_not_blown_up():
    with pytest.raises(ValueError, match="must have 1000 bytes"):
        inflate(zlib.compress(bytes(10**8)), 1000)


def test_a_form_of_another_site_cannot_write(client, queue):
    """Types that a browser sends without asking first."""
    item = claim(client)
    body = zlib.compress(bytes(SIZE[0] * SIZE[1]))
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        headers = {"Content-Type": content_type}
        query = {"loan": item["loan"], "state": "done"}
        assert (
            client.post(f"/annotate/api/save/{item['key']}", params=query, content=body, headers=headers).status_code
            == 400
        )
        assert client.post("/annotate/api/claim", content="{}", headers=headers).status_code == 400
    assert (
        "access-control-allow-origin"
        not in client.options("/annotate/api/claim", headers={"Origin": "http://a.b"}).headers
    )


def test_a_name_of_another_site_that_leads_here_is_not_answered(queue):
    """DNS rebinding."""
    for host, status in (("evil.example", 400), ("127.0.0.1", 200), ("localhost", 200)):
        client = TestClient(create_server(queue), base_url=f"http://{host}:7860")
        assert client.get("/annotate/api/settings").status_code == status
    open_to_all = TestClient(create_server(queue, "0.0.0.0"), base_url="http://name.example")
    assert open_to_all.get("/annotate/api/settings").status_code == 200


@pytest.mark.parametrize(
    "name", ["..%2f..%2fqueue.py", "%2e%2e/queue.py", "queue.json", "..%5cqueue.py", "%2fetc%2fpasswd"]
)
def test_nothing_but_the_page_is_served(client, name):
    assert client.get(f"/annotate/{name}").status_code == 404


@pytest.mark.parametrize("key", ["0" * 24, "..%2f..%2fqueue", "%00", "x"])
def test_keys_lead_to_images_only(client, key):
    for what in ("image", "suggestion", "mask"):
        assert client.get(f"/annotate/api/{what}/{key}", params={"annotator": "anna"}).status_code in (400, 404)
    item = claim(client)
    found = client.get(f"/annotate/api/mask/{item['key']}", params={"annotator": "../../anna"})
    assert found.status_code == 400


# --- what gradio serves ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def application(tiny):
    return TestClient(create_application(detector=Detector(tiny, "tiny"), max_upload_megabytes=1), base_url=LOCAL)


@pytest.fixture(scope="module")
def tiny():
    from fixtures.trainer import tiny_detector

    return tiny_detector().eval()


def test_files_of_this_machine_are_not_served(application, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    paths = [
        "/etc/passwd",
        str(secret),
        "../../../../etc/passwd",
        "%2e%2e/%2e%2e/etc/passwd",
        "constraints.txt",
        "setup.py",
    ]
    for path in paths:
        for route in ("/gradio_api/file=", "/file="):
            answer = application.get(f"{route}{path}")
            assert answer.status_code in (403, 404), (route, path, answer.status_code)


def test_an_upload_over_the_limit_is_refused(application):
    for megabytes, status in ((0.5, 200), (1.5, 413)):
        files = {"files": ("image.png", b"x" * int(megabytes * 2**20))}
        assert application.post("/gradio_api/upload", files=files).status_code == status


def test_an_upload_stays_in_its_folder(application):
    answer = application.post("/gradio_api/upload", files={"files": ("../../../../tmp/escaped.png", b"x")})
    assert answer.status_code == 200
    (path,) = answer.json()
    assert ".." not in path and "gradio" in path
