# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Files that were made to do harm: none runs, none leaves its folder, and each is named in the error.

A payload writes a marker file. That it would work is proved by loading it once in the way that everybody warns of. Checkpoints
are sealed again after the change: whoever makes a hostile checkpoint makes its manifest too.
"""

import csv
import html.parser
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jinja2
import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from fixtures import runs
from fixtures.pipelines import tiny_flux
from fixtures.trainer import rows, tiny_detector, tiny_trainer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSemanticSegmentation, pipeline

from diffusers_diffdoctor.cli.diagnose import load_detector
from diffusers_diffdoctor.cli.treat import parse
from diffusers_diffdoctor.detector.conversion import convert_detector_checkpoint
from diffusers_diffdoctor.evaluation import diagnose_images, html_report
from diffusers_diffdoctor.evaluation.report import Card, Figure, Gallery, Picture, Section, Table, View
from diffusers_diffdoctor.training.checkpoints import seal
from diffusers_diffdoctor.treatment.export import export_lora
from diffusers_diffdoctor.treatment.prepare import load_pipeline
from diffusers_diffdoctor.treatment.prompt_files import read_prompt_file


NESTED = "[" * 100_000 + "]" * 100_000


class Payload:
    """Unpickled, it writes the marker."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return exec, (self.code,)

    @property
    def code(self) -> str:
        return f"open({str(self.marker)!r}, 'w').close()"


@pytest.fixture
def marker(tmp_path):
    """Where payloads write. No test may leave it."""
    path = tmp_path / "marker"
    yield path
    assert not path.exists(), "the payload ran"


@pytest.fixture
def works(marker):
    """`works(function)`: the payload does harm where nothing keeps it from it."""

    def check(load_unsafely) -> None:
        load_unsafely()
        assert marker.exists(), "the payload is a dud, so that the test would prove nothing"
        marker.unlink()

    return check


@pytest.fixture
def pickled(marker, works):
    """`pickled(path)`: a file of torch whose unpickling writes the marker, which was proved."""

    def write(path: Path) -> Path:
        torch.save({"weight": torch.zeros(2), "state": Payload(marker)}, path)
        works(lambda: torch.load(path, weights_only=False))
        return path

    return write


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pipeline, and both trainers' runs of one checkpoint, to be copied and spoilt."""
    folder = tmp_path_factory.mktemp("models")
    tiny_flux().save_pretrained(folder / "pipeline")
    for name, run in runs.TRAINERS.items():
        run(folder / name, max_steps=1, save_steps=1).train()
    return folder


