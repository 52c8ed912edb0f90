# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Pushing to a Hub and loading by id, against the local server of `hub_server.py`.

`HF_ENDPOINT` is read when `huggingface_hub` is imported, so each push and each load runs in a Python process of its own,
as it would for a user; `hub.python(code)` runs one.
"""

import os
import subprocess
import sys

import hub_server
import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError


@pytest.fixture
def hub(tmp_path):
    """A running hub that can also start processes which talk to it: `hub.python(code, **variables) -> stdout`."""
    with hub_server.serve() as hub:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        environment |= {
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": hub_server.TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
        }

        def python(code: str, home: str = "home", arguments=(), **variables) -> str:
            """Runs `code`; `home` names the download cache, so that another name means an empty cache."""
            done = subprocess.run(
                [sys.executable, "-c", code, *map(str, arguments)],
                env=environment | {"HF_HOME": str(tmp_path / home)} | variables,
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        hub.python = python
        yield hub


@pytest.fixture
def api(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return HfApi(endpoint=hub.endpoint, token=hub_server.TOKEN)


class TestLocalHub:
    """The server answers the real client as the Hub does: otherwise the tests below would prove nothing."""

    def test_binary_files_travel_by_lfs_and_come_back(self, api, hub, tmp_path):
        weights = bytes(range(256)) * 300
        (tmp_path / "model").mkdir()
        (tmp_path / "model/weights.safetensors").write_bytes(weights)
        (tmp_path / "model/notes.txt").write_text("as text")
        assert api.create_repo("diffdoctor/things") == f"{hub.endpoint}/diffdoctor/things"
        info = api.upload_folder(repo_id="diffdoctor/things", folder_path=tmp_path / "model")
        assert list(hub.objects.values()) == [weights]
        assert api.model_info("diffdoctor/things").sha == info.oid
        assert sorted(api.list_repo_files("diffdoctor/things")) == ["notes.txt", "weights.safetensors"]
        loaded = api.hf_hub_download("diffdoctor/things", "weights.safetensors", cache_dir=tmp_path / "cache")
        with open(loaded, "rb") as file:
            assert file.read() == weights

    def test_each_commit_stays_readable(self, api, tmp_path):
        api.create_repo("user/things")
        first = api.upload_file(repo_id="user/things", path_in_repo="a/b.txt", path_or_fileobj=b"one").oid
        api.upload_file(repo_id="user/things", path_in_repo="a/b.txt", path_or_fileobj=b"two")
        for revision, text in [(first, "one"), ("main", "two")]:
            path = api.hf_hub_download("user/things", "a/b.txt", revision=revision, cache_dir=tmp_path)
            with open(path) as file:
                assert file.read() == text
        api.delete_file("a/b.txt", "user/things")
        assert api.list_repo_files("user/things") == []

    def test_refusals(self, api, tmp_path):
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("diffdoctor/nothing")
        api.create_repo("diffdoctor/things", exist_ok=True)
        api.create_repo("diffdoctor/things", exist_ok=True)
        with pytest.raises(HfHubHTTPError, match="409"):
            api.create_repo("diffdoctor/things")
        with pytest.raises(HfHubHTTPError, match="403"):
            api.create_repo("somebody-else/things")
        with pytest.raises(EntryNotFoundError):
            api.hf_hub_download("diffdoctor/things", "nothing.txt", cache_dir=tmp_path)
        with pytest.raises(RevisionNotFoundError):
            api.model_info("diffdoctor/things", revision="v9")
        with pytest.raises(HfHubHTTPError, match="401"):
            api.upload_file(repo_id="diffdoctor/things", path_in_repo="a", path_or_fileobj=b"a", token="hf_wrong")
        with pytest.raises(ValueError, match="Invalid metadata"):
            card = b"---\ntags: [unclosed\n---\n"
            api.upload_file(repo_id="diffdoctor/things", path_in_repo="README.md", path_or_fileobj=card)
