"""Smaller pictures: what becomes of detail that is finer than the copy."""

from __future__ import annotations

import numpy as np
import pytest

from resampling import cut_out, to_side


@pytest.mark.parametrize("side", [150, 180, 230, 300, 390])
def test_a_smaller_copy_passes_over_no_pixel(side: int) -> None:
    # One bright column in three: a copy that takes single pixels has whole stripes too many, or too few.
    stripes = np.zeros((400, 400, 3), np.uint8)
    stripes[:, ::3] = 255
    scale, copy = to_side(stripes, side, enlarging=1.0)
    matrix = np.array([[scale, 0, 0.5 * scale - 0.5], [0, scale, 0.5 * scale - 0.5]])
    for smaller in (copy, cut_out(stripes, matrix, side)):
        assert smaller.shape == (side, side, 3)
        columns = smaller[side // 2, 4:-4, 0].astype(float)
        nine = np.convolve(columns, np.ones(9) / 9, "valid")
        assert nine == pytest.approx(85, abs=30)
