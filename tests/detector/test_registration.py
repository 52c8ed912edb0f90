# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`import diffusers_diffdoctor` alone teaches transformers the detector. In a process of its own, where nothing else did."""

import os
import subprocess
import sys

import pytest
from fixtures.segformer import tiny_detector


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from diffusers_diffdoctor.detector import ArtifactDetectorImageProcessor

    path = tmp_path_factory.mktemp("detector")
    model = tiny_detector()
    model.save_pretrained(path)
    ArtifactDetectorImageProcessor.for_detector(model.config).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "first", ["import diffusers_diffdoctor", "import transformers.pipelines, diffusers\nimport diffusers_diffdoctor"]
)
def test_auto_classes_and_task_are_known_after_a_plain_import(folder, first):
    code = f"""
{first}
import sys
from transformers import AutoConfig, AutoImageProcessor, AutoModelForSemanticSegmentation, pipeline
folder = sys.argv[1]
config, model = (one.from_pretrained(folder) for one in (AutoConfig, AutoModelForSemanticSegmentation))
detect = pipeline("artifact-detection", model=folder)
for thing in (config, model, AutoImageProcessor.from_pretrained(folder), detect, detect.model):
    print('\\nIS', type(thing).__module__, type(thing).__name__)
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    ours = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("IS ")]
    assert all(module.startswith("diffusers_diffdoctor.detector.") for module, _ in ours)
    assert [name.removesuffix("Pil") for _, name in ours] == [
        "ArtifactDetectorConfig",
        "ArtifactDetectorForSemanticSegmentation",
        "ArtifactDetectorImageProcessor",
        "ArtifactDetectionPipeline",
        "ArtifactDetectorForSemanticSegmentation",
    ]
