# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Augmentation of images and their artifact maps, at the size at which the detector sees them.

The DiffDoctor paper names "strong" augmentation and a dynamic one, and gives neither a list nor a range; its release has no
code for them. What is here is ours. Images are float (3, H, W) in [0, 1]. Maps are float (1, H, W) in [0, 1], and -1 where a
pixel is not to count.
"""

import io
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


NOT_COUNTED = -1.0  # label of a pixel that no loss and no metric counts
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601: weights of red, green and blue in the brightness that one sees
# From RGB to luma and two axes of chroma (NTSC's YIQ). A hue is an angle in the plane of the chroma.
YIQ = np.array([LUMA, (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135)])
KERNELS = (
    Image.Resampling.NEAREST,
    Image.Resampling.BILINEAR,
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
)
MIPMAP = 2 / 3  # factor above which bilinear resampling still sees nearly all of every pixel
# what fields may be, or their ranges may span; those that are not named, 0 to 1
BOUNDS = {
    "scale": (0.05, 20),
    "rotation": (0, 180),
    "shrink_below": (1e-6, 1),
    "shrink": (0.05, 1),
    "hue": (0, 0.5),
    "blur": (0.01, 20),
    "resample": (0.05, 1),
    "quality": (1, 100),
}

__all__ = ["Augmentation"]


@dataclass(frozen=True)
class Augmentation:
    """What may happen to an image in training, with which probability and how far. By default nothing does.

    ```python
    augment = Augmentation.preset("strong", noise_probability=0.0)
    image, artifact_map = augment(image, artifact_map, torch.Generator().manual_seed(0))
    ```

    What happens, in this order: geometry, in one resampling; colour; blur; noise; resampling; compression.

    Args:
        flip_probability: that image and map are mirrored.
        move_probability: that they are scaled, turned and shifted.
        scale: range of the factor, 0.05 to 20, drawn evenly in its logarithm. Above 1 the image is a part of it, enlarged; below
            1 it is smaller than its canvas. Where is drawn evenly.
        rotation: degrees, 0 to 180, by which an image is turned at most, in either direction.
        shrink_probability: of the paper's dynamic augmentation: that an image whose map stays below `shrink_below` is
            reduced and padded back to its size, somewhere on the canvas, so that small sound structures appear in training.
        shrink_others_probability: the same for images with artifacts. The paper does not; 0 leaves it so. But where only sound
            images are ever reduced, a detector can learn that what is small, or beside padding, is sound.
        shrink_below: confidence in (0, 1]; the paper names none. 0.1 is the one above which its treatment punishes a pixel.
        shrink: range of the factor, 0.05 to 1, in place of `scale`.
        color_probability: that all colours are changed.
        brightness, contrast, saturation: in [0, 1]: factors are drawn from 1 minus to 1 plus it.
        hue: in [0, 0.5]: part of the colour circle by which hues are turned at most, in either direction.
        blur_probability, blur: that an image is blurred, and the range of the Gaussian's standard deviation in pixels.
        noise_probability, noise: that white Gaussian noise is added, and the range of its standard deviation in [0, 1].
        resample_probability, resample: that an image is made smaller and as large as before, each time with the nearest pixel,
            bilinear, bicubic or Lanczos; and the range of the factor, 0.05 to 1.
        jpeg_probability, webp_probability: that an image goes through JPEG, or through WebP; together at most 1. So that a
            detector cannot learn the compression of a source instead of its artifacts.
        quality: range of the quality of both, 1 to 100.

    What comes to lie on the canvas from outside the image does not count (-1 in the map), and is the image's reflection in half
    of the cases, its mean colour in the others, so that neither betrays anything.

    Raises:
        ValueError: a probability or a range outside of what is allowed.
    """

    flip_probability: float = 0.0
    move_probability: float = 0.0
    scale: tuple[float, float] = (0.7, 1.5)
    rotation: float = 15.0
    shrink_probability: float = 0.0
    shrink_others_probability: float = 0.0
    shrink_below: float = 0.1
    shrink: tuple[float, float] = (0.25, 0.7)
    color_probability: float = 0.0
    brightness: float = 0.25
    contrast: float = 0.25
    saturation: float = 0.3
    hue: float = 0.03
    blur_probability: float = 0.0
    blur: tuple[float, float] = (0.3, 1.5)
    noise_probability: float = 0.0
    noise: tuple[float, float] = (0.005, 0.04)
    resample_probability: float = 0.0
    resample: tuple[float, float] = (0.5, 0.9)
    jpeg_probability: float = 0.0
    webp_probability: float = 0.0
    quality: tuple[int, int] = (50, 95)

    def __post_init__(self):
        for field in fields(self):
            value, is_range = getattr(self, field.name), isinstance(field.default, tuple)
            if isinstance(value, list):  # as JSON has it
                object.__setattr__(self, field.name, value := tuple(value))
            _check(field.name, value, BOUNDS.get(field.name, (0, 1)), is_range)
        _check("jpeg_probability + webp_probability", self.jpeg_probability + self.webp_probability, (0, 1))

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "Augmentation":
        """One of `PRESETS` ("none", "light", "strong") with some fields changed.

        Raises:
            ValueError: another name, an unknown field, or a value that is not allowed.
        """
        if name not in PRESETS:
            raise ValueError(f"`augmentation` must be one of {', '.join(map(repr, PRESETS))}, found {name!r}.")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(changes) - known):
            raise ValueError(f"An augmentation has no {', '.join(unknown)}. It has {', '.join(sorted(known))}.")
        return replace(PRESETS[name], **changes)

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def __call__(
        self, image: torch.Tensor, artifact_map: torch.Tensor, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """An augmented image and its map, of the sizes that they came in; what they were is not changed.

        Args:
            image: float (3, H, W) in [0, 1].
            artifact_map: float (1, H, W) in [0, 1], or -1 where a pixel is not to count.
            generator: decides everything. Without it torch's own does.
        """
        # Every part has its own numbers, drawn whether it needs them or not: to change one part leaves the others as they are.
        numbers = torch.rand(9, 4, dtype=torch.float64, generator=generator).tolist()
        flip, move, shrink, place, color, blur, noise, resample, compress = numbers
        image, artifact_map = self._moved(image, artifact_map, flip, move, shrink, place)
        if color[0] < self.color_probability:
            most = (self.brightness, self.contrast, self.saturation)
            factors = [_between((1 - limit, 1 + limit), number) for limit, number in zip(most, color[1:])]
            image = recolored(image, *factors, hue=_between((-self.hue, self.hue), place[3]))
        if blur[0] < self.blur_probability:
            image = blurred(image, _between(self.blur, blur[1]))
        if noise[0] < self.noise_probability:
            deviation = _between(self.noise, noise[1])
            image = torch.empty(image.shape).normal_(std=deviation, generator=generator).add_(image).clamp_(0, 1)
        picture = None
        if resample[0] < self.resample_probability:
            kernels = [KERNELS[int(number * len(KERNELS))] for number in resample[2:]]
            picture = resampled(to_picture(image), _between(self.resample, resample[1]), *kernels)
        if compress[0] < self.jpeg_probability + self.webp_probability:
            format = "JPEG" if compress[0] < self.jpeg_probability else "WEBP"
            quality = int(_between((self.quality[0], self.quality[1] + 1), compress[1]))
            picture = compressed(to_picture(image) if picture is None else picture, format, quality)
        return image if picture is None else from_picture(picture), artifact_map

    def _moved(
        self,
        image: torch.Tensor,
        artifact_map: torch.Tensor,
        flip: list[float],
        move: list[float],
        shrink: list[float],
        place: list[float],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mirror, scale, angle = flip[0] < self.flip_probability, 1.0, 0.0
        if move[0] < self.move_probability:
            scale = math.exp(_between(tuple(map(math.log, self.scale)), move[1]))
            angle = _between((-self.rotation, self.rotation), move[2])
        sound = artifact_map.max().item() < self.shrink_below
        if shrink[0] < (self.shrink_probability if sound else self.shrink_others_probability):
            scale = _between(self.shrink, shrink[1])
        if scale == 1 and angle == 0:
            return (image.flip(-1), artifact_map.flip(-1)) if mirror else (image, artifact_map)
        free = abs(scale - 1) / 2  # so that the image covers the canvas, or lies on it
        shift = tuple(_between((-free, free), number) * side for number, side in zip(place, image.shape[:0:-1]))
        return moved(image, artifact_map, scale, angle, shift, mirror, reflect=place[2] < 0.5)


def reduced_map(artifact_map: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A map (1, H, W) at a size (h, w), usually a smaller one: a pixel takes the highest value of all that it covers. Where that is 0
    and some of what it covers does not count, it does not count either: it could hide an artifact.
    """
    highest = F.adaptive_max_pool2d(artifact_map, size)
    if artifact_map.min() >= 0:
        return highest
    uncertain = F.adaptive_max_pool2d((artifact_map < 0).to(artifact_map.dtype), size) > 0
    return highest.masked_fill(uncertain & (highest <= 0), NOT_COUNTED)