@pytest.fixture
def copy(folders, tmp_path):
    """`copy(name)`: a copy of one of the folders, in a folder that is wholly the test's own."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(folders / name, tmp_path / "given" / name))

    return make


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def module(path: Path, marker: Path) -> None:
    """A module of Python whose import writes the marker, with a class `Evil` in it."""
    path.write_text(f"{Payload(marker).code}\nclass Evil:\n    pass\n", encoding="utf-8")


# --- pickles ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", runs.TRAINERS)
@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_in_a_checkpoint(kind, file, copy, pickled):
    folder = copy(kind)
    assert (folder / "checkpoint-1" / file).is_file()
    pickled(folder / "checkpoint-1" / file)
    seal(folder / "checkpoint-1")
    with pytest.raises(ValueError, match=re.escape(file)):
        runs.TRAINERS[kind](folder, max_steps=2).train(resume_from_checkpoint=True)


def test_a_pickled_scaler_in_a_checkpoint(copy, pickled):
    folder = copy("detector")
    pickled(folder / "checkpoint-1/scaler.pt")
    trainer = runs.TRAINERS["detector"](folder, max_steps=2)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")  # accelerate makes one on a GPU only
    with pytest.raises(ValueError, match=r"scaler\.pt"):
        trainer._load_scaler(str(folder / "checkpoint-1"))


@pytest.mark.parametrize("kind", runs.TRAINERS)
@pytest.mark.parametrize("file", ["training_args.bin", "pytorch_lora_weights.bin", "pytorch_model.bin", "scaler.pt"])
def test_a_pickle_that_nobody_asks_for(kind, file, copy, pickled):
    folder = copy(kind)
    pickled(folder / "checkpoint-1" / file)
    seal(folder / "checkpoint-1")
    trainer = runs.TRAINERS[kind](folder, max_steps=2, save_steps=5)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2


def test_a_lora_that_is_a_pickle(copy, pickled):
    folder = copy("treatment")
    (folder / "checkpoint-1/pytorch_lora_weights.safetensors").unlink()
    pickled(folder / "checkpoint-1/pytorch_lora_weights.bin")
    seal(folder / "checkpoint-1")
    with pytest.raises(ValueError, match=r"checkpoint-1.* has no LoRA"):
        runs.treatment(folder, max_steps=2).train(resume_from_checkpoint=True)


def test_a_detector_that_is_a_pickle(copy, pickled):
    folder = copy("detector")
    folder = folder / "checkpoint-1"
    (folder / "model.safetensors").unlink()
    pickled(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        load_detector(str(folder), "cpu")
    seal(folder)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        runs.detector(folder.parent, max_steps=2).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "part, safe, pickle_name",
    [
        ("transformer", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
        ("text_encoder", "model.safetensors", "pytorch_model.bin"),
    ],
)
def test_a_pipeline_with_a_pickle(part, safe, pickle_name, copy, pickled):
    folder = copy("pipeline")
    (folder / part / safe).unlink()
    pickled(folder / part / pickle_name)
    with pytest.raises(ValueError, match=f"{part}/{re.escape(pickle_name)}"):
        load_pipeline(str(folder), torch.float32)


def test_a_checkpoint_to_convert(tmp_path, pickled):
    with pytest.raises(ValueError, match=r"ad_pytorch_model\.bin"):
        convert_detector_checkpoint(pickled(tmp_path / "ad_pytorch_model.bin"), tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def bomb(path: Path) -> None:
    """A file of torch with a compressed record of 1 GiB under a tensor of 16 bytes."""
    torch.save({"weight": torch.zeros(4)}, path)
    with zipfile.ZipFile(path) as plain:
        records = {name: plain.read(name) for name in plain.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in records.items():
            if not name.endswith("data/0"):
                archive.writestr(name, content, zipfile.ZIP_STORED)
                continue
            with archive.open(name, "w", force_zip64=True) as record:
                for _ in range(2**6):
                    record.write(bytes(2**24))
    assert path.stat().st_size < 2**23


PEAK = """
import os, resource, sys
import torch
from diffusers_diffdoctor.detector.conversion import convert_detector_checkpoint
# not `ru_maxrss` on Linux, which begins with the peak of the process that started this one
peak = lambda: int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) \
    if os.path.exists("/proc/self/status") else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
try:
    if sys.argv[1] == "ours":
        convert_detector_checkpoint("bomb.pt", "converted")
    else:
        torch.load("bomb.pt", weights_only=True)
except (ValueError, RuntimeError) as error:
    print(str(error).splitlines()[0])
