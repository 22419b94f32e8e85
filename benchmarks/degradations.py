"""Damages good photos by known steps, for `evaluate_checks`: blur, noise, light, colour, tilt, cuts.

Lengths are in inter-eye distances, so that a step means the same at every resolution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from photos.pixels import Pixels

Eyes = npt.NDArray[np.float64]
Degrade = Callable[[Pixels, Eyes, float], Pixels]


def eye_distance(eyes: Eyes) -> float:
    return float(np.hypot(*(eyes[1] - eyes[0])))


def _to_pixels(values: npt.NDArray[np.floating]) -> Pixels:
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


def _blur(image: Pixels, eyes: Eyes, sigma: float) -> Pixels:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), max(0.2, sigma * eye_distance(eyes))), np.uint8)


def _shake(angle: float) -> Degrade:
    def apply(image: Pixels, eyes: Eyes, length: float) -> Pixels:
        side = max(3, round(length * eye_distance(eyes)) | 1)
        line = np.zeros((side, side), np.float32)
        line[side // 2] = 1
        turned = cv2.warpAffine(line, cv2.getRotationMatrix2D((side // 2, side // 2), angle, 1), (side, side))
        return np.asarray(cv2.filter2D(image, -1, turned / turned.sum()), np.uint8)

    return apply


def _shrink(image: Pixels, eyes: Eyes, inter_eye: float) -> Pixels:
    scale = min(1.0, inter_eye / eye_distance(eyes))
    return np.asarray(cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA), np.uint8)


def _scale_light(image: Pixels, _: Eyes, factor: float) -> Pixels:
    return _to_pixels(image * np.float32(factor))


def _fade(image: Pixels, _: Eyes, contrast: float) -> Pixels:
    return _to_pixels(128 + (image - np.float32(128)) * np.float32(contrast))


def _noise(image: Pixels, _: Eyes, deviation: float) -> Pixels:
    return _to_pixels(image + np.random.default_rng(1).normal(0, deviation, image.shape))


def _darken_noisily(image: Pixels, eyes: Eyes, factor: float) -> Pixels:
    return _noise(_scale_light(image, eyes, factor), eyes, 4.0)


def _light_from_side(image: Pixels, eyes: Eyes, loss: float) -> Pixels:
    across = (np.arange(image.shape[1]) - eyes[:, 0].mean()) / (1.9 * eye_distance(eyes)) + 0.5
    return _to_pixels(image * (1 - loss * np.clip(across, 0, 1))[None, :, None])


def _cast(blue: float, green: float, red: float) -> Degrade:
    return lambda image, _, share: _to_pixels(image * (1 + share * (np.array([blue, green, red]) - 1)))


def _grey(image: Pixels, _: Eyes, share: float) -> Pixels:
    grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)[..., None]
    return _to_pixels(image + share * (grey - image.astype(np.float32)))


def _tilt(image: Pixels, eyes: Eyes, degrees: float) -> Pixels:
    x, y = eyes.mean(axis=0)
    turn = cv2.getRotationMatrix2D((float(x), float(y)), degrees, 1)
    size = (image.shape[1], image.shape[0])
    return np.asarray(cv2.warpAffine(image, turn, size, borderMode=cv2.BORDER_REPLICATE), np.uint8)


def _stretch(image: Pixels, _: Eyes, width: float) -> Pixels:
    size = (max(1, round(width * image.shape[1])), image.shape[0])
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_LINEAR), np.uint8)


def saved(ending: str, flag: int) -> Degrade:
    """Save the photo as a file with this ending; `flag` is OpenCV's name of the strength."""

    def apply(image: Pixels, _: Eyes, value: float) -> Pixels:
        data = cv2.imencode(ending, image, [flag, int(value)])[1]
        return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)

    return apply


def _cut(*sides: str) -> Degrade:
    """Cut away a share of the face region (1.9 x 2.25 inter-eye distances) at these sides; below 0 leaves a margin."""

    def apply(image: Pixels, eyes: Eyes, share: float) -> Pixels:
        left, top, right, bottom = (share if side in sides else -1e3 for side in _SIDES)
        (x, y), span = eyes.mean(axis=0), eye_distance(eyes)
        x0, x1 = x + span * (-0.95 + 1.9 * left), x + span * (0.95 - 1.9 * right)
        y0, y1 = y + span * (-0.65 + 2.25 * top), y + span * (1.6 - 2.25 * bottom)
        return np.ascontiguousarray(image[max(0, round(y0)) : max(1, round(y1)), max(0, round(x0)) : max(1, round(x1))])

    return apply


@dataclass(frozen=True)
class Degradation:
    """Known steps of one kind of damage, and the measure of `evaluate_checks.MEASURES` that should notice it."""

    name: str
    steps: str
    measure: str
    strengths: tuple[float, ...]
    apply: Degrade


_SHAKES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
_DARKER = (0.5, 0.3, 0.2, 0.12, 0.08, 0.05, 0.03)
_CASTS = (0.4, 0.7, 1.0)
_SIDES = ("left", "top", "right", "bottom")
DEGRADATIONS = (
    Degradation("blur", "sigma / inter-eye", "sharpness", (0.02, 0.04, 0.06, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25), _blur),
    Degradation("shaken across", "length / inter-eye", "sharpness", _SHAKES, _shake(0)),
    Degradation("shaken down", "length / inter-eye", "sharpness", _SHAKES, _shake(90)),
    Degradation("shaken diagonally", "length / inter-eye", "sharpness", _SHAKES, _shake(45)),
    Degradation("JPEG", "quality", "damage", (30, 15, 10, 7, 4), saved(".jpg", cv2.IMWRITE_JPEG_QUALITY)),
    Degradation("noise", "sigma, grey levels", "damage", (5, 10, 20, 30, 40, 60), _noise),
    Degradation("stretched", "width", "stretch", (0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2), _stretch),
    Degradation("shrunk", "inter-eye, px", "inter-eye", (32, 28, 24, 20, 16, 13, 10), _shrink),
    Degradation("darkened", "factor", "luminance", _DARKER, _scale_light),
    Degradation("darkened, sensor noise", "factor", "luminance", _DARKER, _darken_noisily),
    Degradation("over-exposed", "factor", "white", (1.5, 2, 2.5, 3, 4, 6), _scale_light),
    Degradation("faded", "contrast", "range", (0.5, 0.25, 0.15, 0.1, 0.06, 0.04, 0.02), _fade),
    Degradation("side light", "loss on one side", "uniformity", (0.5, 0.7, 0.8, 0.9, 0.95, 1), _light_from_side),
    Degradation("blue light", "share", "colour", _CASTS, _cast(1.6, 0.8, 0.3)),
    Degradation("green light", "share", "colour", _CASTS, _cast(0.4, 1.5, 0.4)),
    Degradation("red light", "share", "colour", _CASTS, _cast(0.3, 0.6, 1.6)),
    Degradation("grey", "share", "colour", (0.5, 0.8, 1), _grey),
    Degradation("tilted", "degrees", "roll", (-60, -45, -30, -15, 15, 30, 45, 60, 75, 90), _tilt),
    *(Degradation(f"cut {side}", "share", "frame", (0.1, 0.2, 0.3, 0.4, 0.5), _cut(side)) for side in _SIDES),
    Degradation("close", "cut on each side", "head", (-0.2, -0.1, 0, 0.1), _cut(*_SIDES)),
)
