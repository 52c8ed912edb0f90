# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Pushing to a Hub and loading by id, against the local server of `hub_server.py`.

`HF_ENDPOINT` is read when `huggingface_hub` is imported, so each push and each load runs in a Python process of its own,
as it would for a user; `hub.python(code)` runs one.
"""

import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import hub_server
import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from PIL import Image
from safetensors.torch import save_file

from diffusers_diffdoctor import (
    ArtifactDetectorConfig,
    ArtifactDetectorForSemanticSegmentation,
    ArtifactDetectorImageProcessor,
)


TESTS = Path(__file__).parent
DOCS = TESTS.parent / "docs/source"
LORA = "treated/pytorch_lora_weights.safetensors"


@contextmanager
def running_hub(folder: Path):
    """A hub that can also start processes which talk to it from `folder`: `hub.python(code) -> stdout`."""
    with hub_server.serve() as hub:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        environment |= {
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": hub_server.TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
        }

        def python(code: str, home: str = "home") -> str:
            """Runs `code`; `home` names the download cache, so that another name means an empty cache."""
            done = subprocess.run(
                [sys.executable, "-c", code],
                env=environment | {"HF_HOME": str(folder / home)},
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        hub.python = python
        yield hub


@pytest.fixture
def hub(tmp_path):
    with running_hub(tmp_path) as hub:
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


def save_tiny_detector(folder: Path) -> None:
    """A random detector with its image processor in `folder/detector`; an image and the map that the detector gives it."""
    torch.manual_seed(0)
    config = ArtifactDetectorConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[16, 16, 32, 32],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=32,
        image_size=64,
    )
    model = ArtifactDetectorForSemanticSegmentation(config).eval()
    for parameter in model.parameters():  # away from the near-constant answers of a fresh network
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / "detector")
    ArtifactDetectorImageProcessor.for_detector(config).save_pretrained(folder / "detector")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    images = (torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255).contiguous()
    with torch.no_grad():
        save_file({"images": images, "maps": model.confidence(images)}, folder / "expected.safetensors")


PUSH_DETECTOR = """
from diffusers_diffdoctor import ArtifactDetectorForSemanticSegmentation, ArtifactDetectorImageProcessor

ArtifactDetectorForSemanticSegmentation.from_pretrained("detector").push_to_hub("diffdoctor/detector")
ArtifactDetectorImageProcessor.from_pretrained("detector").push_to_hub("diffdoctor/detector")
"""

EQUAL = """
import torch
from safetensors.torch import load_file
expected = load_file("expected.safetensors")
with torch.no_grad():
    torch.testing.assert_close(model.eval().confidence(expected["images"]), expected["maps"], rtol=0, atol=0)
"""


@pytest.fixture(scope="class")
def pushed(tmp_path_factory):
    """A hub that holds diffdoctor/detector, pushed by a process of its own."""
    folder = tmp_path_factory.mktemp("hub")
    save_tiny_detector(folder)
    with running_hub(folder) as hub:
        hub.folder = folder
        hub.python(PUSH_DETECTOR)
        yield hub


class TestDetector:
    def test_what_is_pushed(self, pushed):
        files = pushed.files("diffdoctor/detector")
        assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"} <= set(files)
        assert files["model.safetensors"] == (pushed.folder / "detector/model.safetensors").read_bytes()
        assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)

        card = ModelCard(files["README.md"].decode())
        assert card.data.library_name == "transformers"
        assert "artifact-detection" in card.data.tags
        assert 'pipeline("artifact-detection", model="diffdoctor/detector")' in card.text

    def test_loads_by_id_through_class_auto_classes_and_pipeline(self, pushed):
        code = f"""
from transformers import AutoConfig, AutoImageProcessor, AutoModelForSemanticSegmentation, pipeline
import diffusers_diffdoctor
from diffusers_diffdoctor import ArtifactDetectorForSemanticSegmentation

