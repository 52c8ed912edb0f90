# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""A Hub in one process: the HTTP endpoints that `huggingface_hub` uses to create, fill and read a repository.

It lets the tests push and load by id (`from_pretrained("diffdoctor/detector")`) with the real client and no network. What it
speaks, for models and datasets: repository creation, preupload, Git LFS batch + upload + verify, commit (ndjson), info, tree,
paths-info, branches, resolve, whoami and the check of a card's metadata. What it leaves out: Xet storage (the client falls back
to LFS under `HF_HUB_DISABLE_XET=1`), spaces, pull requests, pagination, ranges and private repositories.

As on the real Hub, whatever writes needs a token, a missing repository and a missing file are told apart by `X-Error-Code`,
binary files travel by LFS only, and an LFS object whose bytes do not hash to its name is refused.
"""

import base64
import hashlib
import json
import math
import re
import socket
import struct
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


TOKEN = "hf_dummy_token_of_the_local_hub"
USER = "user"
ORGANIZATIONS = ("diffdoctor",)

# The Hub decides by suffix (through .gitattributes) and by size.
LFS_SUFFIXES = {".safetensors", ".bin", ".pt", ".png", ".jpg", ".npz", ".parquet"}
LFS_FROM_BYTES = 10 * 1024 * 1024


class HubError(Exception):
    """Turned into the Hub's way of saying no: a status, an error code for the client and a sentence for the reader."""

    def __init__(self, status: int, message: str, code: str | None = None, **body):
        super().__init__(message)
        self.status, self.code, self.body = status, code, body


@dataclass
class Fault:
    """What goes wrong with a request whose "METHOD /path" has `pattern` in it: a status, "reset" (the connection breaks) or
    "silence" (it stays open, and nothing comes). A status 429 asks to wait for `retry_after` seconds."""

    pattern: str
    kind: int | str
    times: float = math.inf
    retry_after: int = 0


class Hub:
    """The store: repositories as lists of commits, large objects by their sha256, and a log of requests."""

    def __init__(self):
        self.branches = {}  # "owner/name", or "datasets/owner/name" -> {branch: commit id}
        self.commits = {}  # commit id -> {path: (bytes, sha256 if it came through LFS else None)}
        self.objects = {}  # sha256 -> bytes
        self.requests = []  # "METHOD /path", in order of arrival
        self.lock = threading.RLock()
        self.faults = []  # `Fault`s, the first that matches is taken
        self.closing = threading.Event()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository holds at a revision: {path: bytes}."""
        return {path: data for path, (data, _) in self.commits[self.commit_of(repo_id, revision)].items()}

    def commit_of(self, repo_id: str, revision: str = "main") -> str:
        if repo_id not in self.branches:
            raise HubError(404, "Repository not found", "RepoNotFound")
        commit = self.branches[repo_id].get(revision, revision)
        if commit not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def commit(self, repo_id: str, revision: str, files: dict) -> str:
        listing = sorted((path, hashlib.sha256(data).hexdigest()) for path, (data, _) in files.items())
        identity = json.dumps([repo_id, self.branches[repo_id].get(revision), listing])
        commit = hashlib.sha1(identity.encode()).hexdigest()
        self.commits[commit] = files
        self.branches[repo_id][revision] = commit
        return commit


def blob_id(data: bytes) -> str:
    """The name git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def file_entry(path: str, data: bytes, sha256: str | None) -> dict:
    entry = {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}
    if sha256 is not None:
        entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 127}
    return entry


def card_metadata(content: str) -> dict:
    """The YAML block on top of a model card; a `yaml.YAMLError` where it is not YAML."""
    block = re.match(r"---\r?\n(.*?)\r?\n---", content, re.S)
    return (yaml.safe_load(block.group(1)) or {}) if block else {}


# --- endpoints: each takes the hub, a request and the parts of the path, and returns what is sent back as JSON -----------

ROUTES = []
# a repository as addresses name it
API = r"/api/(?P<repo>(?:models|datasets)/[^/]+/[^/]+)"
FILES = r"/(?P<repo>(?:datasets/)?[^/]+/[^/]+)"


def route(method: str, pattern: str, writes: bool = False):
    def register(function):
        ROUTES.append((method, re.compile(pattern + r"/?$"), writes, function))
        return function

    return register


@route("GET", r"/api/whoami-v2", writes=True)
def whoami(hub, request):
    return {"type": "user", "name": USER, "fullname": USER, "orgs": [{"name": name} for name in ORGANIZATIONS]}


