# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Drift: images of one kind are called so at the stated rate, others are found, and what is described is what a loop sees."""

import itertools
import json
import math
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from fixtures.rows import photo_bytes, write_rows
from fixtures.segformer import tiny_detector
from PIL import Image
from transformers import ResNetConfig

from diffdoctor import main
from diffusers_diffdoctor import ArtifactDetectorConfig, ArtifactDetectorForSemanticSegmentation
from diffusers_diffdoctor.data import Describe, drift, find_or_load_shards
from diffusers_diffdoctor.data.drift import (
    LEVEL,
    STATISTICS,
    compare,
    far_share,
    holm,
    permutation_test,
    shrunk_covariance,
)
from diffusers_diffdoctor.data.schema import decode_image, encode_png
from diffusers_diffdoctor.images import to_image_tensor
from diffusers_diffdoctor.pictures import histograms


# --- the tests ----------------------------------------------------------------------------------------------------------------


def by_hand(known, new):
    """Energy distance, with means over all pairs."""

    def mean(first, second):
        return sum(math.dist(a, b) for a in first for b in second) / (len(first) * len(second))

    across = mean(known, new)
    return (2 * across - mean(known, known) - mean(new, new)) / (2 * across)


def test_energy_is_as_by_hand_and_p_is_a_share_of_exchanges():
    rng = np.random.default_rng(0)
    known, new = rng.standard_normal((7, 3)) * [1, 5, 0], rng.standard_normal((4, 3)) * [1, 5, 0] + [2, 0, 0]
    scale = np.concatenate([known, new]).std(axis=0)
    scale[2] = 1
    found = permutation_test(known, new)
    assert found["energy"] == pytest.approx(by_hand((known / scale).tolist(), (new / scale).tolist()))
    # by all 330 divisions of 11 images
    both = np.concatenate([known, new]) / scale
    energies = []
    for chosen in itertools.combinations(range(11), 4):
        rest = [i for i in range(11) if i not in chosen]
        first, second = both[rest], both[list(chosen)]
        across = np.linalg.norm(first[:, None] - second, axis=2).mean()
        own = [np.linalg.norm(side[:, None] - side, axis=2).mean() for side in (first, second)]
        energies.append(2 * across - sum(own))
    exact = np.mean(np.array(energies) >= energies[-1] - 1e-9)
    assert found["p"] == pytest.approx(exact, abs=0.05)


def test_equal_samples_are_called_different_as_often_as_stated(monkeypatch):
    """Whatever the distribution is, and however few images there are."""
    monkeypatch.setattr(sys.modules[compare.__module__], "PERMUTATIONS", 99)
    rng, found = np.random.default_rng(0), []
    for _ in range(400):
        both = np.exp(rng.standard_normal((35, 6))) * [1, 1, 10, 0, 1, 1]
        found.append(permutation_test(both[:20], both[20:], seed=1)["p"])
    for level in (0.05, 0.2, 0.5):
        share = np.mean(np.array(found) <= level)
        assert abs(share - level) < 4 * math.sqrt(level * (1 - level) / 400)


def test_constant_numbers_tell_nothing():
    assert permutation_test(np.ones((12, 2)), np.ones((9, 2))) == {"energy": 0, "p": 1}


def test_far_is_measured_by_the_other_half():
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((3, 3))
    known, new = rng.standard_normal((400, 3)) @ mixed, np.stack([np.zeros(3), [30.0, 0, 0]])
    own, others = far_share(known, new)
    assert (own > 1).sum() == 18 and others[0] < 0.3 and others[1] > 3
    # with many images of few features it is the Mahalanobis distance of the true distribution
    true = np.linalg.norm(np.linalg.solve(mixed.T, known.T), axis=0)
    assert np.corrcoef(own, true)[0, 1] > 0.97
    # a difference in a direction in which the known ones hardly differ is as far as a large one elsewhere
    flat = rng.standard_normal((400, 2)) * [1, 0.01]
    assert far_share(flat, np.array([[0.0, 0.1]]))[1] > 3 > 0.5 > far_share(flat, np.array([[0.1, 0.0]]))[1]


def test_far_with_more_features_than_images():
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(20):
        known, new = rng.standard_normal((2, 60, 200)) @ np.diag(np.linspace(0.1, 3, 200))
        shares.append((far_share(known, new)[1] > 1).mean())
    assert 0.02 < np.mean(shares) < 0.1
    assert not np.isnan(far_share(np.ones((40, 3)), np.ones((10, 3)))[0]).any()


def test_shrinkage_goes_with_the_error_of_the_covariance():
    rng = np.random.default_rng(0)
    true = np.diag([1.0, 2, 3, 4, 5])
    errors = []
    for count in (8, 5000):
        rows = rng.standard_normal((count, 5)) @ np.sqrt(true)
        sample = np.cov(rows.T, bias=True)
        found = shrunk_covariance(rows)
        assert np.trace(found) == pytest.approx(np.trace(sample))
        errors.append(np.linalg.norm(found - true) / np.linalg.norm(sample - true))
    assert errors[0] < 0.9 and errors[1] == pytest.approx(1, abs=0.05)


