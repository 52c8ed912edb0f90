# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""One picture in many containers is the same pixels, and what has no certain meaning is refused."""

import io
import os
import tempfile
import warnings

import numpy as np
import pytest
import torch
from fixtures.broken_files import whole
from PIL import Image, ImageCms

from diffusers_diffdoctor.detector.pipeline_artifact_detection import load_image
from diffusers_diffdoctor.images import read_artifact_map, read_image, to_image_tensor


H, W = 24, 40


@pytest.fixture
def color():
    return np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)


@pytest.fixture
def gray():
    return np.random.default_rng(1).integers(0, 256, (H, W), dtype=np.uint8)


def pixels(source):
    image = read_image(source)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def three(gray):
    return np.repeat(gray[..., None], 3, axis=2)


def half_transparent(color):
    """Left transparent over colours that nobody sees, right opaque; and what one sees."""
    alpha = np.full((H, W, 1), 255, np.uint8)
    alpha[:, : W // 2] = 0
    return np.concatenate([color, alpha], axis=2), np.where(alpha == 0, 255, color)


def stored(image, path, **options):
    image.save(path, **options)
    return path


def test_files_are_read_as_one_sees_them(tmp_path, color, gray):
    plain = Image.fromarray(color)
    rgba, on_white = half_transparent(color)
    assert np.array_equal(pixels(stored(plain, tmp_path / "plain.png")), color)
    assert np.array_equal(pixels(stored(Image.fromarray(rgba), tmp_path / "rgba.png")), on_white)
    la = Image.merge("LA", [Image.fromarray(gray), Image.fromarray(rgba[..., 3])])
    expected = np.where(rgba[..., 3:] == 0, 255, three(gray))
    assert np.array_equal(pixels(stored(la, tmp_path / "la.png")), expected)
    assert np.array_equal(pixels(stored(Image.fromarray(gray), tmp_path / "gray.png")), three(gray))
    palette = plain.convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(pixels(stored(palette, tmp_path / "p.png")), np.asarray(palette.convert("RGB")))
    index = np.asarray(palette)[..., None]
    clear = stored(palette, tmp_path / "trns.png", transparency=7)
    assert (index == 7).any()
    assert np.array_equal(pixels(clear), np.where(index == 7, 255, np.asarray(palette.convert("RGB"))))


def test_half_an_alpha_is_half_white():
    assert np.array_equal(pixels(Image.new("RGBA", (1, 1), (0, 100, 200, 51)))[0, 0], [204, 224, 244])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_exif_says(tmp_path, color, orientation):
    """By hand, from the Exif standard: where row 0 and column 0 of the stored pixels are seen."""
    seen = {1: color, 2: color[:, ::-1], 3: color[::-1, ::-1], 4: color[::-1], 5: color.swapaxes(0, 1)}
    seen |= {6: np.rot90(color, -1), 7: color[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(color)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = stored(Image.fromarray(color), tmp_path / "turned.png", exif=exif)
    assert np.array_equal(pixels(path), seen[orientation])
    with Image.open(path) as image:
        assert np.array_equal(pixels(image), seen[orientation])


def test_deep_images_come_to_the_full_range(tmp_path, gray):
    deep = Image.fromarray(gray.astype(np.uint16) * 257)
    for name in ("deep.png", "deep.tiff"):
        assert np.array_equal(pixels(stored(deep, tmp_path / name)), three(gray))
    floats = Image.fromarray(gray.astype(np.float32) / 255)
    assert np.array_equal(pixels(stored(floats, tmp_path / "float.tiff")), three(gray))
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert np.array_equal(pixels(levels)[..., 0], np.round(levels / 257).astype(int))
    transparent = stored(deep, tmp_path / "trns16.png", transparency=int(gray[0, 0]) * 257)
    assert np.array_equal(pixels(transparent), three(np.where(gray == gray[0, 0], 255, gray)))


def test_cmyk_is_converted(tmp_path, color):
    smooth = Image.fromarray(color).resize((8, 8)).resize((W, H), Image.Resampling.BICUBIC)
    path = stored(smooth.convert("CMYK"), tmp_path / "cmyk.jpg", quality=100, subsampling=0)
    assert np.abs(pixels(path) - np.asarray(smooth)).mean() < 2


def test_arrays_and_tensors_are_the_picture_that_they_hold(color, gray):
    rgba, on_white = half_transparent(color)
    scaled = color.astype(np.float64) / 255
    tensor = torch.from_numpy(color).permute(2, 0, 1)
    for same in (
        color,
        color.transpose(2, 0, 1),
        tensor,
        scaled,
        scaled.astype(np.float32),
        tensor / 255,
        scaled.tolist(),
    ):
        assert np.array_equal(pixels(same), color)
    assert np.array_equal(pixels((tensor / 255).requires_grad_()), color)
    assert np.abs(pixels((tensor / 255).bfloat16()) - color).max() <= 1
    assert np.array_equal(pixels(color.astype(np.uint16) * 257), color)
    assert np.array_equal(pixels(rgba), on_white)
    assert np.array_equal(pixels(torch.from_numpy(rgba).permute(2, 0, 1)), on_white)
    for same in (gray, gray[..., None], gray[None], torch.from_numpy(gray), torch.from_numpy(gray)[None]):
        assert np.array_equal(pixels(same), three(gray))
    assert np.array_equal(pixels(gray > 99), three((gray > 99) * 255))
    assert pixels(np.zeros((3, 8, 3), np.uint8)).shape == (3, 8, 3)  # last axis of an array, first of a tensor
    assert pixels(torch.zeros(3, 8, 3)).shape == (8, 3, 3)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (np.full((4, 4, 3), 7.0), ValueError, r"floats must lie in \[0, 1\], found values from 7 to 7"),
        (torch.full((3, 4, 4), -1.0), ValueError, "found values from -1 to -1"),
        (np.full((4, 4, 3), np.nan), ValueError, "from nan to nan"),
        (Image.fromarray(np.full((4, 4), 255.0, np.float32)), ValueError, "found values from 255"),
        (np.zeros((4, 4, 3), np.int64), TypeError, "int64 has no known full range"),
        (Image.new("I", (4, 4)), TypeError, "mode I"),
        (np.zeros((2, 4, 4, 3), np.uint8), ValueError, r"shape \(2, 4, 4, 3\) is no image"),
        (np.zeros((5, 6, 7), np.uint8), ValueError, "is no image"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "is no image"),
        (None, TypeError, "must be a path, a binary file, a PIL image"),
        ({"bytes": b""}, TypeError, "found dict"),
    ],
)
def test_what_has_no_certain_meaning_is_refused(source, error, message):
    with pytest.raises(error, match=message):
        read_image(source)


def test_floats_are_rounded_to_the_nearest_level():
    assert np.array_equal(pixels(np.full((2, 2, 3), 127.6 / 255)), np.full((2, 2, 3), 128))


def test_a_rounding_error_is_no_other_range():
    assert np.array_equal(pixels(np.full((2, 2, 3), 1 + 1e-6)), np.full((2, 2, 3), 255))


def test_formats_are_limited_whatever_the_name(tmp_path):
    for name in ("gif", "ppm"):
        path = tmp_path / f"{name}.png"
        Image.new("RGB", (8, 8)).save(path, name)
        with pytest.raises(ValueError, match=rf"{name}.png' is not an image in one of the formats PNG, JPEG"):
            read_image(path)
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "nothing.png")