@route("POST", r"/api/repos/create", writes=True)
def create_repo(hub, request):
    wanted = json.loads(request.body)
    owner = wanted.get("organization") or USER
    kind = wanted.get("type") or "model"
    if kind not in ("model", "dataset"):
        raise HubError(400, "This hub holds models and datasets only")
    if owner not in (USER, *ORGANIZATIONS):
        raise HubError(403, f"You don't have the rights to create a {kind} under the namespace {owner!r}")
    repo_id = f"{owner}/{wanted['name']}"
    repo = repo_id if kind == "model" else f"datasets/{repo_id}"
    url = f"{request.endpoint}/{repo}"
    if repo in hub.branches:
        raise HubError(409, f"You already created this {kind} repo", url=url)
    hub.branches[repo] = {}
    hub.commit(repo, "main", {})
    return {"url": url, "name": repo_id, "id": repo_id}


@route("POST", r"/api/validate-yaml")
def validate_yaml(hub, request):
    try:
        metadata = card_metadata(json.loads(request.body)["content"])
    except yaml.YAMLError as error:
        raise HubError(400, "Invalid metadata", errors=[{"message": str(error)}], warnings=[]) from error
    warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
    return {"errors": [], "warnings": warnings}


@route("POST", API + r"/preupload/(?P<revision>[^/]+)", writes=True)
def preupload(hub, request, repo, revision):
    hub.commit_of(repo, revision)

    def mode(file):
        large = file["size"] >= LFS_FROM_BYTES or PurePosixPath(file["path"]).suffix in LFS_SUFFIXES
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

    return {"files": [mode(file) for file in json.loads(request.body)["files"]]}


@route("POST", FILES + r"\.git/info/lfs/objects/batch", writes=True)
def lfs_batch(hub, request, repo):
    hub.commit_of(repo)

    def instructions(wanted):
        answer = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in hub.objects:
            answer["actions"] = {
                "upload": {"href": f"{request.endpoint}/storage/{wanted['oid']}", "header": {}},
                "verify": {"href": f"{request.endpoint}/{repo}.git/info/lfs/objects/verify", "header": {}},
            }
        return answer

    return {"transfer": "basic", "objects": [instructions(wanted) for wanted in json.loads(request.body)["objects"]]}


@route("PUT", r"/storage/(?P<oid>[0-9a-f]{64})")
def lfs_upload(hub, request, oid):
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise HubError(400, "The content does not hash to the object's name")
    hub.objects[oid] = request.body
    return {}


@route("POST", FILES + r"\.git/info/lfs/objects/verify", writes=True)
def lfs_verify(hub, request, repo):
    wanted = json.loads(request.body)
    if len(hub.objects.get(wanted["oid"], b"")) != wanted["size"]:
        raise HubError(404, "Object not found, or of another size")
    return {}


@route("POST", API + r"/commit/(?P<revision>[^/]+)", writes=True)
def commit(hub, request, repo, revision):
    files = dict(hub.commits[hub.commit_of(repo, revision)])
    for line in request.body.splitlines():
        item = json.loads(line)
        key, value = item["key"], item["value"]
        if key == "file":
            files[value["path"]] = (base64.b64decode(value["content"]), None)
        elif key == "lfsFile":
            if value["oid"] not in hub.objects:
                raise HubError(400, f"{value['path']}: its LFS object was never uploaded")
            files[value["path"]] = (hub.objects[value["oid"]], value["oid"])
        elif key == "deletedFile":
            if files.pop(value["path"], None) is None:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
        elif key == "deletedFolder":
            folder = value["path"].rstrip("/") + "/"
            files = {path: file for path, file in files.items() if not path.startswith(folder)}
        elif key != "header":
            raise HubError(400, f"Unknown operation {key!r}")
    oid = hub.commit(repo, revision, files)
    return {
        "success": True,
        "commitOid": oid,
        "commitUrl": f"{request.endpoint}/{repo}/commit/{oid}",
        "hookOutput": "",
    }


@route("POST", API + r"/branch/(?P<branch>[^/]+)", writes=True)
def create_branch(hub, request, repo, branch):
    start = hub.commit_of(repo, json.loads(request.body or b"{}").get("startingPoint", "main"))
    if branch in hub.branches[repo]:
        raise HubError(409, "Reference already exists")
    hub.branches[repo][branch] = start
    return {}


