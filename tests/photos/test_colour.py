"""CIELAB: the values that are published for sRGB's corners, and OpenCV's of every patch."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from photos.colour import mean_lab


@pytest.mark.parametrize(
    ("bgr", "lab"),
    [
        ((0, 0, 255), (53.24, 80.09, 67.20)),
        ((0, 255, 0), (87.73, -86.18, 83.18)),
        ((255, 0, 0), (32.30, 79.19, -107.86)),
        ((255, 255, 255), (100, 0, 0)),
        ((119, 119, 119), (50.03, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
    ],
    ids=["red", "green", "blue", "white", "grey", "black"],
)
def test_a_colour_has_the_published_place(bgr: tuple[int, ...], lab: tuple[float, ...]) -> None:
    assert mean_lab(np.array([bgr], np.uint8)) == pytest.approx(lab, abs=0.03)


def test_a_patch_has_the_mean_that_opencvs_conversion_has() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        patch = np.clip(rng.integers(0, 256, 3) + rng.normal(0, 20, (200, 3)), 0, 255).astype(np.uint8)
        theirs = cv2.cvtColor(patch[:, None].astype(np.float32) / np.float32(255), cv2.COLOR_BGR2LAB)
        assert mean_lab(patch) == pytest.approx(theirs.reshape(-1, 3).mean(axis=0), abs=0.3)