def without_ignored(artifact_map: torch.Tensor, ignore_map: Image.Image | None) -> torch.Tensor:
    """A map (1, H, W) with -1 where `ignore_map` is above 0 in something that a pixel covers; None: as it is."""
    if ignore_map is None:
        return artifact_map
    ignored = F.adaptive_max_pool2d(from_picture(ignore_map), artifact_map.shape[-2:])
    return artifact_map.masked_fill(ignored > 0, NOT_COUNTED)


def moved(
    image: torch.Tensor,
    artifact_map: torch.Tensor,
    scale: float = 1.0,
    angle: float = 0.0,
    shift: tuple[float, float] = (0.0, 0.0),
    flip: bool = False,
    reflect: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Image and map mirrored, then turned and scaled around the centre, then shifted, on a canvas of their own size.

    The image is resampled once, bilinearly; where it becomes smaller than `MIPMAP`, after an antialiased reduction. A pixel of the map
    takes the value under its centre, so that certain pixels stay certain, and those that do not count mix with none; after such a
    reduction that is the highest value of all that it covers, see [`reduced_map`].

    Args:
        image, artifact_map: (3, H, W) and (1, H, W).
        scale: factor, above 0.
        angle: degrees, counter-clockwise as one sees it.
        shift: pixels to the right and down, by which the centre moves.
        flip: mirror left and right.
        reflect: what comes from outside is the image's reflection; else its mean colour. In the map it is -1.
    """
    height, width = image.shape[-2:]
    if scale < MIPMAP:
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        image = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]
        artifact_map = reduced_map(artifact_map, size)
    # For each pixel of the canvas, the place that it comes from. `grid_sample` counts from -1 to 1 from edge to edge.
    cos, sin = math.cos(math.radians(angle)) / scale, math.sin(math.radians(angle)) / scale
    x = torch.arange(width, dtype=torch.float32) + (0.5 - width / 2 - shift[0])
    y = torch.arange(height, dtype=torch.float32) + (0.5 - height / 2 - shift[1])
    across = 2 / width * (-1 if flip else 1)
    grid = torch.empty(1, height, width, 2)
    torch.add(x * (cos * across), (y * (-sin * across))[:, None], out=grid[0, ..., 0])
    torch.add(x * (sin * 2 / height), (y * (cos * 2 / height))[:, None], out=grid[0, ..., 1])
    if reflect:
        image = F.grid_sample(image[None], grid, padding_mode="reflection", align_corners=False)[0]
    else:
        mean = image.mean(dim=(1, 2), keepdim=True)
        image = F.grid_sample((image - mean)[None], grid, align_corners=False)[0].add_(mean)
    inside = torch.ones_like(artifact_map)  # and 0 what comes from outside
    sampled = F.grid_sample(torch.cat([artifact_map, inside])[None], grid, mode="nearest", align_corners=False)[0]
    return image.clamp_(0, 1), sampled[:1] - NOT_COUNTED * (sampled[1:] - 1)


def recolored(
    image: torch.Tensor, brightness: float = 1.0, contrast: float = 1.0, saturation: float = 1.0, hue: float = 0.0
) -> torch.Tensor:
    """All colours changed: multiplied by `brightness`; their distance from the image's mean luma by `contrast`; that from their
    own luma by `saturation`; their hue turned by `hue`, a part of the circle. One affine map of RGB, cut to [0, 1] at its end.
    """
    gray = np.tile(LUMA, (3, 1))
    turn = 2 * math.pi * hue
    turn = np.array([[1, 0, 0], [0, math.cos(turn), -math.sin(turn)], [0, math.sin(turn), math.cos(turn)]])
    matrix = np.linalg.inv(YIQ) @ turn @ YIQ @ (saturation * np.eye(3) + (1 - saturation) * gray)
    mean = brightness * float(np.dot(LUMA, image.mean(dim=(1, 2)).double().numpy()))
    offset = (matrix @ np.ones(3)) * (1 - contrast) * mean
    matrix, offset = (torch.from_numpy(values).float() for values in (matrix * contrast * brightness, offset[:, None]))
    return torch.addmm(offset, matrix, image.reshape(3, -1)).view(image.shape).clamp_(0, 1)


def blurred(image: torch.Tensor, deviation: float) -> torch.Tensor:
    """Convolved with a Gaussian of this standard deviation in pixels, to three of them; the edge goes on outside."""
    radius = math.ceil(3 * deviation)
    weights = torch.exp(-torch.arange(-radius, radius + 1.0).square() / (2 * deviation**2))
    # Channels that do not mix, as one full convolution: on a CPU many times as fast as a grouped one.
    weights = torch.eye(3)[:, :, None] * (weights / weights.sum())
    image = F.pad(image[None], (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(image, weights[:, :, None, :]), weights[:, :, :, None])[0].clamp_(0, 1)


def resampled(picture: Image.Image, factor: float, down: Image.Resampling, up: Image.Resampling) -> Image.Image:
    """Reduced by `factor` with one of Pillow's kernels, and brought back with another."""
    width, height = picture.size
    return picture.resize((max(1, round(width * factor)), max(1, round(height * factor))), down).resize(
        picture.size, up
    )


def compressed(picture: Image.Image, format: str, quality: int) -> Image.Image:
    """Through "JPEG" or "WEBP" of this quality, 1 to 100. WebP at its fastest setting, which is slow enough."""
    file = io.BytesIO()
    picture.save(file, format, quality=quality, **({"method": 0} if format == "WEBP" else {}))
    return Image.open(file).convert("RGB")


def to_picture(image: torch.Tensor) -> Image.Image:
    """An image (3, H, W) in [0, 1], rounded to 8 bits."""
    return Image.fromarray(image.mul(255).round_().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def from_picture(picture: Image.Image) -> torch.Tensor:
    """A picture of mode RGB or L as float (3, H, W) or (1, H, W) in [0, 1]."""
    levels = torch.from_numpy(np.array(picture)).view(picture.height, picture.width, -1).permute(2, 0, 1)
    return levels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def _between(bounds: tuple[float, float], number: float) -> float:
    """Where a number in [0, 1) lies on the way from one bound to the other."""
    return bounds[0] + (bounds[1] - bounds[0]) * number


def _check(name: str, value: Any, bounds: tuple[float, float], is_range: bool = False) -> None:
    low, high = bounds
    values = value if is_range else (value,)
    if not (
        isinstance(values, tuple)
        and len(values) == (2 if is_range else 1)
        and all(isinstance(one, (int, float)) for one in values)
        and low <= values[0] <= values[-1] <= high
    ):
        what = "two numbers in order" if is_range else "a number"
        raise ValueError(f"`{name}` must be {what} in [{low:g}, {high:g}], found {value!r}.")


PRESETS = {
    "none": Augmentation(),
    "light": Augmentation(flip_probability=0.5, jpeg_probability=0.5),
    "strong": Augmentation(
        flip_probability=0.5,
        move_probability=0.7,
        color_probability=0.7,
        blur_probability=0.1,
        noise_probability=0.2,
        resample_probability=0.2,
        jpeg_probability=0.4,
        webp_probability=0.05,
        quality=(40, 95),
    ),
}