def test_holm():
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.9})
    assert found == pytest.approx({"a": 0.04, "b": 0.09, "c": 0.09, "d": 0.9})


# --- the verdict ---------------------------------------------------------------------------------------------------------------

GENERATORS = 3


def described(rng, count, generators=range(GENERATORS), shift=0.0, dimensions=24):
    """(arrays, generator of each): features around a centre for each generator."""
    centres = np.random.default_rng(9).standard_normal((GENERATORS, dimensions))
    own = rng.choice(list(generators), count)
    features = centres[own] + rng.standard_normal((count, dimensions)) + shift
    scalars = {name: rng.random(count) for name in ("max_confidence", *STATISTICS)}
    return {"features": features, **scalars}, [f"generator {g}" for g in own]


def verdicts(count, seeds, monkeypatch, **options):
    monkeypatch.setattr(sys.modules[compare.__module__], "PERMUTATIONS", 199)
    found = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        known, groups = described(rng, 150)
        new, _ = described(rng, count, **options)
        found.append(compare(known, new, groups))
    return found


def test_what_is_known_is_not_flagged(monkeypatch):
    found = verdicts(60, 40, monkeypatch)
    assert {one["verdict"] for one in found} == {"known"}
    assert sum(one["test"]["p"] <= LEVEL for one in found) <= 3
    assert 0.02 < np.mean([one["far"]["share"] for one in found]) < 0.09


def test_more_of_one_known_generator_is_another_mixture_but_known(monkeypatch):
    found = verdicts(60, 20, monkeypatch, generators=[1])
    assert all(one["test"]["p"] <= LEVEL for one in found)  # another mixture
    assert {one["verdict"] for one in found} == {"known"}
    assert np.mean([one["generators"]["generator 1"]["p"] for one in found]) > 0.2
    assert all(one["generators"]["generator 0"]["p"] <= LEVEL for one in found)


@pytest.mark.parametrize("count", [12, 60])
def test_what_is_unlike_all_that_is_known_is_flagged(monkeypatch, count):
    found = verdicts(count, 10, monkeypatch, shift=1.0)
    assert {one["verdict"] for one in found} == {"unknown"}
    assert all(one["far"]["interval"][0] > 0.1 for one in found)


def test_few_images_without_a_difference_are_unclear(monkeypatch):
    assert {one["verdict"] for one in verdicts(20, 10, monkeypatch)} == {"unclear"}
    with pytest.raises(ValueError, match="Of the new images 9 can be compared"):
        verdicts(9, 1, monkeypatch)


# --- images --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector") / "tiny"
    tiny_detector().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """80 smooth pictures of two sizes in 2 shards, of two generators and photographs."""
    folder = tmp_path_factory.mktemp("known")
    for part in range(2):
        rows = [
            {
                "image": {"bytes": photo_bytes(i, [(48, 40), (64, 64)][i % 2]), "path": f"{i}.png"},
                "generator": ["a", "b", None][i % 3],
                "source": "photo" if i % 3 == 2 else None,
            }
            for i in range(40 * part, 40 * part + 40)
        ]
        write_rows(folder / f"data/train-{part:05d}-of-00002.parquet", rows)
    return folder


def save(folder, images):
    folder.mkdir()
    for i, content in enumerate(images):
        (folder / f"{i}.png").write_bytes(content)
    return folder


def test_images_are_described_as_a_loop_sees_them(known, detector, tmp_path):
    shards = find_or_load_shards(known)
    drift(shards, shards, Describe.by(detector, batch_size=3), tmp_path, show_progress=False)
    rows = pq.read_table(tmp_path / ".diffdoctor/new/data/train-00000-of-00002.parquet").to_pylist()
    model, given = tiny_detector(), list(shards[0].read())
    for found in (rows[0], rows[1], rows[37]):
        image = to_image_tensor(decode_image(given[found["position"]]))
        with torch.no_grad():
            hidden = model(
                pixel_values=(resized(image[None]) - mean(model, "image_mean")) / mean(model, "image_std"),
                output_hidden_states=True,
            ).hidden_states
            confidence = model.confidence(image[None])
        features = []
        for stage in hidden:
            channels = stage[0].flatten(1).double().numpy()
            features += [*channels.mean(axis=1), *channels.std(axis=1, ddof=1)]
        assert found["features"] == pytest.approx(features, rel=1e-3, abs=1e-4)
        assert found["max_confidence"] == pytest.approx(confidence.max().item(), rel=1e-4)
        gray = image.mean(dim=0)
        assert found["brightness"] == pytest.approx(gray.mean().item(), rel=1e-4)
        assert found["contrast"] == pytest.approx(gray.std().item(), rel=1e-4)
        assert found["saturation"] == pytest.approx((image.amax(0) - image.amin(0)).mean().item(), rel=1e-4)
        assert found["megapixels"] == pytest.approx(image[0].numel() / 1e6)
        assert found["aspect"] == pytest.approx(image.shape[2] / image.shape[1])