@route("GET", API + r"(?:/revision/(?P<revision>[^/]+))?")
def info(hub, request, repo, revision):
    oid = hub.commit_of(repo, revision or "main")
    files = hub.commits[oid]
    metadata = card_metadata(files["README.md"][0].decode()) if "README.md" in files else {}
    name = repo.removeprefix("datasets/")
    info = {"_id": oid[:24], "id": name, "modelId": name, "author": name.split("/")[0], "sha": oid, "private": False}
    info |= {"gated": False, "disabled": False, "downloads": 0, "likes": 0, "cardData": metadata}
    info |= {"tags": metadata.get("tags", []), "siblings": [{"rfilename": path} for path in sorted(files)]}
    return info | {key: metadata[key] for key in ("pipeline_tag", "library_name") if key in metadata}


@route("GET", API + r"/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?")
def tree(hub, request, repo, revision, folder):
    files = hub.commits[hub.commit_of(repo, revision)]
    prefix = f"{folder}/" if folder else ""
    inside = {path: file for path, file in sorted(files.items()) if path.startswith(prefix)}
    if folder and not inside:
        raise HubError(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
    folders = {str(parent) for path in inside for parent in PurePosixPath(path).parents} - {".", folder}
    entries = [
        {"type": "directory", "path": path, "size": 0, "oid": blob_id(path.encode())} for path in sorted(folders)
    ]
    entries += [file_entry(path, *file) for path, file in inside.items()]
    if request.query.get("recursive", ["false"])[0].lower() != "true":
        entries = [entry for entry in entries if "/" not in entry["path"][len(prefix) :]]
    return entries


@route("POST", API + r"/paths-info/(?P<revision>[^/]+)")
def paths_info(hub, request, repo, revision):
    files = hub.commits[hub.commit_of(repo, revision)]
    wanted = parse_qs(request.body.decode()).get("paths", [])
    return [file_entry(path, *files[path]) for path in wanted if path in files]


@route("GET", FILES + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(hub, request, repo, revision, path):
    oid = hub.commit_of(repo, revision)
    request.headers_out["X-Repo-Commit"] = oid
    if path not in hub.commits[oid]:
        raise HubError(404, "Entry not found", "EntryNotFound")
    data, sha256 = hub.commits[oid][path]
    request.headers_out["ETag"] = f'"{sha256 or blob_id(data)}"'
    if sha256 is not None:
        request.headers_out |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(data))}
    return data


# --- the server -----------------------------------------------------------------------------------------------------------


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass  # the tests read `hub.requests`

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self):
        hub = self.server.hub
        url = urlsplit(self.path)
        self.body, self.query, self.headers_out = self.read_body(), parse_qs(url.query), {}
        self.endpoint = self.server.endpoint
        method = "GET" if self.command == "HEAD" else self.command
        fault = self.next_fault(hub, f"{self.command} {url.path}")
        if fault is not None and fault.kind == "silence":
            hub.closing.wait()
        if fault is not None and isinstance(fault.kind, str):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        with hub.lock:
            hub.requests.append(f"{self.command} {url.path}")
            try:
                if fault is not None:
                    self.headers_out |= {"Retry-After": str(fault.retry_after)} if fault.kind == 429 else {}
                    raise HubError(fault.kind, f"A fault of the test, {fault.kind}")
                status, result = 200, self.dispatch(hub, method, url.path)
            except HubError as error:
                status, result = error.status, {"error": str(error), **error.body}
                self.headers_out["X-Error-Message"] = str(error)
                if error.code is not None:
                    self.headers_out["X-Error-Code"] = error.code
        content = result if isinstance(result, bytes) else json.dumps(result).encode()
        self.send_response(status)
        self.send_header(
            "Content-Type", "application/octet-stream" if isinstance(result, bytes) else "application/json"
        )
        self.send_header("Content-Length", str(len(content)))
        for name, value in self.headers_out.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def next_fault(self, hub, request):
        with hub.lock:
            for fault in hub.faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    hub.requests.append(f"{request} -> {fault.kind}")
                    return fault
        return None

    def dispatch(self, hub, method, path):
        for wanted, pattern, writes, function in ROUTES:
            match = pattern.match(path)
            if wanted == method and match:
                if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    raise HubError(401, "Invalid credentials in Authorization header")
                parts = {key: value and unquote(value) for key, value in match.groupdict().items()}
                if "repo" in parts:
                    parts["repo"] = parts["repo"].removeprefix("models/")
                return function(hub, self, **parts)
        raise HubError(404, f"This hub has no {method} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = answer


@contextmanager
def serve():
    """Runs a hub on a free local port; yields the `Hub`, its address in `hub.endpoint`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.hub = hub = Hub()
    server.endpoint = hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
