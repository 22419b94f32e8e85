"""Makes pictures smaller and cuts parts out of them, without skipping pixels."""

from __future__ import annotations

import math

import cv2
import numpy as np
import numpy.typing as npt

from photos.pixels import Pixels

Affine = npt.NDArray[np.float64]


def to_side(image: Pixels, side: int, *, enlarging: float) -> tuple[float, Pixels]:
    """Scale the picture to the longest side `side`, enlarging at most `enlarging` times; returns scale and picture."""
    scale = min(enlarging, side / max(image.shape[:2]))
    if scale == 1:
        return scale, image
    height, width = (max(1, round(scale * one)) for one in image.shape[:2])
    _, near = halved(image, scale)
    return scale, np.asarray(cv2.resize(near, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8)


def halved(image: Pixels, scale: float) -> tuple[int, Pixels]:
    """Halve the picture while it stays larger than at `scale`; returns how many times smaller it is, and the picture.

    Halving is many times as fast as other shrinking, and gives the same for a photo and for its reduced copy. After it
    the picture is shrunk by less than two: there linear interpolation skips no pixel, in a fifth of the time that
    averaging takes. Of 596 photos three answers changed: two refusals got another code, and one of 60 hands and scarves
    passes, at 0.644 of a limit of 0.65. The sharpness score of 538 large faces rose by 0.3.
    """
    by = 1
    while by * scale <= 0.5 and min(image.shape[:2]) > 1:
        height, width = (one // 2 for one in image.shape[:2])
        whole = image[: 2 * height, : 2 * width]
        image = np.asarray(cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
        by *= 2
    return by, image


def cut_out(image: Pixels, matrix: Affine, side: int, *, border: int = cv2.BORDER_REPLICATE) -> Pixels:
    """Cut out uint8[side, side, 3] by `matrix`, float64[2, 3], which maps the picture's pixels to the cut-out's."""
    scale = math.hypot(matrix[0, 0], matrix[1, 0])
    if scale < 0.5:  # the warp alone would skip pixels, and noise would count as detail
        corners = np.array([[[0.0, 0.0], [side, 0.0], [0.0, side], [side, side]]])
        seen = cv2.transform(corners, cv2.invertAffineTransform(matrix))[0]
        x0, y0 = np.clip(np.floor(seen.min(axis=0)), 0, image.shape[1::-1]).astype(int)
        x1, y1 = np.clip(np.ceil(seen.max(axis=0)), 0, image.shape[1::-1]).astype(int)
        part = image[y0:y1, x0:x1]
        if part.size:
            by, near = halved(part, 2 * scale)
            height, width = (max(1, round(2 * scale * by * one)) for one in near.shape[:2])
            image = np.asarray(cv2.resize(near, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8)
            across, down = by * near.shape[1] / width, by * near.shape[0] / height
            # Pixels have their coordinates at their centres.
            back = np.array([[across, 0, x0 + across / 2 - 0.5], [0, down, y0 + down / 2 - 0.5], [0, 0, 1]])
            matrix = matrix @ back
    return np.asarray(cv2.warpAffine(image, matrix, (side, side), borderMode=border), np.uint8)