def test_any_encoder_describes(tmp_path):
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, layer_type="basic")
    config = ArtifactDetectorConfig(backbone_config=backbone.to_dict(), image_size=64, decoder_hidden_size=16)
    ArtifactDetectorForSemanticSegmentation(config).save_pretrained(tmp_path)
    stage = Describe.by(str(tmp_path))
    (model,), images = stage.models(), torch.rand(2, 3, 64, 96)
    with torch.inference_mode():
        seen = stage.look([model], images)
        maps = model.backbone((images - mean(model, "image_mean")) / mean(model, "image_std")).feature_maps
    features = torch.cat([f(one.flatten(2), dim=2) for one in maps for f in (torch.mean, torch.std)], dim=1)
    assert seen[:, : features.shape[1]] == pytest.approx(features.numpy(), rel=1e-4, abs=1e-5)
    assert seen.shape[1] == features.shape[1] + 1 + len(STATISTICS)


def resized(image):
    height, width = image.shape[-2:]
    size = (64, 64) if height == width else (64, 64 if round(64 / height * width / 32) == 2 else 96)
    return torch.nn.functional.interpolate(image, size, mode="bilinear", antialias=True)


def mean(model, name):
    return torch.tensor(getattr(model.config, name))[:, None, None]


def test_other_pictures_of_the_same_kind_are_known(known, detector, tmp_path, capsys):
    new = save(tmp_path / "new", [photo_bytes(1000 + i, [(48, 40), (64, 64)][i % 2]) for i in range(60)])
    command = ["data", "drift", str(new), "--known", str(known), "--detector", detector, "-o", str(new / "out")]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert said.startswith("These images look like what the detector knows")
    result = json.loads((new / "out/drift.json").read_text())
    assert result["verdict"] == "known" and result["images"] == {"known": 80, "new": 60}
    assert result["generators"].keys() == {"a", "b", "photographs"}
    assert str(tmp_path) not in json.dumps(result) + (new / "out/report.html").read_text()
    assert main(command) == 0  # what was written into the folder is no image of the new generator
    assert json.loads((new / "out/drift.json").read_text()) == result


def test_another_kind_of_pictures_is_unknown_and_shown(known, detector, tmp_path):
    rng = np.random.default_rng(0)
    noise = [encode_png(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8))["bytes"] for _ in range(20)]
    new = save(tmp_path / "new", [*noise, *(photo_bytes(i) for i in range(2000, 2004)), b"no image"])
    result = drift(
        find_or_load_shards(new),
        find_or_load_shards(known),
        Describe.by(detector),
        tmp_path / "out",
        pictures=3,
        show_progress=False,
    )
    assert result["verdict"] == "unknown" and "Label some" in result["says"]
    assert {int(name.split(".")[0]) for name in result["farthest"][:20]} == set(
        range(20)
    )  # the noise before the smooth ones
    assert sum(result["quarantined"]["new"].values()) == 1
    assert result["sharpness"]["p_corrected"] <= 0.01 and result["sharpness"]["new"] > result["sharpness"]["known"]
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("data:image") == 4 and "unknown" in page and result["farthest"][0] in page


def test_a_sample_is_the_same_whatever_the_shards_are(known, detector, tmp_path):
    whole, halves = tmp_path / "whole", known
    write_rows(whole / "train.parquet", [row for shard in find_or_load_shards(known) for row in shard.read()])
    paths = []
    for name, folder in (("a", whole), ("b", halves)):
        shards = find_or_load_shards(folder)
        drift(shards, shards, Describe.by(detector), tmp_path / name, images=60, show_progress=False)
        files = sorted((tmp_path / name / ".diffdoctor/new/data").glob("*.parquet"))
        paths.append([path for file in files for path in pq.read_table(file)["path"].to_pylist()])
    assert paths[0] == paths[1] and 42 < len(paths[0]) < 75


def test_wrong_input_is_named(known, detector, tmp_path, capsys):
    shards, describe = find_or_load_shards(known), Describe.by(detector)
    with pytest.raises(ValueError, match="`images` must be at least 40, found 3"):
        drift(shards, shards, describe, tmp_path, images=3)
    with pytest.raises(ValueError, match=r"`threshold` must be in \(0, 1\]"):
        drift(shards, shards, describe, tmp_path, threshold=0)
    command = ["data", "drift", str(known), "--known", str(known), "--detector", detector, "-o", str(tmp_path / "out")]
    assert main([*command, "--rank", "0", "--world-size", "2"]) == 1
    assert "in one process" in capsys.readouterr().err


def test_histograms_are_drawn_for_each_panel(tmp_path):
    path = histograms(
        [("a", {"known": [0.0, 1.0], "new": [1.0]}, 0.5), ("b", {"known": [2.0], "new": [2.0]}, 2.0)],
        tmp_path / "x.png",
    )
    with Image.open(path) as picture:
        assert picture.width == 2 * 552