print((peak() - before) // 2**10)
"""


@pytest.mark.slow
def test_an_archive_that_unpacks_to_more_than_itself(copy, tmp_path, marker):
    bomb(tmp_path / "bomb.pt")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    said, peaks = {}, {}
    for whose in ("ours", "torch"):
        command = [sys.executable, "-c", PEAK, whose]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        *said[whose], peaks[whose] = done.stdout.splitlines()
    assert int(peaks["torch"]) > 500 > 100 > int(peaks["ours"])  # MiB
    assert said["ours"][-1].startswith("bomb.pt has ")

    folder = copy("treatment")
    for name in ("optimizer.pt", "rng_state.pth"):
        shutil.copy(tmp_path / "bomb.pt", folder / "checkpoint-1" / name)
        seal(folder / "checkpoint-1")
        with pytest.raises(ValueError, match=f"{re.escape(name)} has .* unpacks to"):
            runs.treatment(folder, max_steps=2).train(resume_from_checkpoint=True)
        shutil.rmtree(folder)
        folder = copy("treatment")
    folder = copy("pipeline")
    (folder / "text_encoder/model.safetensors").unlink()
    shutil.copy(tmp_path / "bomb.pt", folder / "text_encoder/pytorch_model.bin")
    with pytest.raises(ValueError, match=r"text_encoder/pytorch_model\.bin has .* unpacks to"):
        load_pipeline(str(folder), torch.float32)


# --- safetensors -----------------------------------------------------------------------------------------------------------------


def header(**tensors) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


HEADERS = {
    "huge": (2**62).to_bytes(8, "little") + b"{}",
    "negative": b"\xff" * 8 + b"{}",
    "longer-than-file": (5000).to_bytes(8, "little") + b"{}",
    "negative-offset": header(a={"dtype": "F32", "shape": [2, 2], "data_offsets": [-16, 0]}) + bytes(16),
    "overlapping": header(
        a={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        b={"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
    )
    + bytes(12),
    "terabytes": header(a={"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}),
    "overflowing": header(a={"dtype": "F32", "shape": [2**33, 2**33], "data_offsets": [0, 0]}),
    "nested": len(NESTED).to_bytes(8, "little") + NESTED.encode(),
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS.keys())
def test_a_header_of_safetensors_that_lies(content, copy, marker):
    folder = copy("detector") / "checkpoint-1"
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_detector(str(folder), "cpu")
    folder = copy("treatment")
    (folder / "checkpoint-1/pytorch_lora_weights.safetensors").write_bytes(content)
    seal(folder / "checkpoint-1")
    with pytest.raises(ValueError, match=r"pytorch_lora_weights\.safetensors"):
        runs.treatment(folder, max_steps=2).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/outside.safetensors", "a\\..\\..\\b.safetensors", "..", 3]
)
def test_an_index_that_names_files_elsewhere(name, copy, tmp_path, marker):
    folder = copy("detector") / "checkpoint-1"
    keys = list(load_file(folder / "model.safetensors"))
    shutil.move(folder / "model.safetensors", folder.parent / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(keys, name)}))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        load_detector(str(folder), "cpu")
    folder = copy("pipeline")
    index = {"weight_map": {"x": name}}
    (folder / "transformer/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"transformer/diffusion_pytorch_model\.safetensors\.index\.json"):
        load_pipeline(str(folder), torch.float32)


# --- configurations that name code -----------------------------------------------------------------------------------------------


def test_a_detector_with_code_of_its_own(copy, marker, works, monkeypatch):
    """Our classes and the Auto classes take the code of this package, whatever `auto_map` says."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))  # whoever asks is told yes
    folder = copy("detector") / "checkpoint-1"
    module(folder / "evil.py", marker)
    works(lambda: exec((folder / "evil.py").read_text()))
    edit(folder / "config.json", auto_map={"AutoConfig": "evil.Evil", "AutoModelForSemanticSegmentation": "evil.Evil"})
    edit(folder / "preprocessor_config.json", auto_map={"AutoImageProcessor": "evil.Evil"})
    load_detector(str(folder), "cpu")
    AutoModelForSemanticSegmentation.from_pretrained(folder)
    pipeline("artifact-detection", model=str(folder), trust_remote_code=False)
    edit(folder / "config.json", model_type="evil")
    with pytest.raises(ValueError, match="model type is 'evil'"):
        load_detector(str(folder), "cpu")
    with pytest.raises((ValueError, OSError), match="trust_remote_code"):
        pipeline("artifact-detection", model=str(folder), trust_remote_code=False)


@pytest.mark.parametrize(
    "content", [NESTED, "[]", "null", "{", '{"model_type": "artifact_detector", "hidden_sizes": "x"}']
)
def test_a_configuration_that_is_none(content, copy, marker):
    folder = copy("detector") / "checkpoint-1"
    (folder / "config.json").write_text(content)
    with pytest.raises((ValueError, OSError), match=r"config\.json|hidden_sizes"):
        load_detector(str(folder), "cpu")


@pytest.mark.parametrize("where", ["", "transformer"])
def test_a_pipeline_with_a_component_of_its_own(where, copy, marker, works):
    folder = copy("pipeline")
    module(folder / where / "evil.py", marker)
    works(lambda: exec((folder / where / "evil.py").read_text()))
    edit(folder / "model_index.json", transformer=["evil", "Evil"])
    with pytest.raises(ValueError, match="evil"):
        load_pipeline(str(folder), torch.float32)


@pytest.mark.parametrize("library", ["evil_module", "os", "subprocess", "../evil_module", "torch.hub"])
def test_a_pipeline_that_names_a_module_on_the_path(library, copy, marker, works, monkeypatch):
    folder = copy("pipeline")
    module(folder / "evil_module.py", marker)
    monkeypatch.syspath_prepend(str(folder))
    works(lambda: __import__("evil_module"))
    sys.modules.pop("evil_module")
    name = {"os": "system", "subprocess": "Popen", "torch.hub": "load"}.get(library, "Evil")
    edit(folder / "model_index.json", scheduler=[library, name])
    with pytest.raises(ValueError, match=re.escape(str(folder))):
        load_pipeline(str(folder), torch.float32)


def test_a_pipeline_of_a_class_of_its_own(copy, marker, works):
    folder = copy("pipeline")
    (folder / "pipeline.py").write_text(
        f"{Payload(marker).code}\nfrom diffusers import DiffusionPipeline\nclass Evil(DiffusionPipeline):\n    pass\n"
    )
    works(lambda: exec((folder / "pipeline.py").read_text()))
    edit(folder / "model_index.json", _class_name=["pipeline", "Evil"])
    with pytest.raises(ValueError, match=r"pipeline\.py"):
        load_pipeline(str(folder), torch.float32)


def test_a_tokenizer_with_code_of_its_own(copy, marker, works):
    folder = copy("pipeline")
    module(folder / "tokenizer/evil.py", marker)
    works(lambda: exec((folder / "tokenizer/evil.py").read_text()))
    edit(
        folder / "tokenizer/tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.Evil", None]},
        tokenizer_class="Evil",
    )
    load_pipeline(str(folder), torch.float32)  # by the class that the index names