model = ArtifactDetectorForSemanticSegmentation.from_pretrained("diffdoctor/detector")
{EQUAL}
model = AutoModelForSemanticSegmentation.from_pretrained("diffdoctor/detector")
assert type(model) is ArtifactDetectorForSemanticSegmentation, type(model)
{EQUAL}
assert type(AutoConfig.from_pretrained("diffdoctor/detector")) is diffusers_diffdoctor.ArtifactDetectorConfig
processor = AutoImageProcessor.from_pretrained("diffdoctor/detector")
assert isinstance(processor, diffusers_diffdoctor.ArtifactDetectorImageProcessor), type(processor)

result = pipeline("artifact-detection", model="diffdoctor/detector")("image.png")
assert result["artifact_map"].size == (96, 64) and result["artifact_map"].mode == "L"
assert abs(result["max_confidence"] - expected["maps"].max().item()) < 1e-5, result

try:
    ArtifactDetectorForSemanticSegmentation.from_pretrained("diffdoctor/missing")
except OSError as error:
    assert "diffdoctor/missing" in str(error)
else:
    raise AssertionError("a repository that is not there was loaded")
"""
        before = len(pushed.requests)
        pushed.python(code, home="of somebody else")
        assert any(request.endswith("/model.safetensors") for request in pushed.requests[before:])

    def test_loads_without_this_package_where_remote_code_is_trusted(self, pushed):
        code = f"""
import sys
sys.modules["diffusers_diffdoctor"] = None  # as if it were not installed
from transformers import AutoModelForSemanticSegmentation
model = AutoModelForSemanticSegmentation.from_pretrained("diffdoctor/detector", trust_remote_code=True)
{EQUAL}
"""
        pushed.python(code, home="of one who trusts")


TREAT_AND_PUSH = """
from datasets import Dataset
from safetensors.torch import save_file
from fixtures.pipelines import tiny_flux
from diffusers_diffdoctor import ArtifactDetectorForSemanticSegmentation, PixelRewardConfig, PixelRewardTrainer

tiny_flux().push_to_hub("user/base")
trainer = PixelRewardTrainer(
    pipeline="user/base",
    reward_funcs=ArtifactDetectorForSemanticSegmentation.from_pretrained("detector"),
    args=PixelRewardConfig(
        output_dir="treated",
        hub_model_id="user/treated",
        resolution=32,
        num_inference_steps=2,
        gradient_fraction=0.5,
        offline_weight=0.0,
        lora_rank=2,
        learning_rate=0.5,
        max_steps=1,
        per_device_train_batch_size=2,
        eval_strategy="steps",
        eval_steps=1,
        eval_num_images=2,
        log_images=2,
        use_cpu=True,
        report_to="none",
    ),
    train_dataset=Dataset.from_dict({"prompt": ["a hand", "a face"]}),
    eval_dataset=Dataset.from_dict({"prompt": ["a foot", "an ear"]}),
)
trainer.train()
trainer.push_to_hub()
save_file({"after": trainer.rollout.generate(["a foot"], [0])}, "drawn.safetensors")
"""

LOAD_TREATED = """
import sys
sys.modules["diffusers_diffdoctor"] = None  # as if it were not installed
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

pipe = DiffusionPipeline.from_pretrained("user/base")
def draw():
    settings = dict(height=32, width=32, num_inference_steps=2, output_type="pt")
    return pipe("a foot", generator=torch.Generator().manual_seed(0), **settings).images

