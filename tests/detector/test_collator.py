# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fixtures.runs import squares
from PIL import Image

from diffusers_diffdoctor.detector import (
    ArtifactDetectorCollator,
    ArtifactDetectorConfig,
    ArtifactDetectorTrainingArguments,
)
from diffusers_diffdoctor.detector.augmentation import PRESETS, Augmentation
from diffusers_diffdoctor.detector.modeling_artifact_detector import normalise_images
from diffusers_diffdoctor.detector.sampling import DRAW, Draw


CONFIG = ArtifactDetectorConfig(image_size=64)


def noise(width, height, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def drawn(rows, epoch=0, place=0):
    return [{**row, DRAW: Draw(epoch, place + i, i)} for i, row in enumerate(rows)]


def shown(pixel_values):
    """Back from the detector's statistics to [0, 1]."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (CONFIG.image_mean, CONFIG.image_std))
    return pixel_values * std + mean


@pytest.mark.parametrize("size", [(128, 96), (130, 97), (65, 64)])
def test_maps_of_a_quarter_are_enlarged_as_the_logits_are(size):
    """What a detector says at a quarter of the side is learned as it would have been at the full one."""
    width, height = size
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (-(-height // 4), -(-width // 4)), np.uint8)
    row = {"image": noise(width, height), "artifact_map": Image.fromarray(small)}
    large = F.interpolate(torch.from_numpy(small)[None, None] / 255, size=(height, width), mode="bilinear")
    evaluated = ArtifactDetectorCollator(CONFIG, for_evaluation=True)([row])
    torch.testing.assert_close(evaluated["labels"], large)
    assert evaluated["sizes"].tolist() == [[*evaluated["pixel_values"].shape[-2:], height, width]]
    batch = ArtifactDetectorCollator(CONFIG)([row])
    assert batch["labels"].shape[-2:] == batch["pixel_values"].shape[-2:]
    torch.testing.assert_close(batch["labels"], F.adaptive_max_pool2d(large, batch["labels"].shape[-2:]))


@pytest.mark.parametrize("size", [(32, 24), (31, 24), (64, 48), (24, 32), (1, 1)])
def test_maps_of_other_sizes_are_refused(size):
    row = {"image": noise(129, 96), "artifact_map": Image.new("L", size)}
    with pytest.raises(ValueError, match=rf"image of 129 x 96 .* map of {size[0]} x {size[1]}.*\(33 x 24\)"):
        ArtifactDetectorCollator(CONFIG)([row])


def test_a_draw_decides_about_its_row_alone():
    """Whatever batch it is in, and whatever was drawn before; another place or epoch is another image."""
    collate = ArtifactDetectorCollator(CONFIG, PRESETS["strong"], crop_probability=0.5, seed=3)
    rows = drawn(squares(4, side=80))
    whole = collate(rows)
    torch.rand(7)
    for i, row in enumerate(rows):
        alone = collate([row])
        assert all(torch.equal(alone[name][0], whole[name][i]) for name in whole)
    picture = rows[0] | {DRAW: Draw(0, 0, 0)}
    others = [picture | {DRAW: draw} for draw in (Draw(1, 0, 0), Draw(0, 1, 0))]
    images = [collate([row])["pixel_values"] for row in (picture, *others)]
    images.append(ArtifactDetectorCollator(CONFIG, PRESETS["strong"], 0.5, seed=4)([picture])["pixel_values"])
    assert len({one.numpy().tobytes() for one in images}) == 4
    state = torch.get_rng_state()
    collate(rows)
    assert torch.equal(torch.get_rng_state(), state)
    unnumbered = [collate([squares(1, side=80)[0]])["pixel_values"] for _ in range(4)]
    assert len({one.numpy().tobytes() for one in unnumbered}) > 1


def test_batches_are_seen_at_sizes_of_their_own():
    """All of a batch, and the batches of all processes at one time, at one size; between the batches it changes."""
    collate = ArtifactDetectorCollator(CONFIG, image_sizes=(32, 128), samples_at_once=8)
    rows, sides = squares(4), {}
    for epoch in range(3):
        for place in range(0, 8 * 20, 4):
            batch = collate(drawn(rows, epoch, place))
            assert batch["pixel_values"].shape == (4, 3, *batch["labels"].shape[-2:])
            sides.setdefault((epoch, place // 8), set()).add(batch["pixel_values"].shape[-1])
    assert all(len(seen) == 1 for seen in sides.values())
    found = [seen.pop() for seen in sides.values()]
    assert set(found) == {32, 64, 96, 128} and found[:20] != found[20:40]
    assert [found.count(side) > 5 for side in (32, 64, 96, 128)] == [True] * 4
    wide = ArtifactDetectorCollator(CONFIG, image_sizes=(96, 96))(
        [{"image": noise(90, 60), "artifact_map": noise(90, 60).convert("L")}]
    )
    expected = normalise_images(torch.from_numpy(np.array(noise(90, 60))).permute(2, 0, 1)[None] / 255, CONFIG, 96)
    assert expected.shape == (1, 3, 96, 128) and torch.equal(wide["pixel_values"], expected)


def test_crops_are_parts_of_the_image_at_its_own_scale():
    image, places = noise(100, 150), set()
    levels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    red = Image.fromarray(np.asarray(image)[..., 0])
    collate = ArtifactDetectorCollator(CONFIG, crop_probability=1.0)
    for row in drawn([{"image": image, "artifact_map": red}] * 30):
        batch = collate([row])
        assert batch["pixel_values"].shape == (1, 3, 64, 64)
        seen = (shown(batch["pixel_values"][0]) * 255).round().to(torch.uint8)
        assert torch.equal((batch["labels"][0, 0] * 255).round().to(torch.uint8), seen[0])  # the map went along
        corners = (levels[:, :87, :37] == seen[:, :1, :1]).all(dim=0).nonzero().tolist()
        fitting = [(y, x) for y, x in corners if torch.equal(levels[:, y : y + 64, x : x + 64], seen)]
        assert len(fitting) == 1
        places.update(fitting)
    ys, xs = zip(*places)
    assert len(places) > 20 and min(ys) < 20 < 65 < max(ys) and min(xs) < 9 < 27 < max(xs)


def test_crops_reach_every_edge():
    levels = torch.from_numpy(np.array(noise(65, 65))).permute(2, 0, 1)
    rows, seen = drawn([{"image": noise(65, 65), "artifact_map": Image.new("L", (65, 65))}] * 40), set()
    for pixels in ArtifactDetectorCollator(CONFIG, crop_probability=1.0)(rows)["pixel_values"]:
        corner = (shown(pixels)[:, 0, 0] * 255).round()
        seen |= {(y, x) for y in (0, 1) for x in (0, 1) if torch.equal(levels[:, y, x].float(), corner)}
    assert len(seen) == 4


@pytest.mark.parametrize("size", [(64, 64), (64, 200), (40, 100)])
def test_what_is_not_larger_is_not_cut(size):
    row = {"image": noise(*size), "artifact_map": Image.new("L", size, 255)}
    cut, whole = (ArtifactDetectorCollator(CONFIG, crop_probability=p)([row]) for p in (1.0, 0.0))
    assert all(torch.equal(cut[name], whole[name]) for name in whole)


def test_dynamic_augmentation_is_for_sound_rows():
    rows = drawn(squares(8, side=64))  # every second one is sound
    augmentation = Augmentation(shrink_probability=1.0)
    batch = ArtifactDetectorCollator(CONFIG, augmentation)(rows)
    plain = ArtifactDetectorCollator(CONFIG)(rows)
    for i in range(8):
        reduced = (batch["labels"][i] == -1).any().item()
        assert reduced == (i % 2 == 1)
        assert torch.equal(batch["pixel_values"][i], plain["pixel_values"][i]) == (not reduced)
    evaluated = ArtifactDetectorCollator(CONFIG, augmentation, for_evaluation=True)(rows)
    assert torch.equal(evaluated["pixel_values"], plain["pixel_values"])


def test_the_arguments_say_what_the_collator_does(tmp_path):
    def arguments(**changes):
        return ArtifactDetectorTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **changes)

    assert arguments().build_augmentation() == PRESETS["none"]
    args = arguments(
        augmentation="strong", augmentation_kwargs='{"rotation": 90, "scale": [0.5, 2]}', shrink_below=0.3
    )
    expected = Augmentation.preset("strong", rotation=90, scale=(0.5, 2), shrink_below=0.3)
    assert args.build_augmentation() == expected
    assert arguments(image_size_min=32, image_size_max=96).image_sizes == (32, 96)
    for changes, message in [
        ({"augmentation": "heavy"}, r"`augmentation` must be one of 'none', 'light', 'strong'"),
        ({"augmentation_kwargs": "rotation"}, "`augmentation_kwargs` must be a dictionary"),
        ({"augmentation_kwargs": {"turn": 1}}, r"no turn\. It has"),
        ({"shrink_probability": 1.5}, "shrink_probability.*found 1.5"),
        ({"crop_probability": -0.5}, "crop_probability.*found -0.5"),
        ({"image_size_min": 32}, "multiples of 32 .*found 32 and None"),
        ({"image_size_min": 48, "image_size_max": 96}, "multiples of 32 .*found 48 and 96"),
        ({"image_size_min": 96, "image_size_max": 64}, "in order.*found 96 and 64"),
    ]:
        with pytest.raises(ValueError, match=message):
            arguments(**changes)