def test_an_adapter_that_names_a_module(copy, marker, works, monkeypatch):
    folder = copy("treatment")
    module(folder / "evil_module.py", marker)
    monkeypatch.syspath_prepend(str(folder))
    works(lambda: __import__("evil_module"))
    sys.modules.pop("evil_module")
    odd = {"peft_type": "EVIL", "auto_mapping": {"parent_library": "evil_module", "base_model_class": "Evil"}}
    (folder / "checkpoint-1/adapter_config.json").write_text(json.dumps(odd))
    weights = load_file(folder / "checkpoint-1/pytorch_lora_weights.safetensors")
    save_file(weights, folder / "checkpoint-1/adapter_model.safetensors")
    seal(folder / "checkpoint-1")
    runs.treatment(folder, max_steps=2, save_steps=5).train(resume_from_checkpoint=True)


# --- records, recipes, prompts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [NESTED, '{"a":' * 50_000 + "1" + "}" * 50_000, "[]", "null", '"x"', "{}", '{"base": 3}', "{"]
)
def test_a_record_that_is_none(content, copy, marker):
    folder = copy("treatment")
    (folder / "checkpoint-1/treatment.json").write_text(content)
    seal(folder / "checkpoint-1")
    with pytest.raises(ValueError, match=r"treatment\.json"):
        runs.treatment(folder, max_steps=2).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"treatment\.json"):
        export_lora(folder / "checkpoint-1")


@pytest.mark.parametrize("content", [NESTED, "[]", '{"global_step": "x"}', '{"no": 1}'])
@pytest.mark.parametrize("kind", runs.TRAINERS)
def test_a_state_that_is_none(kind, content, copy, marker):
    folder = copy(kind)
    (folder / "checkpoint-1/trainer_state.json").write_text(content)
    seal(folder / "checkpoint-1")
    with pytest.raises(ValueError, match=r"trainer_state\.json"):
        runs.TRAINERS[kind](folder, max_steps=2).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("content", [NESTED, "[]", "{}", '{"files": {"../../../../../../etc/hostname": {}}}'])