before = draw()
pipe.load_lora_weights("user/treated")
after = draw()
pipe.unload_lora_weights()
assert torch.equal(draw(), before)
assert (after - before).abs().mean() > 1e-4
torch.testing.assert_close(after, load_file("drawn.safetensors")["after"], rtol=0, atol=1e-6)
"""


def test_a_treated_lora_is_pushed_with_its_card_and_loads_by_id_without_this_package(tmp_path):
    save_tiny_detector(tmp_path)
    with running_hub(tmp_path) as hub:
        hub.python(TREAT_AND_PUSH)
        files = hub.files("user/treated")
        assert files["pytorch_lora_weights.safetensors"] == (tmp_path / LORA).read_bytes()
        assert not any(name.startswith(("checkpoint-", "_")) for name in files)
        assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)

        card = ModelCard(files["README.md"].decode())
        assert card.data.base_model == "user/base"
        assert card.data.library_name == "diffusers"
        assert card.data.pipeline_tag == "text-to-image"
        assert {"diffdoctor", "lora"} <= set(card.data.tags)
        assert [entry["text"] for entry in card.data.widget] == ["a foot", "an ear"]
        assert 'pipe.load_lora_weights("user/treated")' in card.text
        assert "| `gradient_fraction` | 0.5 |" in card.text
        assert "| artifact frequency |" in card.text
        pictures = set(re.findall(r"!\[\w+\]\(([^)]+)\)", card.text))
        assert len(pictures) == 4 and pictures <= set(files)

        hub.python(LOAD_TREATED, home="of somebody else")


NOT_INSTALLED = "import sys; sys.modules['diffusers_diffdoctor'] = None\n"
# sizes, steps and the base of the pages -> what stands for them
STANDS_FOR = {
    "your-name/": f"{hub_server.USER}/",
    "black-forest-labs/FLUX.1-schnell": "user/base",
    'PixelRewardConfig(output_dir="flux-treated"': 'PixelRewardConfig(output_dir="flux-treated", use_cpu=True, resolution=32, '
    'max_steps=1, max_sequence_length=16, report_to="none"',
}


@pytest.mark.slow
def test_the_documentation_runs(hub, api, tmp_path):
    """The blocks marked runnable in the quick tour and all of the page on the Hub, in the order of the pages; those for people
    who have not installed this package run without it.

    The page says that a card written by hand is kept, so there is one.
    """
    save_tiny_detector(tmp_path)
    repo_id = f"{hub_server.USER}/detector"
    api.create_repo(repo_id)
    content = b"---\nlicense: apache-2.0\n---\n# By hand\n"
    api.upload_file(repo_id=repo_id, path_in_repo="README.md", path_or_fileobj=content)
    tour = (DOCS / "quicktour.md").read_text("utf-8")
    marked = re.findall(r"<!-- runnable -->\n```python\n(.*?)```", tour, re.S)
    page = re.findall(r"```python\n(.*?)```", (DOCS / "hub.md").read_text("utf-8"), re.S)
    push, load, remote, treat, load_lora, weaker = page
    hub.python('from fixtures.pipelines import tiny_flux\ntiny_flux().push_to_hub("user/base")')
    scripts = [[*marked, push, load], [NOT_INSTALLED, remote], [treat], [NOT_INSTALLED, load_lora, weaker]]
    for script in scripts:
        code = "\n".join(script)
        for said, instead in STANDS_FOR.items():
            code = code.replace(said, instead)
        hub.python(code)
    files = hub.files(repo_id)
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= set(files)
    assert "# By hand" in files["README.md"].decode()
    assert {"README.md", "pytorch_lora_weights.safetensors"} <= set(hub.files("user/flux-treated"))


# --- datasets ------------------------------------------------------------------------------------------------------------------

MAKE_DATASET = """
from fixtures.rows import photo_bytes, write_rows
from diffusers_diffdoctor.data import Photos, find_shards, run_stage
from pathlib import Path
for part in range(2):
    write_rows(Path(f"source/{part}.parquet"), [{"image": photo_bytes(10 * part + i), "prompt": str(i)} for i in range(10)])
