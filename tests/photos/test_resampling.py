"""Smaller pictures: what becomes of detail that is finer than the copy."""

from __future__ import annotations

import numpy as np
import pytest

from photos.pixels import Pixels
from photos.resampling import cut_out, to_side


@pytest.fixture
def stripes() -> Pixels:
    """Every second column is white: their deviation is 127.5, and stays that where a copy takes single pixels."""
    picture = np.zeros((400, 400, 3), np.uint8)
    picture[:, ::2] = 255
    return picture


@pytest.mark.parametrize("side", [150, 230, 300, 390])
def test_a_smaller_copy_passes_over_no_pixel(stripes: Pixels, side: int) -> None:
    scale, copy = to_side(stripes, side, enlarging=1.0)
    assert (scale, copy.shape) == (side / 400, (side, side, 3))
    assert copy[side // 2, 4:-4, 0].std() < 80


@pytest.mark.parametrize("side", [150, 180])
def test_a_part_that_is_cut_out_smaller_passes_over_no_pixel_either(stripes: Pixels, side: int) -> None:
    scale = side / 400
    matrix = np.array([[scale, 0, 0.5 * scale - 0.5], [0, scale, 0.5 * scale - 0.5]])
    cut = cut_out(stripes, matrix, side)
    assert cut.shape == (side, side, 3)
    assert cut[side // 2, 4:-4, 0].std() < 38
