# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Neither the token, nor the home folder, nor the name of the user, in any file that a run writes or uploads."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import hub_server
import pytest
from fixtures.pipelines import tiny_flux
from fixtures.trainer import tiny_detector


TESTS = Path(__file__).parent
USER = "jane-q-public"

CODE = """
import os, sys
from pathlib import Path
import fixtures.runs as runs
from fixtures.runs import TRAINERS
from diffusers_diffdoctor import ArtifactDetectorForSemanticSegmentation

home = Path.home()
assert home.name == {user!r}
settings = dict(push_to_hub=True, hub_model_id="user/run", hub_strategy="all_checkpoints", hub_always_push=True,
    hub_token=os.environ["HF_TOKEN"], max_steps=2, save_steps=1, report_to="tensorboard", eval_strategy="steps", eval_steps=1,
    run_name=str(home / "run"), load_best_model_at_end=True)
if sys.argv[1] == "treatment":
    runs.tiny_flux = lambda: str(home / "flux")  # a folder, as a user has it
    settings |= dict(metric_for_best_model="max_confidence", log_images=1)
    trainer = TRAINERS["treatment"](home / "out", **settings)
    del trainer.write_report  # the real one
else:
    settings |= dict(metric_for_best_model="eval_loss")
    make = runs.tiny_detector
    def from_folder(**changes):
        make(**changes).save_pretrained(home / "start")
        return ArtifactDetectorForSemanticSegmentation.from_pretrained(home / "start")
    runs.tiny_detector = from_folder
    trainer = TRAINERS["detector"](home / "out", **settings)
trainer.train()
trainer.save_model()
trainer.push_to_hub()
"""


def contents(path: Path) -> bytes:
    """The bytes, and those of what is packed in it."""
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return path.read_bytes() + b"".join(archive.read(name) for name in archive.namelist())


@pytest.mark.parametrize("kind", ["treatment", "detector"])
def test_nothing_private_is_written_or_uploaded(tmp_path, kind):
    home = tmp_path / "home" / USER
    home.mkdir(parents=True)
    tiny_flux().save_pretrained(home / "flux")
    tiny_detector().save_pretrained(home / "detector")
    with hub_server.serve() as hub:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
            "OMP_NUM_THREADS": "1",
            "HOME": str(home),
            "USER": USER,
            "LOGNAME": USER,
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": hub_server.TOKEN,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }
        code = [sys.executable, "-c", CODE.format(user=USER), kind]
        done = subprocess.run(code, cwd=home, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        uploaded = hub.files("user/run")
    private = [hub_server.TOKEN, USER, str(tmp_path), str(home)]
    written = {str(path.relative_to(home)): contents(path) for path in (home / "out").rglob("*") if path.is_file()}
    assert len(written) > 15 and any(name.startswith("out/runs/") for name in written) and len(uploaded) > 12
    for name, content in [*written.items(), *uploaded.items()]:
        assert not [word for word in private if word.encode() in content], name