def test_a_manifest_that_is_none(content, copy, marker):
    folder = copy("treatment")
    (folder / "checkpoint-1/manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json"):
        runs.treatment(folder, max_steps=2).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("metadata", [NESTED, "[]", "null", '{"transformer.r": "x"}', "{"])
def test_metadata_of_a_lora_that_are_none(metadata, copy, marker):
    folder = copy("treatment") / "checkpoint-1"
    file = folder / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as opened:
        assert "lora_adapter_metadata" in opened.metadata()
    save_file(load_file(file), file, metadata={"format": "pt", "lora_adapter_metadata": metadata})
    with pytest.raises(ValueError, match=r"pytorch_lora_weights\.safetensors"):
        export_lora(folder)


def test_a_log_is_replaced_and_never_read(copy, tmp_path, marker):
    """Nor followed, where it is a link to a file that is none of the run's business."""
    folder, victim = copy("treatment"), tmp_path / "victim"
    victim.write_text("precious")
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").symlink_to(victim)
    runs.treatment(folder, max_steps=2, save_steps=5).train(resume_from_checkpoint=True)
    assert victim.read_text() == "precious"
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1


def test_a_recipe_that_names_code(tmp_path, marker, works):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"output_dir: !!python/object/apply:builtins.exec [{json.dumps(Payload(marker).code)}]\n")
    works(lambda: yaml.unsafe_load(recipe.read_text()))
    with pytest.raises(ValueError, match=r"recipe\.yaml"):
        parse(["--config", str(recipe)])


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "content",
    [
        "a: &a [x]\n" + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij")),
        "a: &a [*a]\n",
        "a: " + NESTED[:2000],
        "- output_dir\n",
        "just a text\n",
    ],
    ids=["billion", "circle", "nested", "list", "text"],
)
def test_a_recipe_that_is_none(content, tmp_path, marker):
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"recipe\.yaml"):
        parse(["--config", str(tmp_path / "recipe.yaml")])


@pytest.mark.parametrize(
    "name, content",
    [
        ("nested.jsonl", NESTED),
        ("nested.json", NESTED),
        ("object.json", '[{"prompt": {"__class__": "os.system"}}]'),
        ("long.csv", "prompt\n" + "a" * (csv.field_size_limit() + 1)),
        ("null.jsonl", '{"prompt": null}'),
        ("binary.txt", "\x00\udcff"),
    ],
)
def test_prompts_that_are_none(name, content, tmp_path, marker):
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=re.escape(name)):
        read_prompt_file(str(tmp_path / name))


def test_a_dataset_with_a_script(tmp_path, marker, works):
    folder = tmp_path / "given"
    folder.mkdir()
    (folder / "given.py").write_text(
        f"{Payload(marker).code}\nimport datasets\nclass Evil(datasets.GeneratorBasedBuilder):\n    pass\n"
    )
    works(lambda: exec((folder / "given.py").read_text()))
    (folder / "train.jsonl").write_text('{"prompt": "a hand"}\n')
    with pytest.raises(ValueError, match=r"given\.py"):
        read_prompt_file(str(folder))
    (folder / "given.py").unlink()
    assert read_prompt_file(str(folder))["prompt"] == ["a hand"]


# --- texts that are templates or markup ------------------------------------------------------------------------------------------


def test_a_prompt_that_is_a_template(tmp_path, marker, works):
    code = f"{{{{ cycler.__init__.__globals__.__builtins__.exec({Payload(marker).code!r}) }}}}"
    works(lambda: jinja2.Template(code).render())
    trainer = tiny_trainer(
        tmp_path / code.replace("/", "_"),
        parts={"train_dataset": rows([code]), "eval_dataset": {code: rows([code])}},
        report=True,
        max_steps=1,
        log_images=1,
        eval_num_images=1,
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    trainer.create_model_card(model_name=code, tags=[code])
    assert json.dumps(code)[1:9] in (Path(trainer.args.output_dir) / "README.md").read_text()


class Elements(html.parser.HTMLParser):
    """Elements and texts of a page without the one script that every page has, which is tested where pages are."""

    def __init__(self, page: str):
        super().__init__()
        self.found, self.text = [], ""
        page, _, own = page.rpartition("<script>")
        assert own.endswith("</script>\n</body>\n</html>") and own.count("</script>") == 1
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, sorted(name for name, _ in attributes)))

    def handle_data(self, data):
        self.text += data


