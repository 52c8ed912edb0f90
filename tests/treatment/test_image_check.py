# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""All images are opened before a run: what is broken is told at once, what was whole is not opened again."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from datasets import Dataset, Image, load_from_disk
from fixtures.trainer import photos, tiny_trainer
from huggingface_hub import constants

from diffusers_diffdoctor.treatment.image_check import UnusableImages, check_images


NAME = "regularization_dataset"
COUNT = 120  # enough to be remembered


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    names = [tmp_path / f"{i:03}.png" for i in range(COUNT)]
    for name in names:
        PIL.Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(name)
    return names


def as_dataset(files) -> Dataset:
    rows = {"image": [str(file) for file in files], "prompt": ["a photo"] * len(files)}
    return Dataset.from_dict(rows).cast_column("image", Image())


def spoil(file: Path) -> None:
    """As large and as old as before, but cut and filled up with zeros."""
    status, content = file.stat(), file.read_bytes()
    file.write_bytes(content[:40] + bytes(len(content) - 40))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("kind", ["dataset", "embedded", "paths", "pictures"])
def test_all_of_the_broken_are_told_and_the_remedy_works(kind, files):
    broken = [3, 17, 40, 41, 119]
    for row in broken:
        files[row].write_bytes(b"no image")
    dataset = as_dataset(files)
    if kind == "embedded":
        rows = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
        dataset = Dataset.from_dict({"image": rows}).cast_column("image", Image())
    elif kind == "paths":
        dataset = [{"image": str(file)} for file in files]
    elif kind == "pictures":
        dataset = [{"image": None if i in broken else PIL.Image.open(file)} for i, file in enumerate(files)]
    with pytest.raises(UnusableImages) as caught:
        check_images(dataset, NAME)
    said = str(caught.value)
    assert caught.value.rows == broken and f"`{NAME}` has 5 of {COUNT} images that cannot be used" in said
    assert all(f"row {row}: " in said for row in broken[:3]) and "and 2 more" in said and "row 41" not in said
    if kind != "pictures":
        assert files[3].name in said
    if isinstance(dataset, Dataset):
        remedy = re.search(r"`(dataset\.select.*)`", said).group(1)
        left = eval(remedy, {"dataset": dataset})
        assert len(left) == COUNT - 5
        check_images(left, NAME)


def test_of_very_many_the_error_has_the_rows(files):
    for file in files[::2]:
        file.write_bytes(b"")
    dataset = as_dataset(files)
    with pytest.raises(UnusableImages) as caught:
        check_images(dataset, NAME)
    assert len(str(caught.value)) < 1200
    left = eval(
        re.search(r"`(dataset\.select.*?)`, where", str(caught.value)).group(1),
        {"dataset": dataset, "error": caught.value},
    )
    assert len(left) == COUNT // 2
    check_images(left, NAME)


def test_what_was_whole_is_not_opened_again_until_it_changes(files, home):
    check_images(as_dataset(files), NAME)
    assert len([path for path in home.rglob("*") if path.is_file()]) == 1
    spoil(files[5])
    check_images(as_dataset(files), NAME)  # it is not opened
    os.utime(files[5])
    with pytest.raises(UnusableImages, match="row 5: "):
        check_images(as_dataset(files), NAME)
    with pytest.raises(UnusableImages, match="row 5: "):  # what is broken is not remembered
        check_images(as_dataset(files), NAME)


def test_another_dataset_of_the_same_files_is_another(files):
    check_images(as_dataset(files), NAME)
    spoil(files[5])
    for dataset in (as_dataset(files[:110]), as_dataset(files).shuffle(seed=0), [{"image": str(f)} for f in files]):
        with pytest.raises(UnusableImages, match="has 1 of 1"):
            check_images(dataset, NAME)


def test_a_dataset_on_the_disk_is_known_again(files, tmp_path, home):
    rows = [{"bytes": file.read_bytes(), "path": None} for file in files]
    Dataset.from_dict({"image": rows}).cast_column("image", Image()).save_to_disk(tmp_path / "saved")
    for _ in range(2):
        check_images(load_from_disk(tmp_path / "saved"), NAME)
    assert len([path for path in home.rglob("*") if path.is_file()]) == 1


def test_few_images_and_lists_are_not_remembered(files, home):
    check_images(as_dataset(files[:99]), NAME)
    check_images([{"image": str(file)} for file in files], NAME)
    assert not home.exists()


def test_what_cannot_be_remembered_is_no_error(files, home):
    home.write_text("a file")
    check_images(as_dataset(files), NAME)
    spoil(files[5])
    with pytest.raises(UnusableImages):
        check_images(as_dataset(files), NAME)


def test_a_transform_of_the_users_is_applied(files):
    def broken(rows):
        return {"image": [None for _ in rows["image"]]}

    with pytest.raises(UnusableImages, match=f"has {COUNT} of {COUNT}"):
        check_images(as_dataset(files).with_transform(broken), NAME)


def test_a_bomb_of_which_pillow_only_warns_is_refused_in_all_threads(files, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 40)  # of 64: a warning below twice as many
    with pytest.raises(UnusableImages, match=f"has {COUNT} of {COUNT}"):
        check_images(as_dataset(files), NAME)


def test_each_process_looks_at_its_share(files):
    spoil(files[5])
    rows = [{"image": str(file)} for file in files]
    check_images(rows, NAME, process_index=0, world_size=2)
    with pytest.raises(UnusableImages, match="row 5: "):
        check_images(rows, NAME, process_index=1, world_size=2)


def test_images_are_opened_before_the_pipeline_is_loaded(tmp_path):
    images = [*photos(2), {"image": np.zeros(3), "prompt": "a"}, {"image": "/no/such/file.png", "prompt": "b"}]
    with pytest.raises(
        UnusableImages, match=r"has 2 of 4 images .*row 2: .* is no image.*row 3: .*/no/such/file\.png"
    ):
        tiny_trainer(tmp_path, "/nowhere/at/all", parts={"regularization_dataset": images})
    for _ in range(2):  # not one that is not used
        with pytest.raises(ValueError, match="`pipeline` is '/nowhere/at/all'"):
            parts = {"regularization_dataset": images}
            tiny_trainer(tmp_path, "/nowhere/at/all", parts=parts, offline_weight=0.0)


PROCESS = """
import sys
from accelerate import PartialState
from diffusers_diffdoctor.treatment.image_check import UnusableImages, check_images
from test_image_check import as_dataset
from pathlib import Path

state = PartialState(cpu=True)
files = sorted(Path(sys.argv[1]).glob("*.png"))
try:
    check_images(as_dataset(files), "photos", state.process_index, state.num_processes)
    print("whole")
except UnusableImages as error:
    print(error.rows)
state.destroy_process_group()
"""


@pytest.mark.slow
def test_all_processes_are_told_what_one_has_found(files, tmp_path, home):
    (tmp_path / "process.py").write_text(PROCESS)
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HOME": str(home)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tmp_path / "process.py"), str(tmp_path)]

    def run(word):
        """How often a process has printed it: two lines may come as one."""
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout.count(word)

    assert run("whole") == 2
    spoil(files[5])
    assert run("whole") == 2  # both have it remembered
    files[5].touch()
    spoil(files[8])
    assert run("[5, 8]") == 2
