"""The types of a decoded picture."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

# uint8[height, width, 3], the channels blue, green, red.
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Photo:
    """One decoded photo.

    Attributes:
        pixels: uint8[height, width, 3], BGR, upright.
        reduced_by: 1, 2, 4 or 8: the file's own picture is so many times as wide and as high.
        size: width and height of the file's own picture, upright.
        quarter_turns: by how many counter-clockwise quarter turns `turned` has turned it.
    """

    pixels: Pixels
    reduced_by: int
    size: tuple[int, int]
    quarter_turns: int = 0

    def turned(self, quarter_turns: int) -> Photo:
        """The photo after so many counter-clockwise quarter turns."""
        return replace(
            self,
            pixels=np.ascontiguousarray(np.rot90(self.pixels, quarter_turns)),
            size=self.size[::-1] if quarter_turns % 2 else self.size,
            quarter_turns=(self.quarter_turns + quarter_turns) % 4,
        )


def photo_of(bgr: bytes, height: int, width: int, reduced_by: int, size: tuple[int, int]) -> Photo:
    """The photo of decoded bytes, as `photos.decode.Decoded` holds them; ValueError if they have not this size."""
    return Photo(np.frombuffer(bgr, np.uint8).reshape(height, width, 3), reduced_by, size)