def test_a_page_of_texts_that_are_markup(tmp_path, marker):
    """Its elements are those of the same page of plain words, and each text arrives."""
    evil = "</title></pre><script>alert(1)</script><img src=x onerror='alert(1)' title=\"{{ 7 * 7 }}\">"

    def page(text: str, folder: Path) -> str:
        folder.mkdir()
        picture = Picture(Image.new("RGB", (2, 2)), text, text)
        card = Card(text, [View(text, "a.webp", (2, 2))] * 2, [0.5], text, "bad", text, text)
        gallery = Gallery([card], [text], text, text)
        section = Section(text, text, Table((text, text), [(text, text)]), [picture], code=text, gallery=gallery)
        return html_report(folder / "report.html", text, [Figure(text, text, text)], [section], text).read_text()

    hostile, plain = Elements(page(evil, tmp_path / "a")), Elements(page("words", tmp_path / "b"))
    assert hostile.found == plain.found and not {"script", "iframe", "object"} & {tag for tag, _ in hostile.found}
    assert hostile.text.count(evil) == plain.text.count("words") > 8


def test_a_file_name_that_is_markup(tmp_path, marker):
    name = "<img src=x onerror=alert(1)>.png"
    (tmp_path / "images").mkdir()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "images" / name)
    (tmp_path / "images/<script>.png").write_bytes(b"no image")
    diagnose_images([tmp_path / "images"], tmp_path / "out", tiny_detector(), show_progress=False)
    found = Elements((tmp_path / "out/report.html").read_text())
    assert name in found.text and "script" not in {tag for tag, _ in found.found}
    assert not any(name.startswith("on") for _, names in found.found for name in names)


# --- files of diagnosing ---------------------------------------------------------------------------------------------------------


def test_a_journal_that_names_files_elsewhere(tmp_path, marker):
    out, images, victim = tmp_path / "out", tmp_path / "images", tmp_path / "victim.jpg"
    images.mkdir()
    Image.new("RGB", (32, 32), "red").save(images / "a.png")
    Image.new("RGB", (32, 32), "red").save(victim)
    diagnose_images([images], out, tiny_detector(), show_progress=False)
    (row,) = [json.loads(line) for line in (out / "diagnosis.jsonl").read_text().splitlines()]
    gone = row | {"path": str(tmp_path / "gone.png"), "overlay": "overlays/../../victim.jpg"}
    assert (out / gone["overlay"]).resolve() == victim  # what it would delete
    kept = row | {"overlay": str(victim)}
    (out / "diagnosis.jsonl").write_text("".join(json.dumps(x) + "\n" for x in (gone, kept)) + NESTED + "\n")
    before = victim.read_bytes()
    diagnose_images([images], out, tiny_detector(), show_progress=False)
    assert victim.read_bytes() == before
    assert all(
        "victim" not in json.loads(line)["overlay"] for line in (out / "diagnosis.jsonl").read_text().splitlines()
    )


@pytest.mark.parametrize("suffix", [".png", ".npy", ".tif"])
def test_an_image_that_is_a_pickle(suffix, tmp_path, marker, works):
    file = tmp_path / f"image{suffix}"
    if suffix == ".npy":
        with open(file, "wb") as opened:
            np.save(opened, np.array([Payload(marker)], dtype=object), allow_pickle=True)
        works(lambda: np.load(file, allow_pickle=True))
    else:
        file.write_bytes(pickle.dumps(Payload(marker)))
        works(lambda: pickle.loads(file.read_bytes()))
    summary = diagnose_images([file], tmp_path / "out", tiny_detector(), show_progress=False)
    assert summary["quarantined"] == 1
    assert file.name in (tmp_path / "out/quarantine.jsonl").read_text()
    with pytest.raises(ValueError, match="row 0"):
        photos = Dataset.from_dict({"image": [str(file)], "prompt": ["x"]})
        tiny_trainer(tmp_path / "treated", parts={"regularization_dataset": photos})
