# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Polygons and boxes against matplotlib's own question whether a point lies inside."""

import numpy as np
import pytest
from matplotlib.path import Path

from diffusers_diffdoctor.data.readers.shapes import box_mask, points_of, polygon_mask


SIZE = (40, 30)


def inside(points):
    """By matplotlib, for polygons that do not cross themselves: its rule is another one there."""
    x, y = np.meshgrid(np.arange(SIZE[0]) + 0.5, np.arange(SIZE[1]) + 0.5)
    return Path(points).contains_points(np.stack([x.ravel(), y.ravel()], axis=1)).reshape(x.shape)


@pytest.mark.parametrize("seed", range(20))
def test_a_polygon_holds_the_pixels_whose_centres_lie_inside(seed):
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 30)))
    radius = rng.uniform(3, 25, len(angles))  # a star around its centre, partly outside of the image
    points = rng.uniform((5, 5), (35, 25)) + radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    if np.diff([*angles, angles[0] + 2 * np.pi]).max() >= np.pi:
        points = points[:3]
    mask = polygon_mask(points, SIZE)
    assert np.array_equal(mask, inside(points)) and mask.any()
    assert np.array_equal(polygon_mask(points[::-1], SIZE), mask)


def test_neighbours_share_no_pixel_and_leave_none_out():
    corners = [(0, 0), (40, 0), (40, 30), (0, 30)]
    parts = [polygon_mask(np.array([a, b, (13.5, 7.5)]), SIZE) for a, b in zip(corners, corners[1:] + corners[:1])]
    assert (np.sum(parts, axis=0) == 1).all()


def test_what_is_crossed_twice_is_outside():
    ring = [(2, 2), (20, 2), (20, 20), (2, 20), (2, 2), (8, 8), (14, 8), (14, 14), (8, 14), (8, 8)]
    mask = polygon_mask(np.array(ring, float), SIZE)
    expected = np.zeros(SIZE[::-1], bool)
    expected[2:20, 2:20], expected[8:14, 8:14] = True, False
    assert np.array_equal(mask, expected)


def test_boxes_with_swapped_corners_and_beyond_the_border():
    for box in ([5, 8, 20, 12], [20, 12, 5, 8], [20, 8, 5, 12]):
        mask = box_mask(points_of(box), SIZE)
        assert mask[8:12, 5:20].all() and mask.sum() == 60
    assert box_mask(points_of([-1e9, -5, 3, 1e9]), SIZE).sum() == 3 * 30


def test_what_is_thinner_than_a_pixel_is_not_lost():
    assert np.argwhere(box_mask(points_of([5.1, 8.1, 5.2, 8.2]), SIZE)).tolist() == [[8, 5]]
    assert np.argwhere(polygon_mask(points_of([40, 30, 40, 30, 40, 30]), SIZE)).tolist() == [[29, 39]]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: polygon_mask(points_of([1, 1, 2, 2]), SIZE), "fewer than 3 corners"),
        (lambda: polygon_mask(points_of([50, 1, 60, 1, 60, 9]), SIZE), "outside of the image"),
        (lambda: points_of([1, 2, 3]), "not pairs"),
        (lambda: points_of([[1, 2], [3]]), "not pairs"),
        (lambda: points_of("abcd"), "not pairs"),
        (lambda: points_of({"x": 1}), "not pairs"),
        (lambda: points_of([1, float("nan")]), "not finite"),
        (lambda: points_of([1, float("inf")]), "not finite"),
        (lambda: points_of([1, 1e300]), "beyond 1e\\+09"),
    ],
)
def test_what_is_no_shape_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
