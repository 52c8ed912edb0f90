# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""A Space of the Hub: a folder whose app diagnoses what visitors drop. Nothing here needs gradio; the Space installs it."""

import os
import shutil
from pathlib import Path

import yaml

from .. import __version__
from ..files import write_atomically, written_atomically


GRADIO = "6.31.0"  # that the page was tested with
DETECTOR = "detector"  # folder of the Space with the weights, where they do not lie on the Hub by themselves
WEIGHTS = ("config.json", "model.safetensors", "preprocessor_config.json")
REQUIREMENTS = f"diffusers-diffdoctor[ui]=={__version__}\n"

APP = '''"""Drop images, see where they are broken."""

import os

from diffusers_diffdoctor.cli.diagnose import load_detector
from diffusers_diffdoctor.ui.application import create_application, serve
from diffusers_diffdoctor.ui.looking import Detector


HOST = os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0")
PORT = int(os.environ.get("GRADIO_SERVER_PORT", 7860))
DETECTOR = {detector!r}

detector = Detector(load_detector(DETECTOR), DETECTOR)
serve(create_application(detector=detector, host=HOST, max_upload_megabytes={megabytes}), HOST, PORT, behind_proxy=True)
'''
CARD = """---
{metadata}---

# Artifact detector

Drop generated images and see where they are broken: deformed hands, melted faces, sixth fingers. Yellow, red and magenta show how
certain the detector is. The map of each image and the figures can be downloaded.

- **Detector**: {detector}. What it was trained on, and how often it errs, says its own card.
- **Method**: DiffDoctor (arXiv 2501.12382), by [diffusers-diffdoctor](https://pypi.org/project/diffusers-diffdoctor/) {version}.
- **Your images** are kept for at most a day, in the memory and on the disk of this Space, and go nowhere else.
- **Limits**: at most {megabytes} MB each. A detector finds what it was taught; no mark does not mean that an image is sound.
"""


def write_space(folder: str | os.PathLike, detector: str, *, max_upload_megabytes: int = 20) -> str:
    """Write a folder that is a Space: app.py, requirements.txt, README.md, and the weights of a detector of this machine.

    Args:
        folder: that does not exist yet, or is empty.
        detector: id on the Hub, a folder (whose weights are copied), or "miniature".
        max_upload_megabytes: size of the largest file that a visitor can drop.

    Returns:
        How to upload it.

    Raises:
        ValueError: the folder is not empty, or the detector's folder lacks its weights.
    """
    folder, source = Path(folder), Path(detector)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{str(folder)!r} exists and is not an empty folder: choose another one for the Space.")
    local = source.is_dir()
    if local and not all((source / name).is_file() for name in WEIGHTS[:2]):
        raise ValueError(f"{str(source)!r} is no detector: {WEIGHTS[0]} and {WEIGHTS[1]} are needed.")
    name = DETECTOR if local else detector
    metadata = {"title": "Artifact detector", "emoji": "🩺", "colorFrom": "pink", "colorTo": "blue", "sdk": "gradio"}
    metadata |= {"sdk_version": GRADIO, "app_file": "app.py", "license": "apache-2.0", "pinned": False}
    if not local and "/" in detector:
        metadata["models"] = [detector]
    facts = {
        "metadata": yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True),
        "detector": f"`{source.name if local else detector}`",
        "version": __version__,
        "megabytes": max_upload_megabytes,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(folder) as unfinished:
        unfinished.mkdir()
        write_atomically(unfinished / "app.py", APP.format(detector=name, megabytes=max_upload_megabytes))
        write_atomically(unfinished / "requirements.txt", REQUIREMENTS)
        write_atomically(unfinished / "README.md", CARD.format(**facts))
        if local:
            (unfinished / DETECTOR).mkdir()
            for file in WEIGHTS:
                if (source / file).is_file():
                    shutil.copyfile(source / file, unfinished / DETECTOR / file)
    return f"{folder} is a Space. To upload it: hf upload USER/NAME {folder} . --repo-type space"