@pytest.mark.parametrize("opened", [False, True])
def test_bombs_are_refused(tmp_path, monkeypatch, opened):
    path = stored(Image.new("RGB", (64, 64)), tmp_path / "bomb.png")
    source = Image.open(path) if opened else path
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow only warns here; it must be an error all the same
        with pytest.raises(ValueError, match=r"too large to be opened safely: .*64 x 64"):
            read_image(source)
    if opened:
        source.close()


def test_a_file_cut_short_is_refused(tmp_path, color):
    for name in ("image.png", "image.jpg", "image.webp", "image.bmp", "image.tiff"):
        path = stored(Image.fromarray(color).resize((64, 64)), tmp_path / name)
        read_image(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises((OSError, ValueError)):
            read_image(path)


def test_damaged_pixels_of_a_png_are_noticed(tmp_path):
    """One bit, behind all that Pillow reads to draw the image."""
    content = bytearray(whole(".png"))
    content[-12 - 4 - 1] ^= 1
    (tmp_path / "image.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"image.png' is broken: .*checksum"):
        read_image(tmp_path / "image.png")


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path, kind in ((tmp_path / "pipe.png", "named pipe"), (tmp_path, "folder"), ("/dev/zero", "device")):
        with pytest.raises(ValueError, match=rf"'{path}' is a {kind}, not a file"):
            read_image(path)


def test_files_without_a_name(color):
    with tempfile.TemporaryFile() as file:  # whose name is a number
        Image.fromarray(color).save(file, "PNG")
        assert np.array_equal(pixels(file), color)
        file.truncate(40)
        with pytest.raises((OSError, ValueError), match=r"The image|truncated"):
            read_image(file)


def test_binary_files(color):
    file = io.BytesIO()
    Image.fromarray(color).save(
        file, "PNG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    )
    assert np.array_equal(pixels(file), color)
    assert np.array_equal(np.asarray(load_image(file)), color)
    file = io.BytesIO(b"no image")
    file.name = "upload.png"
    with pytest.raises(ValueError, match=r"'upload\.png' is not an image"):
        read_image(file)


def test_tensors_keep_the_pixels_and_are_cropped_around_the_centre(color):
    assert torch.equal(to_image_tensor(color), torch.from_numpy(color).permute(2, 0, 1) / 255)
    assert torch.equal(to_image_tensor(color, (H, W)), to_image_tensor(color))
    bars = np.zeros((10, 30, 3), np.uint8)
    bars[:, 10:20] = 255
    assert to_image_tensor(bars, (10, 10)).min() == 1
    assert to_image_tensor(bars, (20, 60)).shape == (3, 20, 60)
    fine = np.indices((40, 40)).sum(axis=0) % 2 == 0  # black and white by turns: gray from afar
    assert (to_image_tensor(fine, (10, 10)) - 0.5).abs().max() < 0.02


# --- artifact maps --------------------------------------------------------------------------------------------------------


def as_map(source, maximum=None):
    artifact_map = read_artifact_map(source, maximum)
    assert artifact_map.mode == "L"
    return np.asarray(artifact_map)


def test_maps_come_to_the_full_range(tmp_path, gray):
    mask = gray > 99
    for same in (
        gray,
        Image.fromarray(gray),
        gray[None],
        torch.from_numpy(gray),
        gray / 255,
        gray.astype(np.uint16) * 257,
    ):
        assert np.array_equal(as_map(same), gray)
        assert np.array_equal(as_map(same, maximum=255), gray)
    for same in (mask, Image.fromarray(mask), torch.from_numpy(mask), mask.astype(np.float32), mask * np.uint8(255)):
        assert np.array_equal(as_map(same), mask * 255)
    assert as_map(np.zeros((4, 4), np.uint8)).max() == 0
    assert np.array_equal(as_map(stored(Image.fromarray(gray), tmp_path / "map.png")), gray)
    exif = Image.Exif()
    exif[0x0112] = 3
    assert np.array_equal(as_map(stored(Image.fromarray(gray), tmp_path / "turned.png", exif=exif)), gray[::-1, ::-1])


def test_a_mask_of_zero_and_one_must_be_explained(gray):
    mask = (gray > 99).astype(np.uint8)
    for source in (mask, Image.fromarray(mask), torch.from_numpy(mask)):
        with pytest.raises(ValueError, match=r"highest value of an 8-bit artifact map is 1.*`map_maximum=1` or"):
            as_map(source)
        assert np.array_equal(as_map(source, maximum=1), 255 * mask)
        assert np.array_equal(as_map(source, maximum=255), mask)
    with pytest.raises(ValueError, match="has the value 255, but `map_maximum` is 1"):
        as_map(255 * mask, maximum=1)
    with pytest.raises(ValueError, match="`maximum` must be 255 or 1"):
        as_map(mask, maximum=100)


@pytest.mark.parametrize("mode", ["RGB", "P", "LA", "I"])
def test_maps_of_other_kinds_are_refused(mode):
    with pytest.raises(ValueError, match=f"found mode {mode}"):
        read_artifact_map(Image.new(mode, (4, 4)))
    with pytest.raises(ValueError, match="one channel, found an array of shape"):
        read_artifact_map(np.zeros((4, 4, 3), np.uint8))