run_stage(Photos(), find_shards("source"), "photos", show_progress=False)
"""

PUSH_DATASET = """
from diffdoctor import main
assert main(["data", "photos", "source", "-o", "photos", "--push-to-hub", "diffdoctor/photos"]) == 0
"""

LOAD_DATASET = """
from datasets import load_dataset
from diffdoctor import main
rows = load_dataset("diffdoctor/photos", split="train")
assert len(rows) == 20 and rows[3]["prompt"] == "3" and rows[3]["source"] == "photo", rows
assert rows[3]["image"].size == (48, 40) and rows[3]["artifact_map"].getextrema() == (0, 0)
assert main(["data", "merge", "diffdoctor/photos", "-o", "merged"]) == 0
assert main(["data", "merge", "diffdoctor/nothing", "-o", "other"]) == 1
"""

# not only `#`, which no address may have in a name, but also what stands for it there
ODD_NAMES = """
from fixtures.rows import photo_bytes, write_rows
from huggingface_hub import HfApi
from pathlib import Path
from diffusers_diffdoctor.data import find_shards, load_rows
HfApi().create_repo("user/odd", repo_type="dataset")
for count, split in enumerate(("train", "test"), 1):
    write_rows(Path("odd.parquet"), [{"image": photo_bytes(i), "prompt": split} for i in range(count)])
    for name in (f"a#b/{split}-00000-of-00001.parquet", f"a%23b/{split}#2.parquet"):
        HfApi().upload_file(path_or_fileobj="odd.parquet", path_in_repo=name, repo_id="user/odd", repo_type="dataset")
for count, split in enumerate(("train", "test"), 1):
    assert load_rows("user/odd", split)["prompt"] == [split] * 2 * count
    assert [shard.rows for shard in find_shards("user/odd", split)] == [count] * 2
"""


@pytest.mark.slow
def test_a_dataset_goes_to_the_hub_and_back(hub):
    hub.python(MAKE_DATASET)
    address = hub.python(PUSH_DATASET).splitlines()[-1]
    assert address == f"{hub.endpoint}/datasets/diffdoctor/photos"
    files = hub.files("datasets/diffdoctor/photos")
    parquet = [f"data/train-{i:05d}-of-00002.parquet" for i in range(2)]
    assert sorted(files) == [".gitattributes", "README.md", *parquet] or sorted(files) == ["README.md", *parquet]
    assert "artifact-detection" in hub_server.card_metadata(files["README.md"].decode())["tags"]
    out = hub.python(LOAD_DATASET + ODD_NAMES, home="another machine")
    assert "20 in = 20 out + 0 quarantined" in out
    uploads = len([request for request in hub.requests if request.startswith("PUT")])
    hub.python(PUSH_DATASET)  # nothing is sent twice
    assert len([request for request in hub.requests if request.startswith("PUT")]) == uploads == 2 + 2


IMPORT_FROM_PICK_A_PIC = """
import io
import pyarrow as pa, pyarrow.parquet as pq
from fixtures.rows import photo_bytes
from fixtures.tfrecords import example, record
from huggingface_hub import HfApi
from PIL import Image
from diffdoctor import main
HfApi().create_repo("user/pickapic", repo_type="dataset")
for split, first in (("train", 0), ("test_unique", 2)):
    columns = {"image_0_uid": [f"u{first}"], "image_1_uid": [f"u{first + 1}"], "caption": ["a hand"]}
    columns |= {f"jpg_{side}": [photo_bytes(first + side, (64, 64), "JPEG")] for side in (0, 1)}
    pq.write_table(pa.table(columns), "part.parquet")
    name = f"data/{split}-00000-of-00001-b66ac786bf6fb553.parquet"
    HfApi().upload_file(path_or_fileobj="part.parquet", path_in_repo=name, repo_id="user/pickapic", repo_type="dataset")
file = io.BytesIO()
Image.new("L", (64, 64), 9).save(file, "PNG")
records = [{"filename": [f"train/u{i}.png".encode()], "artifact_map": [file.getvalue()]} for i in (1, 3, 5)]
with open("train.tfrecord", "wb") as tfrecord:
    tfrecord.writelines(record(example(one)) for one in records)
assert main(["data", "import", "richhf", "train.tfrecord", "--images", "user/pickapic", "-o", "richhf"]) == 0
assert main(["data", "import", "richhf", "train.tfrecord", "--images", "user/nothing", "-o", "other"]) == 1
"""


def test_heatmaps_find_their_images_on_the_hub_in_any_split(hub):
    assert "3 in = 2 out + 1 quarantined" in hub.python(IMPORT_FROM_PICK_A_PIC)
