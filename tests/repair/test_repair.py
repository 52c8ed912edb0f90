# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForInpainting
from fixtures.pipelines import tiny_flux
from PIL import Image

from diffdoctor import main
from diffusers_diffdoctor.images import read_image
from diffusers_diffdoctor.miniature.renderer import render, sample_scene
from diffusers_diffdoctor.repair import artifact_regions, rank, repair


class Red(torch.nn.Module):
    """Knows what is wrong: what is red."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def confidence(self, images):
        return (images[:, :1] - images[:, 1:].amax(1, keepdim=True)).clamp(0, 1)


class Anything(Red):
    """A judge who likes nothing but the image as it was: gray."""

    def confidence(self, images):
        return (images - 0.5).abs().amax(1, keepdim=True).clamp(0, 1)


@pytest.fixture(scope="module")
def pipeline():
    pipeline = AutoPipelineForInpainting.from_pipe(tiny_flux())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def spotted(height=96, width=160):
    """Gray with a red spot of 9 x 11 pixels."""
    image = np.full((height, width, 3), 127, np.uint8)
    image[40:49, 100:111] = (255, 0, 0)
    return image


OPTIONS = {"tries": 2, "steps": 2, "size": 64, "strength": 1.0}


@pytest.mark.parametrize("more", [{}, {"context": math.inf, "size": 192}])
def test_what_is_wrong_is_drawn_anew_and_the_rest_stays_to_the_bit(pipeline, more):
    image = spotted()
    done = repair(image, pipeline, Red(), **OPTIONS | more)
    new = np.asarray(done.image)
    assert done.seed is not None and done.after == min(done.tries) < done.before
    assert done.before == pytest.approx(99 / (96 * 160), rel=1e-6)
    outside = done.region == 0
    assert np.array_equal(new[outside], image[outside]) and outside.mean() > 0.95
    assert (done.region[40:49, 100:111] == 255).all()
    assert Red().confidence(torch.from_numpy(new).permute(2, 0, 1)[None] / 255)[0, 0, 40:49, 100:111].mean() < 0.9


class Swap:
    """Inpaints by swapping red and blue, and remembers what it was shown."""

    def __call__(self, image, mask_image, width, height):
        self.image, self.mask, self.asked = np.asarray(image), np.asarray(mask_image), (height, width)
        return SimpleNamespace(images=[self.image[..., ::-1] / 255])


@pytest.mark.parametrize(
    ("context", "shown", "share"),
    [  # the spot has 9 x 11 pixels, the image 96 x 160
        (0.0, (192, 192), 9 / 11),
        (0.5, (192, 192), 9 / 11 / 4),
        (6.0, (128, 192), 99 / (96 * 143)),  # higher than the image is
        (math.inf, (128, 192), 99 / (96 * 160)),
    ],
)
def test_the_pipeline_sees_a_square_around_the_region_as_far_as_the_image_goes(context, shown, share):
    swap = Swap()
    image = spotted()
    done = repair(image, swap, Red(), growth=0, feather=0, tries=1, size=192, context=context)
    assert swap.asked == shown == swap.image.shape[:2] and (swap.mask > 0).mean() == pytest.approx(share, rel=0.05)
    new = np.asarray(done.image).astype(int)
    inner = (slice(42, 47), slice(103, 108))
    assert (new[inner] - (0, 0, 255) < 40).all() and (
        new[inner][..., 2] > 215
    ).all()  # the answer comes back to its place
    assert np.array_equal(new[done.region == 0], image[done.region == 0])


def test_the_same_seed_repairs_alike_and_another_otherwise(pipeline):
    one, same, other = (repair(spotted(), pipeline, Red(), seed=seed, **OPTIONS) for seed in (0, 0, 1))
    assert np.array_equal(one.image, same.image) and one.tries == same.tries
    assert one.tries != other.tries


def test_the_pipeline_is_called_with_what_else_is_asked(pipeline):
    plain, short, same = (
        repair(spotted(), pipeline, Red(), pipeline_kwargs=more, **OPTIONS | {"tries": 1})
        for more in (None, {"max_sequence_length": 4}, {"max_sequence_length": 512})
    )
    assert plain.tries == same.tries != short.tries


def test_where_no_try_is_better_the_image_stays(pipeline):
    flat = np.full((64, 64, 3), 127, np.uint8)
    flat[20:30, 20:30] = (140, 120, 120)

    class Faint(Red):
        def confidence(self, images):
            return super().confidence(images) * 10

    done = repair(flat, pipeline, Faint(), Anything(), **OPTIONS)
    assert len(done.tries) == 2 and min(done.tries) > done.before
    assert done.seed is None and done.after == done.before and np.array_equal(done.image, flat)


def test_a_sound_image_is_not_touched(pipeline):
    flat = np.full((50, 70, 3), 127, np.uint8)
    done = repair(Image.fromarray(flat), pipeline, Red(), **OPTIONS)
    assert done.tries == () and done.seed is None and not done.region.any() and np.array_equal(done.image, flat)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tries": 0}, "`tries`.*0"),
        ({"strength": 0.0}, "`strength`.*0.0"),
        ({"size": 100}, "`size`.*100"),
        ({"threshold": 0.0}, "`threshold`.*0.0"),
        ({"growth": -0.1}, "`growth`.*-0.1"),
        ({"pipeline_kwargs": {"strength": 1.0}}, "`pipeline_kwargs` has 'strength'.*of its own"),
        ({"pipeline_kwargs": {"strenght": 1.0}}, "`pipeline_kwargs` has 'strenght', which FluxInpaintPipeline"),
        ({"context": -1.0}, "`context`.*-1.0"),
        ({"context": math.nan}, "`context`.*nan"),
    ],
)
def test_wrong_arguments_are_named(options, named, pipeline):
    with pytest.raises(ValueError, match=named):
        repair(spotted(), pipeline, Red(), **OPTIONS | options)


def test_regions_are_grown_and_fall_off():
    confidence = torch.zeros(100, 200)
    confidence[50, 100] = 0.6
    region = artifact_regions(confidence, growth=0.03, feather=0.04)
    assert region[50, 100:103].tolist() == [1, 1, 1] and region[50, 103] == 1
    assert region[50, 104:109].tolist() == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])
    assert not artifact_regions(confidence, threshold=0.7).any()


def test_images_are_ranked_by_confidence_then_area():
    images = torch.full((4, 3, 8, 8), 0.5)
    images[0, 0, :2] = 1.0  # 0.5 on 16 pixels
    images[1, 0, 0, 0] = 0.9
    images[2, 0, :1] = 1.0
    ranked = rank(images, Red(), threshold=0.3)
    assert [one.index for one in ranked] == [3, 1, 2, 0]
    assert ranked[-1].max_confidence == 0.5 and ranked[-1].area_ratio == 0.25
    pictures = [Image.fromarray((image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)) for image in images]
    assert [one.index for one in rank(pictures, Red(), 0.3)] == [3, 1, 2, 0]
    for wrong in ({"images": []}, {"images": images, "threshold": 0}):
        with pytest.raises(ValueError, match=r"`images`|`threshold`"):
            rank(detector=Red(), **wrong)


# --- files -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_flux().save_pretrained(folder)
    return str(folder)


def test_files_are_repaired_counted_and_done_once(tmp_path, saved, capsys):
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        scene = render(sample_scene(rng, category="hand", artifact="watermark"))[0]
        Image.fromarray(scene).save(images / f"{number}.png")
    Image.new("RGB", (64, 64), (90, 90, 90)).save(images / "flat.png")
    (images / "broken.png").write_bytes((images / "0.png").read_bytes()[:300])
    command = ["repair", str(images), "-o", str(tmp_path / "out"), "--detector", "miniature", "--pipeline", saved]
    command += ["--tries", "2", "--steps", "2", "--size", "64", "--context", "inf", "--device", "cpu"]
    command += ["--pipeline-kwargs", '{"max_sequence_length": 16}']
    assert main(command) == 0
    told = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out/repair.jsonl").read_text().splitlines()]
    assert "5 found" in told and "1 quarantined" in told and len(rows) == 4
    assert [Path(row["path"]).name for row in rows] == ["0.png", "1.png", "2.png", "flat.png"]
    assert rows[3]["tries"] == [] and rows[3]["repaired"] is None
    for row in rows[:3]:
        kept = (tmp_path / "out" / row["repaired"]) if row["repaired"] else None
        assert (kept is None) == (row["seed"] is None) == (row["after"] == row["before"])
        assert kept is None or read_image(kept).size == (64, 64)
    assert "broken.png" in (tmp_path / "out/quarantine.jsonl").read_text()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/repaired").iterdir()}
    assert main(command) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out/repaired").iterdir()}
    assert main([*command, "--seed", "1"]) == 0
    assert before != {path: path.stat().st_mtime_ns for path in (tmp_path / "out/repaired").iterdir()}


def test_wrong_flags_are_named_before_anything_is_loaded(tmp_path, capsys):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    command = ["repair", str(tmp_path), "-o", str(tmp_path / "out"), "--detector", "none", "--pipeline", "none"]
    assert main([*command, "--tries", "0"]) != 0
    assert "`tries` must be at least 1, got 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--pipeline-kwargs", "3"])
    assert "must be a JSON object" in capsys.readouterr().err
    assert main(["repair", str(tmp_path / "nothing"), *command[2:]]) != 0
    assert "nothing" in capsys.readouterr().err
