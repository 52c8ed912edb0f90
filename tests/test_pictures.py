# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_diffdoctor.pictures import (
    before_after_grid,
    heatmap_overlay,
    image_grid,
    plot_curves,
    to_pil,
)


def test_to_pil_keeps_the_pixels():
    levels = torch.arange(256).float().view(1, 16, 16).repeat(3, 1, 1)
    levels[1] = levels[1].flip(0)
    assert np.array_equal(np.asarray(to_pil(levels / 255)), levels.permute(1, 2, 0).numpy())
    assert to_pil(torch.tensor([[[1.7, -0.3]]])).getpixel((0, 0)) == 255


def test_overlay_colours_the_artifact_and_nothing_else():
    images = torch.full((2, 3, 4, 4), 0.5)
    maps = torch.zeros(2, 1, 4, 4)
    maps[0, 0, 1, 2] = 1
    overlay = heatmap_overlay(images, maps, alpha=1.0)
    assert overlay.shape == images.shape
    assert 0 <= overlay.min() and overlay.max() <= 1
    assert overlay[0, :, 1, 2].tolist() == pytest.approx([0.72, 0.0, 0.5])
    maps[0, 0, 1, 2] = 0
    untouched = heatmap_overlay(images, maps, alpha=1.0)
    assert torch.allclose(untouched, images)  # gray stays gray
    assert (overlay != untouched).any(dim=1).sum() == 1
    assert torch.equal(heatmap_overlay(images, torch.rand(2, 1, 4, 4), alpha=0.0), untouched)


def test_opacity_grows_with_the_confidence():
    """What is left of a difference between two images is what shines through."""
    ramp = torch.linspace(0, 1, 50).view(1, 1, 1, 50)
    dark, light = (heatmap_overlay(torch.full((1, 3, 1, 50), level), ramp, alpha=0.75) for level in (0.2, 0.8))
    assert torch.allclose((light - dark) / 0.6, (1 - 0.75 * ramp).expand(1, 3, 1, 50), atol=1e-6)
    heat = (dark - (1 - 0.75 * ramp) * 0.2)[0, :, 0, 1:] / (0.75 * ramp[0, 0, 0, 1:])
    assert (heat[1].diff() < 0).all()  # from yellow over red to magenta: less and less green


def test_overlay_refuses_maps_of_another_size():
    with pytest.raises(ValueError, match=r"\(1, 3, 8, 8\) and \(1, 1, 4, 4\)"):
        heatmap_overlay(torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 4, 4))


def test_grid_places_the_images_and_keeps_small_pixels_square():
    red, blue = torch.zeros(3, 8, 8), Image.new("RGB", (400, 200), (0, 0, 255))
    red[0] = 1
    red[:, 0, 0] = 0
    grid = image_grid([[red, blue], [None, red]], tile_size=64, margin=0)
    assert grid.width == 64 + 4 + 64
    pixels = np.asarray(grid)
    assert (pixels[:8, :8] == 0).all()  # one pixel became eight by eight
    assert (pixels[8:64, 8:64] == (255, 0, 0)).all()
    assert (pixels[2:30, 70:130] == (0, 0, 255)).all()  # shrunk to 64 x 32
    assert (pixels[32:64, 68:] == 255).all()
    assert (pixels[68 + 8 : 132, 68 + 8 :] == (255, 0, 0)).all()


def test_grid_checks_its_input():
    image = torch.zeros(3, 8, 8)
    with pytest.raises(ValueError, match="lengths"):
        image_grid([[image, image], [image]])
    with pytest.raises(ValueError, match="3 entries for 1 columns"):
        image_grid([[image]], column_labels=["a", "b", "c"])
    with pytest.raises(ValueError, match="no picture"):
        image_grid([])


def test_labels_and_captions_are_drawn_inside():
    image = torch.ones(3, 64, 64)
    plain = image_grid([[image]], tile_size=64)
    words = "a very long prompt about hands " * 20
    labelled = image_grid([[image]], ["a label that is far too long for one column"], [words], tile_size=64)
    assert labelled.width == plain.width
    assert plain.height + 24 < labelled.height < plain.height + 24 + 60  # no more than two lines
    assert np.asarray(labelled).min() < 120
    assert (np.asarray(labelled)[:, -4:] == 255).all()
    image_grid([[image]], captions=["手 рука ✋ \n\t"])  # letters that the font lacks are no error


def test_before_after_grid_shows_every_pair():
    before, after = torch.zeros(3, 3, 16, 16), torch.ones(3, 3, 16, 16)
    maps = torch.zeros(3, 1, 16, 16)
    one_block = before_after_grid(before, after, maps, maps, ["a", "b", "c"], columns=1, tile_size=32)
    two_blocks = before_after_grid(before, after, maps, maps, ["a", "b", "c"], columns=2, tile_size=32)
    assert two_blocks.width > 1.9 * one_block.width
    assert two_blocks.height < one_block.height
    black = (np.asarray(one_block) == 0).all(axis=-1).sum()
    assert black == 3 * 2 * 32 * 32  # image and clean diagnosis of each
    with pytest.raises(ValueError, match="equally many"):
        before_after_grid(before, after[:2], maps, maps)


def test_curves(tmp_path):
    history = [{"step": step, "loss": 1 / (step + 1), "epoch": 0.1, "learning_rate": 1e-4} for step in range(100)]
    history += [
        {"step": 50, "eval_loss": 0.3, "eval_runtime": 3.0},
        {"step": 99, "train_runtime": 5.0, "total_flos": 1},
    ]
    path = plot_curves(history, tmp_path / "curves.png")
    assert path == tmp_path / "curves.png"
    width, height = Image.open(path).size
    assert (width, height) == (2 * 504, 324)  # two panels, loss and learning rate: time is no metric
    plot_curves(history, path, keys=["loss"])
    assert Image.open(path).size == (504, 324)
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]


def test_nothing_to_draw_is_no_file(tmp_path):
    assert plot_curves([{"step": 1, "epoch": 0.5}], tmp_path / "curves.png") is None
    assert plot_curves([], tmp_path / "curves.png") is None
    assert not list(tmp_path.iterdir())
