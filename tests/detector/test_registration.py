# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Registration depends on what was imported before, so every case has a process of its own."""

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


def python(code: str, *args) -> str:
    """Runs code, returns its stderr."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:diffusers_diffdoctor", "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


OURS = "import diffusers_diffdoctor"
# Each of these reaches the registries on another way, some of them from deep inside half-imported modules.
BEFORE = {
    "nothing": OURS,
    "auto first": f"from transformers import AutoConfig, AutoModelForSemanticSegmentation, AutoImageProcessor, pipeline\n{OURS}",
    "segformer between": f"{OURS}\nfrom transformers import SegformerForSemanticSegmentation",
}
SLOW = {
    "our pipeline": "from diffusers_diffdoctor import ArtifactDetectionPipeline, ArtifactDetectorConfig",
    "our model": "from diffusers_diffdoctor import ArtifactDetectorForSemanticSegmentation",
    "transformers first": f"import transformers\n{OURS}",
    "trainer between": f"{OURS}\nfrom transformers import Trainer",
    "diffusers between": f"{OURS}\nfrom diffusers import FluxPipeline",
    "trl between": f"{OURS}\nimport trl, peft",
    "our trainer": "from diffusers_diffdoctor import ArtifactDetectorTrainer",
    "twice": f"{OURS}\nimport importlib; importlib.reload(diffusers_diffdoctor)",
}


@pytest.mark.parametrize(
    "before",
    [pytest.param(code, id=name) for name, code in BEFORE.items()]
    + [pytest.param(code, id=name, marks=pytest.mark.slow) for name, code in SLOW.items()],
)
def test_auto_classes_and_task_are_known(folder, before):
    code = f"""
{before}
import sys
from transformers import AutoConfig, AutoImageProcessor, AutoModelForSemanticSegmentation, pipeline
from diffusers_diffdoctor import ArtifactDetectionPipeline, ArtifactDetectorConfig
from diffusers_diffdoctor import ArtifactDetectorForSemanticSegmentation, ArtifactDetectorImageProcessor
folder = sys.argv[1]
assert type(AutoConfig.from_pretrained(folder)) is ArtifactDetectorConfig
assert type(AutoModelForSemanticSegmentation.from_pretrained(folder)) is ArtifactDetectorForSemanticSegmentation
assert type(AutoImageProcessor.from_pretrained(folder)) is ArtifactDetectorImageProcessor
detect = pipeline("artifact-detection", model=folder)
assert type(detect) is ArtifactDetectionPipeline and type(detect.model) is ArtifactDetectorForSemanticSegmentation
assert not [finder for finder in sys.meta_path if type(finder).__name__ == "_Registrar"], "the work is done"
"""
    assert "could not register" not in python(code, folder)


def test_import_is_light_and_stays_so():
    code = f"""
import sys
{OURS}
assert "torch" not in sys.modules and "transformers" not in sys.modules
import transformers
assert "torch" not in sys.modules
"""
    python(code)


def test_failure_to_register_is_a_warning_not_an_error():
    code = """
import sys, warnings
import diffusers_diffdoctor
sys.modules["diffusers_diffdoctor.detector.configuration_artifact_detector"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from transformers import AutoConfig
assert any("could not register" in str(warning.message) for warning in caught), caught
assert AutoConfig.for_model("bert").model_type == "bert"
"""
    python(code)
