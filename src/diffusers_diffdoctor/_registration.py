# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Make the Auto classes and `pipeline()` of transformers know the detector, without importing torch.

`import diffusers_diffdoctor` must stay light, and `transformers.AutoConfig` imports torch. So each part is registered when
the module that holds its registry has been imported, by us or by anybody. The registries are imported from deep inside
other modules of transformers, whose half-made state our classes must not see; therefore the work waits until the outermost
import of transformers, or of the detector, has ended.
"""

import sys
import threading
import warnings
from importlib.machinery import ModuleSpec, PathFinder


def _register_config():
    from transformers.models.auto.configuration_auto import AutoConfig

    from .detector.configuration_artifact_detector import ArtifactDetectorConfig

    AutoConfig.register(ArtifactDetectorConfig.model_type, ArtifactDetectorConfig, exist_ok=True)


def _register_model():
    from transformers.models.auto.modeling_auto import AutoModelForSemanticSegmentation

    from .detector.configuration_artifact_detector import ArtifactDetectorConfig
    from .detector.modeling_artifact_detector import ArtifactDetectorForSemanticSegmentation

    AutoModelForSemanticSegmentation.register(
        ArtifactDetectorConfig, ArtifactDetectorForSemanticSegmentation, exist_ok=True
    )


def _register_image_processor():
    from transformers.models.auto.image_processing_auto import AutoImageProcessor
    from transformers.utils import is_torchvision_available

    from .detector.configuration_artifact_detector import ArtifactDetectorConfig
    from .detector.image_processing_pil_artifact_detector import ArtifactDetectorImageProcessorPil

    classes = {"pil": ArtifactDetectorImageProcessorPil}
    if is_torchvision_available():
        from .detector.image_processing_artifact_detector import ArtifactDetectorImageProcessor

        classes["torchvision"] = ArtifactDetectorImageProcessor
    AutoImageProcessor.register(ArtifactDetectorConfig, image_processor_classes=classes, exist_ok=True)


def _register_pipeline():
    from transformers.models.auto.modeling_auto import AutoModelForSemanticSegmentation
    from transformers.pipelines import PIPELINE_REGISTRY

    from .detector.pipeline_artifact_detection import TASK, ArtifactDetectionPipeline

    if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(
            TASK, pipeline_class=ArtifactDetectionPipeline, pt_model=AutoModelForSemanticSegmentation, type="image"
        )


class _Registrar:
    """A finder that finds nothing of its own: it lets the usual one find, and watches the import end."""

    packages = ("transformers.", f"{__package__}.detector")

    def __init__(self):
        self.pending = {
            "transformers.models.auto.configuration_auto": _register_config,
            "transformers.models.auto.modeling_auto": _register_model,
            "transformers.models.auto.image_processing_auto": _register_image_processor,
            "transformers.pipelines": _register_pipeline,
        }
        self.imports = threading.local()

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if not name.startswith(self.packages):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or not hasattr(spec.loader, "exec_module"):
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            self.imports.depth = getattr(self.imports, "depth", 0) + 1
            try:
                execute(module)
            finally:
                self.imports.depth -= 1
            self.register()

        spec.loader.exec_module = exec_module  # a loader belongs to one spec, so to this import alone
        return spec

    def register(self) -> None:
        """Register every part whose registry is there, unless an import is still under way in this thread."""
        if getattr(self.imports, "depth", 0):
            return
        self.imports.depth = 1  # our own imports below must not start this again
        try:
            for module in [module for module in self.pending if module in sys.modules]:
                part = self.pending.pop(module, None)
                if part is not None:
                    part()
        except Exception as error:  # somebody's import of transformers must not fail because of us
            warnings.warn(f"diffusers-diffdoctor could not register its detector with transformers: {error!r}")
        finally:
            self.imports.depth = 0
        if not self.pending and self in sys.meta_path:
            sys.meta_path.remove(self)


def install() -> None:
    """Register what can be now, and the rest as soon as transformers is used."""
    if any(type(finder).__name__ == "_Registrar" for finder in sys.meta_path):
        return
    registrar = _Registrar()
    sys.meta_path.insert(0, registrar)
    registrar.register()
