# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The package as a whole: what is imported when, metadata, the wheel's content, the direction of imports, warnings as errors."""

import ast
import importlib.metadata
import inspect
import shutil
import subprocess
import sys
import warnings
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import diffusers_diffdoctor


ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src/diffusers_diffdoctor"
CLASSES = [name for name in diffusers_diffdoctor.__all__ if name != "__version__"]


def modules_after(code: str) -> set[str]:
    code += "\nimport sys; print('MODULES', *sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_help_loads_nothing_heavy():
    loaded = modules_after(
        "from diffdoctor import main\ntry: main(['--help'])\nexcept SystemExit as end: assert not end.code"
    )
    assert "diffdoctor" in loaded
    assert not loaded & {"torch", "transformers", "diffusers", "numpy", "PIL", "diffusers_diffdoctor"}


def test_import_loads_no_trainer_and_no_diffusers():
    loaded = modules_after("import diffusers_diffdoctor as package; dir(package); package.__version__")
    assert "diffusers_diffdoctor" in loaded
    assert not loaded & {"diffusers", "trl", "datasets", "matplotlib"}


@pytest.mark.parametrize("name", CLASSES)
def test_public_names_exist_and_explain_themselves(name):
    thing = getattr(diffusers_diffdoctor, name)
    assert name in dir(diffusers_diffdoctor)
    # `__dict__`, because a docstring inherited from the library would say nothing about ours
    documentation = thing.__dict__.get("__doc__") or "" if inspect.isclass(thing) else thing.__doc__ or ""
    assert len(documentation.split()) >= 12, f"{name} has no docstring that a user could work from"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="ArtifactDetektor"):
        _ = diffusers_diffdoctor.ArtifactDetektor


def test_metadata():
    metadata = importlib.metadata.metadata("diffusers-diffdoctor")
    assert metadata["Version"] == diffusers_diffdoctor.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert {"test", "quality", "docs"} <= set(metadata.get_all("Provides-Extra"))
    assert "Apache-2.0" in (metadata["License-Expression"], metadata["License"])
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="diffdoctor")
    assert callable(script.load())


def test_constraints_pin_every_direct_requirement_within_its_range():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    wanted = [Requirement(line) for line in importlib.metadata.requires("diffusers-diffdoctor")]
    for requirement in wanted:
        if requirement.name in pins:
            assert requirement.specifier.contains(pins[requirement.name]), f"{requirement} vs {pins[requirement.name]}"
    assert set(pins) - {"tokenizers", "torchvision"} <= {requirement.name for requirement in wanted}


def test_pre_commit_lints_with_the_version_that_is_pinned():
    (hooks,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert f"ruff=={hooks['rev'].removeprefix('v')}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == diffusers_diffdoctor.__version__
    assert citation["license"] == "Apache-2.0"
    paper = citation["preferred-citation"]
    assert paper["identifiers"][0]["value"] == "arXiv:2501.12382"
    assert len(paper["authors"]) == 7


def test_wheel_holds_all_the_package_and_nothing_else(tmp_path):
    """Built from a copy, as `pip install` from git would, so that no build folder is left in the tree."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=ignored)
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    (tmp_path / "dist").mkdir()
    done = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        built = {name for name in archive.namelist() if not name.endswith("/")}
    package = {str(path.relative_to(tmp_path / "src")) for path in (tmp_path / "src").rglob("*") if path.is_file()}
    package = {name for name in package if ".egg-info" not in name}
    assert "diffusers_diffdoctor/py.typed" in built
    assert {name for name in built if ".dist-info/" not in name} == package
    assert any(name.endswith("licenses/LICENSE") for name in built)


# --- imports run downward only (docs/source/design.md) -------------------------------------------------------------------

# From the ground up. A module of its own line stands lower than its room.
FLOORS = [
    {"disk", "files", "seeds"},
    {"images", "loading", "names", "pictures", "tables"},
    {"training", "inpainting", "evaluation.metrics", "evaluation.detector_figures", "treatment.losses"},
    {"detector"},
    {"rewards", "evaluation", "rollout"},
    {"treatment", "data", "repair"},
    {"miniature"},
    {"ui"},
    {"cli"},
]


def floor(module: str) -> int:
    parts = module.split(".")
    for name in (".".join(parts[:2]), parts[0]):
        for height, rooms in enumerate(FLOORS):
            if name in rooms:
                return height
    raise AssertionError(f"{module} has no floor: add its room to the picture of the house and to FLOORS")


def imports_of(path: Path) -> set[str]:
    """Our own modules that a file imports, at any depth of its code: 'room.module' or 'room'."""
    package = list(path.relative_to(SOURCE).with_suffix("").parts)[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
                module = ".".join(["diffusers_diffdoctor", *base, *([node.module] if node.module else [])])
            else:
                module = node.module
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".", 1)[1] for name in names if name.startswith("diffusers_diffdoctor.")}
    return found


def test_imports_run_downward_only():
    uphill = []
    for path in SOURCE.rglob("*.py"):
        parts = list(path.relative_to(SOURCE).with_suffix("").parts)
        if len(parts) == 1 and parts[0].startswith("_"):
            continue  # the package's own top knows every room
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        for target in imports_of(path):
            if target.split(".")[0] == parts[0] or target.startswith("__"):
                continue
            if floor(target) >= floor(".".join(parts)):
                uphill.append(f"{'.'.join(parts)} imports {target}")
    assert not uphill


def test_no_module_imports_itself_in_a_circle():
    """Not within functions either, nor for type checkers: what needs each other belongs together."""
    modules = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    del modules[""]  # the package's own top knows every room
    graph = {}
    for name, path in modules.items():
        targets = [target.split(".") for target in imports_of(path)]
        prefixes = ([".".join(target[:end]) for end in range(len(target), 0, -1)] for target in targets)
        graph[name] = {next((prefix for prefix in known if prefix in modules), name) for known in prefixes} - {name}
    TopologicalSorter(graph).prepare()  # its error names the circle


# --- pytest's own settings -----------------------------------------------------------------------------------------------


def test_warnings_of_our_code_are_errors_and_those_of_others_are_not():
    """The module that a warning is attributed to decides: one of ours at any depth, or another library's."""
    code = compile("import warnings; warnings.warn('raised by a test', DeprecationWarning)", "<test>", "exec")
    for name in ("diffusers_diffdoctor", "diffusers_diffdoctor.treatment.trainer"):
        with pytest.raises(DeprecationWarning):
            exec(code, {"__name__": name})
    with warnings.catch_warnings(record=True) as seen:
        exec(code, {"__name__": "another_library"})
    assert len(seen) == 1
